"""What a replica is told when it starts; light enough for processes that hold no model."""

from __future__ import annotations

from dataclasses import dataclass, field

from cascade.engine.settings import EngineSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaOptions:
    """What a replica serves, and how patient it is."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    engine: EngineSettings = field(default_factory=EngineSettings)
    connect_timeout_s: float = 10.0  # from a lease to its session
    idle_timeout_s: float = 120.0  # of a session without items
    pass_timeout_s: float = 120.0  # of a forward pass, until its device is taken to hang
