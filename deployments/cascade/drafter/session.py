"""A session as a drafter replica holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cascade.replica.session import ReplicaSession

if TYPE_CHECKING:
    from cascade.drafter.draft_tree import DraftTree


@dataclass(slots=True, eq=False, kw_only=True)
class DraftSession(ReplicaSession):
    """The committed answer of a session, and the branches that are drafted after it."""

    tree: DraftTree | None = None
