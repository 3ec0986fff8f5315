"""What an operator may write under `args:` in the YAML; defaults live here, once.

Durations are seconds, sizes tokens unless the name says otherwise. Unknown keys are refused.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from cascade.decoding.generation import Confidence
from cascade.decoding.rules import Lossless, Rule
from cascade.decoding.session import Bonus, Coupling, Mode, RowFormat, Verification

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]


class Settings(BaseModel):
    """A branch of the tree."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Engine(Settings):
    """One model on one device; a zero lets the engine choose (`engine.settings`)."""

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: Natural = 0
    cache_tokens: Natural = 0
    max_step_tokens: Natural = 0
    prefix_reuse: bool = True
    deterministic: bool = False


class Deployment(Settings):
    """How many replicas, and on what; the words are Ray Serve's own."""

    num_replicas: Positive = 1
    autoscaling_config: dict[str, Any] | None = None
    ray_actor_options: dict[str, Any] = Field(default_factory=lambda: {"num_cpus": 1})
    placement_group_bundles: list[dict[str, float]] | None = None
    placement_group_strategy: str | None = None
    max_ongoing_requests: Positive = 64
    max_queued_requests: int = Field(256, ge=-1)
    graceful_shutdown_timeout_s: Seconds = 660.0
    health_check_period_s: Seconds = 5.0

    @model_validator(mode="after")
    def _one_way_to_count(self) -> "Deployment":
        if self.autoscaling_config is not None and "num_replicas" in self.model_fields_set:
            raise ValueError("set num_replicas or autoscaling_config, not both")
        return self


class Tier(Settings):
    """The drafter tier or the expert tier."""

    model: str = Field(
        description="A Hugging Face hub id, a local folder, or demo for the own pair"
    )
    revision: str | None = None
    trust_remote_code: bool = False
    engine: Engine = Engine()
    deployment: Deployment = Deployment()
    bind_host: str = "0.0.0.0"  # noqa: S104 - routers on other nodes reach it; a lease guards it
    connect_timeout_s: Seconds = 10.0
    idle_timeout_s: Seconds = 120.0


class Router(Settings):
    """The loop and its doors."""

    deployment: Deployment = Deployment(max_ongoing_requests=512)
    max_generation_s: Seconds = 600.0
    draft_deadline_s: Seconds = 2.0
    draft_pause_s: Seconds = 1.0
    lease_timeout_s: Seconds = 10.0
    draft_tokens: Positive = 5


class Defaults(Settings):
    """What a request that does not say gets."""

    mode: Mode = Mode.CASCADE
    rule: Rule = Field(default_factory=Lossless, discriminator="kind")
    draft_tokens: Natural | Literal["auto"] = "auto"
    coupling: Coupling | None = None
    bonus: Bonus = Bonus.EXPERT
    verification: Verification = Verification.TOKEN
    rows: RowFormat = RowFormat.AUTO
    confidence: Confidence = Confidence.MEAN
    confidence_threshold: float = -0.5
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: Natural = 0


class Limits(Settings):
    """What a request may ask for."""

    context_tokens: Positive | None = None  # the pair's own, unless less is wanted
    max_tokens: Positive = 4096
    n: Positive = 8
    batch: Positive = 64
    draft_tokens: Positive = 32
    body_bytes: Positive = 2_000_000


class Application(Settings):
    """The whole tree: `cascade.app:build` takes it."""

    name: str = "cascade"
    drafter: Tier = Tier(model="demo")
    expert: Tier = Tier(model="demo")
    router: Router = Router()
    defaults: Defaults = Defaults()
    limits: Limits = Limits()
    api_keys: tuple[SecretStr, ...] = ()
