from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from cascade.errors import InvalidRequest
from cascade.wire import enums

if TYPE_CHECKING:
    from enum import StrEnum

ALL = [value for value in vars(enums).values() if isinstance(value, enums.Enumeration)]


@pytest.mark.parametrize("enumeration", ALL, ids=lambda enumeration: enumeration.name)
def test_every_member_comes_back_as_it_was(enumeration: enums.Enumeration[Any]) -> None:
    member: StrEnum
    for member in enumeration.members:
        assert enumeration.decode(enumeration.encode(member)) is member


@pytest.mark.parametrize("enumeration", ALL, ids=lambda enumeration: enumeration.name)
def test_the_unspecified_and_the_unknown_are_refused(
    enumeration: enums.Enumeration[Any],
) -> None:
    for value in (0, 99, -1):
        with pytest.raises(InvalidRequest, match=f"`{enumeration.name}` is {value}"):
            enumeration.decode(value)
