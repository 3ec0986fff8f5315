"""What a replica takes when it starts; importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from cascade.engine.settings import EngineSettings, ExpertVocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaOptions:
    """What a replica serves, and its timeouts."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    engine: EngineSettings = field(default_factory=EngineSettings)
    expert: ExpertVocabulary | None = None  # of a drafter; None: it has the expert's tokens
    connect_timeout_s: float = 10.0  # from a lease to its session
    idle_timeout_s: float = 120.0  # of a session without messages
    pass_timeout_s: float = 120.0  # a forward pass that takes longer means that the device hangs
