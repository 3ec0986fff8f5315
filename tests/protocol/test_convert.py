from __future__ import annotations

import math
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.errors import InvalidRequest
from cascade.protocol import convert
from cascade.protocol.convert import decode_rule, decode_sampling, encode_rule, encode_sampling
from cascade.rules import Chow, Lossless, Lossy, Rule, TokenV3, Typical
from cascade.types import SamplingParams
from cascade.v1 import tokens_pb2

ALL = [value for value in vars(convert).values() if isinstance(value, convert.EnumCodec)]


@pytest.mark.parametrize("codec", ALL, ids=lambda codec: codec.name)
def test_every_enum_member_survives_a_round_trip(codec: convert.EnumCodec[Any]) -> None:
    for member in codec.values:
        assert codec.decode(codec.encode(member)) is member


@pytest.mark.parametrize("codec", ALL, ids=lambda codec: codec.name)
def test_unspecified_and_unknown_enum_values_are_refused(codec: convert.EnumCodec[Any]) -> None:
    for value in (0, 99, -1):
        with pytest.raises(InvalidRequest, match=f"`{codec.name}` is {value}"):
            codec.decode(value)


@pytest.mark.parametrize("kind", get_args(Rule))
@given(data=st.data())
def test_every_rule_survives_a_round_trip(kind: type[Rule], data: st.DataObject) -> None:
    rule = data.draw(st.from_type(kind))
    message = tokens_pb2.Rule()
    encode_rule(rule, message)
    assert decode_rule(message) == rule


def test_the_protos_have_the_same_rules() -> None:
    named = {field.name for field in tokens_pb2.Rule.DESCRIPTOR.oneofs_by_name["kind"].fields}
    assert named == {kind(**_smallest(kind)).kind for kind in get_args(Rule)}


def _smallest(kind: type[Rule]) -> dict[str, float]:
    needed = {"alpha", "weight"} & set(kind.__slots__)
    return dict.fromkeys(needed, 0.0)


@pytest.mark.parametrize(
    ("message", "rule"),
    [
        (tokens_pb2.Rule(lossless=tokens_pb2.Lossless()), Lossless()),
        (tokens_pb2.Rule(lossy=tokens_pb2.Lossy(alpha=0.5)), Lossy(alpha=0.5, beta="one")),
        (tokens_pb2.Rule(typical=tokens_pb2.Typical()), Typical(epsilon=0.09, delta=0.3)),
        (tokens_pb2.Rule(chow=tokens_pb2.Chow(alpha=0)), Chow(alpha=0)),
        (tokens_pb2.Rule(token_v3=tokens_pb2.TokenV3(alpha=1)), TokenV3(alpha=1)),
    ],
)
def test_absent_rule_parameters_have_their_defaults(message: tokens_pb2.Rule, rule: Rule) -> None:
    assert decode_rule(message) == rule


def lossy(**fields: Any) -> tokens_pb2.Rule:
    return tokens_pb2.Rule(lossy=tokens_pb2.Lossy(**fields))


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (tokens_pb2.Rule(), "`rule` has no kind"),
        (tokens_pb2.Rule(chow=tokens_pb2.Chow()), "`rule.chow.alpha` is missing"),
        (tokens_pb2.Rule(chow=tokens_pb2.Chow(alpha=1.1)), "`rule.chow.alpha` is 1.1"),
        (tokens_pb2.Rule(chow=tokens_pb2.Chow(alpha=math.nan)), "`rule.chow.alpha` is nan"),
        (tokens_pb2.Rule(diff=tokens_pb2.Diff(alpha=-2)), "`rule.diff.alpha` is -2.0"),
        (tokens_pb2.Rule(opt=tokens_pb2.Opt(alpha=math.inf)), "`rule.opt.alpha` is inf"),
        (tokens_pb2.Rule(ensemble=tokens_pb2.Ensemble(weight=-1)), "`rule.ensemble.weight`"),
        (tokens_pb2.Rule(typical=tokens_pb2.Typical(delta=0)), "`rule.typical.delta` is 0.0"),
        (lossy(alpha=1), "`rule.lossy.alpha` is 1.0"),
        (lossy(alpha=0.1, beta=9), "`rule.lossy.beta` is 9"),
    ],
)
def test_a_rule_out_of_bounds_is_refused_by_name(message: tokens_pb2.Rule, text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        decode_rule(message)
    assert text in refused.value.message
    assert text.startswith(f"`{refused.value.param}`") or refused.value.param == "rule"


def test_absent_sampling_parameters_have_their_defaults() -> None:
    assert decode_sampling(tokens_pb2.Sampling()) == SamplingParams()
    message = tokens_pb2.Sampling(temperature=0, top_k=7)
    assert decode_sampling(message) == SamplingParams(temperature=0, top_k=7)


def test_defaults_are_sent_too() -> None:
    """So a receiver with other defaults samples with the sender's parameters."""
    message = tokens_pb2.Sampling()
    encode_sampling(SamplingParams(), message)
    assert {field.name for field, _ in message.ListFields()} == set(convert.SAMPLING_FIELDS)
