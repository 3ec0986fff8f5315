"""What an operator may write under `args:` in the YAML; defaults live here, once.

Durations are seconds, sizes tokens unless the name says otherwise. Unknown keys are refused. Each
branch turns itself into the frozen value that its part takes.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from cascade import demo
from cascade.api.context import Defaults as DoorDefaults
from cascade.api.context import Limits as DoorLimits
from cascade.api.context import ServingContext
from cascade.engine import model_pair, threads
from cascade.engine.settings import EngineSettings
from cascade.engine.settings import Path as EnginePath
from cascade.observability.metrics import MetricBackend
from cascade.observability.observer import Observed
from cascade.observability.request_log import RequestLog
from cascade.observability.request_metrics import RequestMetrics
from cascade.replica.autoscaling import Targets
from cascade.replica.replica import ReplicaOptions
from cascade.router import router, tier_session
from cascade.rules import Lossless, Rule
from cascade.speculation.draft_length import DraftLengthTuner
from cascade.types import (
    Bonus,
    Confidence,
    Coupling,
    ExpertLoss,
    Generator,
    Mode,
    RowFormat,
    SequenceCascadeParams,
    Verification,
)

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]

UNBOUNDED_CONTEXT = 4096  # of a pair whose configurations name no bound


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
    path: EnginePath = EnginePath.AUTO


class Deployment(Settings):
    """How many replicas, and on what; the words are Ray Serve's own."""

    num_replicas: Positive = 1
    autoscaling_config: dict[str, Any] | None = None
    ray_actor_options: dict[str, Any] = Field(default_factory=lambda: {"num_cpus": 1})
    placement_group_bundles: list[dict[str, float]] | None = None
    placement_group_strategy: str | None = None
    max_ongoing_requests: Positive = 64
    max_queued_requests: Annotated[int, Field(ge=-1)] = 256
    graceful_shutdown_timeout_s: Seconds = 660.0
    graceful_shutdown_wait_loop_s: Seconds = 0.5
    health_check_period_s: Seconds = 5.0

    @model_validator(mode="after")
    def _one_way_to_count(self) -> "Deployment":
        if self.autoscaling_config is not None and "num_replicas" in self.model_fields_set:
            raise ValueError("set num_replicas or autoscaling_config, not both")
        return self

    @property
    def always_there(self) -> bool:
        """Whether at least one replica runs at all times."""
        return self.autoscaling_config is None or self.autoscaling_config.get("min_replicas", 1) > 0

    def options(self, *, environment: dict[str, str] | None = None) -> dict[str, Any]:
        """Return the keywords of `Deployment.options`; `environment` is of the process."""
        chosen = self.model_dump(exclude_none=True)
        if self.autoscaling_config is not None:
            del chosen["num_replicas"]
        actor = chosen["ray_actor_options"]
        runtime = actor.get("runtime_env", {})
        variables = (environment or {}) | runtime.get("env_vars", {})
        chosen["ray_actor_options"] = actor | {"runtime_env": runtime | {"env_vars": variables}}
        return chosen


class Scaling(Settings):
    """How many replicas, by their own load; what one should bear stands under each tier's.

    Shares are of 1; a zero target does not matter (`operations.autoscaling`).
    """

    min_replicas: Natural = 1
    max_replicas: Positive
    initial_replicas: Natural | None = None
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300.0
    downscale_to_zero_delay_s: Annotated[float, Field(ge=0)] | None = None  # as the other
    look_back_period_s: Seconds = 20.0
    metrics_interval_s: Seconds = 2.0
    wait_s: Annotated[float, Field(ge=0)] = 0.05  # of a question, until its first pass
    busy: Share = 0.9  # of the time in passes; keeps a tier from shrinking, never grows it
    sessions: Share = 0.75  # of max_ongoing_requests

    def targets(self, *, most_sessions: int) -> Targets:
        """Return what a replica should bear, which holds so many sessions at most."""
        return Targets(wait_s=self.wait_s, busy=self.busy, sessions=self.sessions * most_sessions)

    def config(self, *, most_sessions: int) -> dict[str, Any]:
        """Return Serve's `autoscaling_config`."""
        targets = self.targets(most_sessions=most_sessions)
        ours = {field.name for field in fields(Targets)}
        return self.model_dump(exclude=ours, exclude_none=True) | {
            "policy": {
                "policy_function": "cascade.replica.autoscaling:TierPolicy",
                "policy_kwargs": asdict(targets),
            }
        }


class ExpertScaling(Scaling):
    """The expert's load has two parts more."""

    wait_s: Annotated[float, Field(ge=0)] = 0.2
    backlog: Annotated[float, Field(ge=0)] = 1.0  # passes that the waiting tokens fill
    cache: Share = 0.8  # held by open sessions

    def targets(self, *, most_sessions: int) -> Targets:
        """Return what a replica should bear."""
        common = super().targets(most_sessions=most_sessions)
        return replace(common, backlog=self.backlog, cache=self.cache)


class Tier(Settings):
    """A tier: which model, run how, on what."""

    own: ClassVar[Path]

    model: str = "demo"  # Hugging Face hub id, local folder, or demo for the pair that ships
    revision: str | None = None
    trust_remote_code: bool = False
    engine: Engine = Engine()
    deployment: Deployment = Deployment()
    scaling: Scaling | None = None  # in place of the deployment's own count
    bind_host: str = "0.0.0.0"  # noqa: S104 - routers on other nodes reach it; a lease guards it
    connect_timeout_s: Seconds = 10.0
    idle_timeout_s: Seconds = 120.0
    pass_timeout_s: Seconds = 120.0  # of a forward pass, until the replica is taken to hang

    @model_validator(mode="after")
    def _one_way_to_count(self) -> "Tier":
        counted = {"num_replicas", "autoscaling_config"} & self.deployment.model_fields_set
        if self.scaling is not None and counted:
            raise ValueError(f"set scaling or deployment.{counted.pop()}, not both")
        return self

    @property
    def always_there(self) -> bool:
        """Whether at least one replica runs at all times."""
        if self.scaling is None:
            return self.deployment.always_there
        return self.scaling.min_replicas > 0

    @property
    def model_path(self) -> str:
        """Return the hub id or the folder."""
        return str(self.own) if self.model == "demo" else self.model

    def source(self) -> model_pair.ModelSource:
        """Return where the model comes from."""
        return model_pair.ModelSource(
            name=self.model_path, revision=self.revision, trust_remote_code=self.trust_remote_code
        )

    def options(self) -> ReplicaOptions:
        """Return what a replica takes."""
        return ReplicaOptions(
            model=self.model_path,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            engine=EngineSettings(
                **self.engine.model_dump(), max_sessions=2 * self.deployment.max_ongoing_requests
            ),
            connect_timeout_s=self.connect_timeout_s,
            idle_timeout_s=self.idle_timeout_s,
            pass_timeout_s=self.pass_timeout_s,
        )

    def serve_options(self, *, environment: dict[str, str]) -> dict[str, Any]:
        """Return the keywords of Serve's `Deployment.options`; `environment` is of the process."""
        options = self.deployment.options(environment=self.environment() | environment)
        if self.scaling is None:
            return options
        del options["num_replicas"]
        most = self.deployment.max_ongoing_requests
        return options | {"autoscaling_config": self.scaling.config(most_sessions=most)}

    def environment(self) -> dict[str, str]:
        """Return the variables that a replica's process must start with."""
        return threads.environment(threads=self.engine.threads)


class Drafter(Tier):
    """The drafter tier."""

    own = demo.DRAFTER


class Expert(Tier):
    """The expert tier."""

    own = demo.EXPERT

    scaling: ExpertScaling | None = None  # pyright: ignore[reportIncompatibleVariableOverride] - settings are frozen


class Router(Settings):
    """The loop and its doors."""

    deployment: Deployment = Deployment(max_ongoing_requests=512)
    max_generation_s: Seconds = 600.0
    draft_deadline_s: Seconds = 2.0
    draft_pause_s: Seconds = 1.0
    answer_deadline_s: Seconds = 5.0  # before a verdict is asked for again
    entry_deadline_s: Seconds = 2.0  # for an expert, before an answer begins; then 503
    loss_deadline_s: Seconds = 30.0  # for another expert, in mid answer; then an error ends it
    lease_timeout_s: Seconds = 8.0  # below the 10 s after which a stream's status is settled
    lease_hedge_s: Seconds = 0.25  # before a second replica is asked for a lease beside the first
    draft_tokens: Positive = 5  # of `auto`, before it has measured
    overlap_blocks: Natural = 1  # drafted on while the expert judges; 0 waits for it
    overlap_branches: Natural = 4  # other likely verdicts drafted on, as far as drafters are idle

    def loop(
        self, *, drafters: tier_session.TierClient, experts: tier_session.TierClient
    ) -> router.Router:
        """Return the loop over two tiers."""
        return router.Router(
            drafters=drafters,
            experts=experts,
            automatic=DraftLengthTuner(first=self.draft_tokens).session,
            options=router.RouterOptions(
                max_generation_s=self.max_generation_s,
                draft_deadline_s=self.draft_deadline_s,
                draft_pause_s=self.draft_pause_s,
                answer_deadline_s=self.answer_deadline_s,
                entry_deadline_s=self.entry_deadline_s,
                loss_deadline_s=self.loss_deadline_s,
                overlap_blocks=self.overlap_blocks,
                overlap_branches=self.overlap_branches,
            ),
        )


class Defaults(Settings):
    """What a request that does not say gets."""

    mode: Mode = Mode.CASCADE
    rule: Rule = Field(default_factory=Lossless, discriminator="kind")
    draft_tokens: Natural | Literal["auto"] = "auto"
    coupling: Coupling | None = None
    bonus: Bonus = Bonus.EXPERT
    verification: Verification = Verification.TOKEN
    rows: RowFormat = RowFormat.AUTO
    row_entries: Positive = 64
    confidence: Confidence = Confidence.MEAN
    confidence_threshold: float = -0.5
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Natural = 0
    deadline_s: Seconds | None = None  # of an answer; router.max_generation_s holds too
    on_expert_loss: ExpertLoss = ExpertLoss.FAIL

    def for_doors(self) -> DoorDefaults:
        """Return what the doors take."""
        chosen = {name: getattr(self, name) for name in type(self).model_fields}
        patience = SequenceCascadeParams(
            confidence=chosen.pop("confidence"), threshold=chosen.pop("confidence_threshold")
        )
        if self.draft_tokens == "auto":
            chosen["draft_tokens"] = None
        return DoorDefaults(**chosen, patience=patience)


class Limits(Settings):
    """What a request may ask for."""

    context_tokens: Positive | None = None  # the pair's own, unless less is wanted
    max_tokens: Positive | None = None  # what the context leaves
    choices: Positive = 16
    prompts: Positive = 64
    draft_tokens: Positive = 32
    body_bytes: Positive = 2_000_000

    def for_doors(self, *, context_tokens: int) -> DoorLimits:
        """Return what the doors take, for a pair with this context."""
        chosen = self.model_dump()
        chosen["context_tokens"] = min(context_tokens, self.context_tokens or context_tokens)
        return DoorLimits(**chosen)


class Application(Settings):
    """The whole tree: `cascade.app:build` takes it."""

    name: str = "cascade"  # of the model, as clients call it
    drafter: Drafter = Drafter()
    expert: Expert = Expert()
    router: Router = Router()
    defaults: Defaults = Defaults()
    limits: Limits = Limits()
    log_answers: bool = True  # a line in the router's log for each
    api_keys: tuple[SecretStr, ...] = ()
    api_key_variable: str = "CASCADE_API_KEYS"  # of the environment: more keys, comma separated

    def pair(self) -> model_pair.ModelPair:
        """Return what the pair shares; raises StartupError for one that cannot be served."""
        return model_pair.load_pair(self.drafter.source(), self.expert.source())

    def observe(self, generator: Generator, sink: MetricBackend) -> Observed:
        """Return the generator with its answers counted in `sink`, logged and traced."""
        metrics = RequestMetrics(sink, model=self.name)
        observers = (metrics, RequestLog()) if self.log_answers else (metrics,)
        return Observed(generator, observers=observers)

    def serving_context(
        self,
        generator: Generator,
        pair: model_pair.ModelPair,
        *,
        ready: Callable[[], bool] = lambda: True,
    ) -> ServingContext:
        """Return what the doors stand on; `ready` says whether the tiers are there."""
        keys = [key.get_secret_value() for key in self.api_keys]
        keys += os.environ.get(self.api_key_variable, "").split(",")
        return ServingContext(
            generator=generator,
            tokenizer=pair.tokenizer,
            models=(self.name,),
            limits=self.limits.for_doors(context_tokens=pair.context_tokens or UNBOUNDED_CONTEXT),
            defaults=self.defaults.for_doors(),
            stop_ids=pair.stop_ids,
            ready=ready,
            api_keys=frozenset(key for key in keys if key),
        )
