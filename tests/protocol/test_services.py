from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.protocol.services import (
    DRAFTER,
    EXPERT,
    Description,
    TierKind,
    decode_description,
    encode_description,
)
from cascade.v1 import cascade_pb2, drafter_pb2, expert_pb2

FILES: tuple[Any, ...] = (cascade_pb2, drafter_pb2, expert_pb2)

SERVICES = {
    service.full_name: service
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
}


def test_no_two_rpcs_share_a_name() -> None:
    """Ray Serve dispatches by the name of the method, whatever its service."""
    names = Counter(method.name for service in SERVICES.values() for method in service.methods)
    assert set(names.values()) == {1}


@pytest.mark.parametrize("kind", [DRAFTER, EXPERT], ids=lambda kind: kind.name)
def test_a_tier_kind_names_methods_and_types_of_the_protos(kind: TierKind) -> None:
    methods = SERVICES[kind.service].methods_by_name
    stream = methods[kind.stream_method]
    assert (stream.client_streaming, stream.server_streaming) == (True, True)
    assert stream.input_type.full_name == kind.request.DESCRIPTOR.full_name
    assert stream.output_type.full_name == kind.response.DESCRIPTOR.full_name
    describe = methods[kind.describe_method]
    assert (describe.client_streaming, describe.server_streaming) == (False, False)
    assert describe.output_type.full_name == kind.description.DESCRIPTOR.full_name


@pytest.mark.parametrize("kind", [DRAFTER, EXPERT], ids=lambda kind: kind.name)
@given(data=st.data())
def test_a_description_survives_a_round_trip(kind: TierKind, data: st.DataObject) -> None:
    counts, names = st.integers(0, 2**31 - 1), st.text(st.characters(codec="utf-8"))
    description = data.draw(
        st.builds(
            Description,
            model=names,
            tokenizer_fingerprint=names,
            vocab_size=counts,
            context_length=counts,
            protocol_version=counts,
            draft_limit=counts,
            session_limit=counts,
            item_limit=counts,
            frame_limit_bytes=st.integers(0, 2**63 - 1),
        )
    )
    assert decode_description(encode_description(description, kind), kind) == description
