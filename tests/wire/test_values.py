from __future__ import annotations

from cascade.decoding.session import Sampling
from cascade.v1 import tokens_pb2
from cascade.wire.values import decode_sampling, encode_sampling

SERVER = Sampling(temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, logit_bias=((3, -1.0),))


def test_what_a_client_leaves_out_comes_from_the_server() -> None:
    message = tokens_pb2.Sampling(temperature=0, top_k=0)
    assert decode_sampling(message, default=SERVER) == Sampling(
        temperature=0, top_k=0, top_p=0.9, min_p=0.1, logit_bias=((3, -1.0),)
    )


def test_nothing_at_all_is_plain_sampling() -> None:
    assert decode_sampling(tokens_pb2.Sampling()) == Sampling()


def test_what_is_sent_overrides_every_default() -> None:
    """A default of the receiver must not change a law that the sender has fixed."""
    message = tokens_pb2.Sampling()
    encode_sampling(Sampling(), message)
    sent = decode_sampling(message, default=SERVER)
    assert sent.temperature == 1.0
    assert (sent.top_k, sent.top_p, sent.min_p) == (0, 1.0, 0.0)
