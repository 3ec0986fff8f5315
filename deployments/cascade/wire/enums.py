"""Enumerations of ours and of the protos, told apart by nothing but their spelling."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Generic, TypeVar

from cascade.decoding.generation import Confidence, ExpertLoss, FinishReason
from cascade.decoding.session import Bonus, Coupling, Mode, Origin, RowFormat, Verification
from cascade.errors import InvalidRequest
from cascade.v1 import cascade_pb2, tokens_pb2

Member = TypeVar("Member", bound=StrEnum)


class Enumeration(Generic[Member]):
    """Turns members of a StrEnum into values of a proto enum and back."""

    def __init__(self, ours: type[Member], theirs: Any, prefix: str) -> None:
        self.name = prefix.lower()
        self._values = {member: int(theirs.Value(f"{prefix}_{member.name}")) for member in ours}
        self._members = {value: member for member, value in self._values.items()}

    @property
    def members(self) -> tuple[Member, ...]:
        """Return all members."""
        return tuple(self._values)

    def encode(self, member: Member) -> Any:
        """Return the proto's value."""
        return self._values[member]

    def decode(self, value: int) -> Member:
        """Return our member; raises InvalidRequest for a value that has none."""
        member = self._members.get(value)
        if member is None:
            raise InvalidRequest(
                f"`{self.name}` is {value}; it must be one of {sorted(self._members)}",
                param=self.name,
            )
        return member


ORIGIN = Enumeration(Origin, tokens_pb2.Origin, "ORIGIN")
COUPLING = Enumeration(Coupling, tokens_pb2.Coupling, "COUPLING")
BONUS = Enumeration(Bonus, tokens_pb2.Bonus, "BONUS")
VERIFICATION = Enumeration(Verification, tokens_pb2.Verification, "VERIFICATION")
ROW_FORMAT = Enumeration(RowFormat, tokens_pb2.RowFormat, "ROW_FORMAT")
MODE = Enumeration(Mode, cascade_pb2.Mode, "MODE")
CONFIDENCE = Enumeration(Confidence, cascade_pb2.Confidence, "CONFIDENCE")
EXPERT_LOSS = Enumeration(ExpertLoss, cascade_pb2.ExpertLoss, "EXPERT_LOSS")
FINISH_REASON = Enumeration(FinishReason, cascade_pb2.FinishReason, "FINISH_REASON")
