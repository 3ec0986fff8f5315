"""What an operator may write under `args:` in the YAML; each default is here or in its branch.

Durations are in seconds, sizes in tokens unless the name says otherwise. Unknown keys are refused.
"""

import os
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Interval
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SecretStr,
    StringConstraints,
    ValidationError,
    model_validator,
)

from cascade import demo
from cascade.api import context
from cascade.api.body import in_plain_words
from cascade.api.chat_format import chat_format
from cascade.api.context import Defaults, ServingContext
from cascade.api.keys import Keys
from cascade.api.playground import evaluation
from cascade.api.text_drafts import check_text_drafts
from cascade.engine import encoder_decoder, model_loader, model_pair, threads, tp_plan
from cascade.engine.settings import EngineSettings, ExpertVocabulary, VocabularyWay
from cascade.errors import InvalidRequest, StartupError
from cascade.observability.metrics import MetricBackend
from cascade.observability.observer import ObservedGenerator, Observer
from cascade.observability.request_log import RequestLog
from cascade.observability.request_metrics import RequestMetrics
from cascade.protocol.tls import TlsFiles
from cascade.replica.autoscaling import Targets
from cascade.replica.options import ReplicaOptions
from cascade.router import router
from cascade.router.tier_session import TierClient
from cascade.speculation.draft_length import DraftLengthTuner
from cascade.structured.checker import GrammarChecker
from cascade.types import (
    DecodingParams,
    DrafterLoss,
    Generator,
    Mode,
    Natural,
    Positive,
    Prices,
    Request,
    Seconds,
)

NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]

UNBOUNDED_CONTEXT = 4096  # of a pair whose configurations name no bound

_KEY = re.compile(r"[^\s,]+")  # of API keys, separated by commas or white space


def _in_order(ports: str) -> str:
    first, _, last = ports.partition("-")
    if not int(first) <= int(last or first) < 2**16 or (last and int(first) == 0):
        raise ValueError(f"got {ports}; wanted one port, or two in order such as 7100-7199")
    return ports


Ports = Annotated[
    str, StringConstraints(pattern=r"^\d{1,5}(-\d{1,5})?$"), AfterValidator(_in_order)
]


class Settings(BaseModel):
    """A branch of the tree."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Deployment(Settings):
    """Replicas and resources, in Ray Serve's own words."""

    num_replicas: Positive = 1
    autoscaling_config: dict[str, Any] | None = None
    ray_actor_options: dict[str, Any] = Field(default_factory=lambda: {"num_cpus": 1})
    placement_group_bundles: list[dict[str, float]] | None = None
    placement_group_strategy: str | None = None
    max_ongoing_requests: Positive = 64
    max_queued_requests: Annotated[int, Ge(-1)] = 256
    graceful_shutdown_timeout_s: Seconds = 660.0
    graceful_shutdown_wait_loop_s: Seconds = 0.5
    health_check_period_s: Seconds = 5.0
    # Replicas of a new version that may run before old ones stop. None: one if there may be just
    # one old replica, whose stop would leave none, and otherwise none.
    max_surge_percent: Annotated[int, Interval(ge=0, le=100)] | None = None

    @model_validator(mode="after")
    def _one_way_to_count(self) -> "Deployment":
        if self.autoscaling_config is not None and "num_replicas" in self.model_fields_set:
            raise ValueError("set num_replicas or autoscaling_config, not both")
        return self

    @property
    def fewest(self) -> int:
        """The replicas that run at all times."""
        if self.autoscaling_config is None:
            return self.num_replicas
        return self.autoscaling_config.get("min_replicas", 1)

    def sharded(self, size: int) -> "Deployment":
        """Return the deployment of replicas that take so many devices of one node.

        Each of their processes gets what the actor options ask for; the replica is the first.
        """
        if size == 1:
            return self
        actor = self.ray_actor_options
        names = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        bundle = {"CPU": 1} | {
            name: actor[option] for name, option in names.items() if option in actor
        }
        if kind := actor.get("accelerator_type"):
            bundle[f"accelerator_type:{kind}"] = 0.001  # what Ray asks for
        bundle |= actor.get("resources", {})
        bundles = [{name: float(amount) for name, amount in bundle.items() if amount}] * size
        placement = {
            "placement_group_bundles": bundles,
            "placement_group_strategy": "STRICT_PACK",
        }
        return self.model_copy(update=placement)

    def options(self, *, environment: dict[str, str] | None = None) -> dict[str, Any]:
        """Return the arguments of Serve's `Deployment.options`; `environment` is the process's."""
        chosen = self.model_dump(exclude_none=True)
        if self.autoscaling_config is not None:
            del chosen["num_replicas"]
        chosen.setdefault("max_surge_percent", surge_percent(self.fewest))
        actor = chosen["ray_actor_options"]
        runtime = actor.get("runtime_env", {})
        variables = (environment or {}) | runtime.get("env_vars", {})
        chosen["ray_actor_options"] = actor | {"runtime_env": runtime | {"env_vars": variables}}
        return chosen


def surge_percent(fewest: int) -> int:
    """Return the default of `max_surge_percent` for a deployment of so many replicas at least.

    Serve rounds up to whole replicas, so that 1 % is one.
    """
    return 1 if fewest <= 1 else 0


class Scaling(Settings):
    """Replicas by their own load (`replica.autoscaling`); a target of zero is ignored."""

    min_replicas: Natural = 1
    max_replicas: Positive
    initial_replicas: Natural | None = None
    upscale_delay_s: NonNegative = 10.0
    downscale_delay_s: NonNegative = 300.0
    downscale_to_zero_delay_s: NonNegative | None = None  # None: downscale_delay_s
    look_back_period_s: Seconds = 20.0
    metrics_interval_s: Seconds = 2.0
    wait_s: NonNegative = 0.05  # of a request until its first pass
    busy: Share = 0.9  # of the time in passes; prevents shrinking, never causes growth
    sessions: Share = 0.75  # of max_ongoing_requests

    def targets(self, *, most_sessions: int) -> Targets:
        """Return the load that a replica with so many sessions at most should have."""
        return Targets(wait_s=self.wait_s, busy=self.busy, sessions=self.sessions * most_sessions)

    def config(self, *, most_sessions: int) -> dict[str, Any]:
        """Return Serve's `autoscaling_config`."""
        targets = self.targets(most_sessions=most_sessions)
        ours = {one.name for one in fields(Targets)}
        return self.model_dump(exclude=ours, exclude_none=True) | {
            "policy": {
                "policy_function": "cascade.replica.autoscaling:TierPolicy",
                "policy_kwargs": asdict(targets),
            }
        }


class ExpertScaling(Scaling):
    """The expert also scales by its backlog and its KV cache."""

    wait_s: NonNegative = 0.2
    backlog: NonNegative = 1.0  # forward passes that the waiting tokens fill
    cache: Share = 0.8  # held by open sessions

    def targets(self, *, most_sessions: int) -> Targets:
        """Return the load that a replica should have."""
        common = super().targets(most_sessions=most_sessions)
        return replace(common, backlog=self.backlog, cache=self.cache)


class TierSettings(Settings):
    """A tier: its model, engine and replicas."""

    shipped: ClassVar[Mapping[str, Path]]  # by name

    model: str = "demo"  # a Hugging Face hub id, a folder, or one that ships: `demo`, `demo-t5`
    revision: str | None = None
    trust_remote_code: bool = False
    engine: EngineSettings = Field(default_factory=EngineSettings)
    deployment: Deployment = Deployment()
    scaling: Scaling | None = None  # instead of the deployment's own number of replicas
    bind_host: str = "0.0.0.0"  # noqa: S104 - routers on other nodes connect; sessions need a lease
    bind_ports: Ports = "0"  # one port, or the range of the replicas of a node; 0: any free one
    connect_timeout_s: Seconds = 10.0
    idle_timeout_s: Seconds = 120.0
    pass_timeout_s: Seconds = 120.0  # of a forward pass, after which the replica counts as hung
    price_per_s: NonNegative | None = None  # of a replica, in any unit that both tiers share

    @model_validator(mode="after")
    def _one_way_to_count(self) -> "TierSettings":
        counted = {"num_replicas", "autoscaling_config"} & self.deployment.model_fields_set
        if self.scaling is not None and counted:
            raise ValueError(f"set scaling or deployment.{counted.pop()}, not both")
        return self

    @model_validator(mode="after")
    def _derived_placement(self) -> "TierSettings":
        typed = {"placement_group_bundles", "placement_group_strategy"}
        if self.engine.tensor_parallel > 1 and typed & self.deployment.model_fields_set:
            raise ValueError(
                f"deployment.{min(typed & self.deployment.model_fields_set)} follows from "
                "engine.tensor_parallel; leave it out, and set what each process of a replica "
                "takes in deployment.ray_actor_options, such as num_gpus: 1"
            )
        return self

    @property
    def placed(self) -> Deployment:
        """The deployment, with a bundle for each process of a replica."""
        return self.deployment.sharded(self.engine.tensor_parallel)

    @property
    def fewest(self) -> int:
        """The replicas that run at all times."""
        return self.deployment.fewest if self.scaling is None else self.scaling.min_replicas

    @property
    def always_there(self) -> bool:
        """Whether at least one replica runs at all times."""
        return self.fewest > 0

    @property
    def model_path(self) -> str:
        """Return the hub id or the folder of the model."""
        return str(self.shipped.get(self.model, self.model))

    def source(self) -> model_pair.ModelSource:
        """Return where the model comes from."""
        return model_pair.ModelSource(
            name=self.model_path, revision=self.revision, trust_remote_code=self.trust_remote_code
        )

    def options(self) -> ReplicaOptions:
        """Return what a replica takes."""
        names = {one.name for one in fields(ReplicaOptions)} - {"model", "engine", "expert"}
        engine, gpus = self.engine, self.deployment.ray_actor_options.get("num_gpus") or 1
        return ReplicaOptions(
            model=self.model_path,
            engine=replace(
                engine,
                max_sessions=engine.max_sessions or 2 * self.deployment.max_ongoing_requests,
                gpu_memory_utilization=engine.gpu_memory_utilization * min(gpus, 1),
            ),
            **{name: getattr(self, name) for name in names},
        )

    def serve_options(self, *, environment: dict[str, str]) -> dict[str, Any]:
        """Return the arguments of Serve's `Deployment.options`; `environment` is the process's."""
        options = self.placed.options(environment=self.environment() | environment)
        if self.scaling is None:
            return options
        del options["num_replicas"]
        if self.deployment.max_surge_percent is None:
            options["max_surge_percent"] = surge_percent(self.fewest)
        most = self.deployment.max_ongoing_requests
        return options | {"autoscaling_config": self.scaling.config(most_sessions=most)}

    def environment(self) -> dict[str, str]:
        """Return the variables that a replica's process must start with."""
        reserved = self.deployment.ray_actor_options.get("num_cpus") or 0
        crowded = reserved < self.engine.threads
        return threads.environment(threads=self.engine.threads, crowded=crowded)


class Drafter(TierSettings):
    """The drafter tier."""

    shipped = demo.DRAFTERS

    vocabulary: VocabularyWay = VocabularyWay.AUTO  # how its tokens are said in the expert's


class Expert(TierSettings):
    """The expert tier."""

    shipped = demo.EXPERTS

    scaling: ExpertScaling | None = None  # pyright: ignore[reportIncompatibleVariableOverride] - settings are frozen


@dataclass(frozen=True, slots=True, kw_only=True)
class Router(router.RouterOptions):
    """The router: replicas and the loop."""

    deployment: Deployment = field(default_factory=lambda: Deployment(max_ongoing_requests=512))

    def loop(self, *, drafters: TierClient, experts: TierClient) -> router.Router:
        """Return the loop over two tiers."""
        tuner = DraftLengthTuner(initial_tokens=self.draft_tokens)
        return router.Router(
            drafters=drafters, experts=experts, automatic=tuner.session, options=self
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits(context.Limits):
    """What a request may ask for."""

    context_tokens: Positive | None = None  # pyright: ignore[reportIncompatibleVariableOverride] - frozen; None: the tiers' own
    answers: Positive | None = None  # pyright: ignore[reportIncompatibleVariableOverride] - as above; None: half of a replica's

    def resolve(
        self, *, expert_tokens: int, replica_sessions: int, router_requests: int
    ) -> context.Limits:
        """Return the limits of a router.

        By default one call takes at most half of a replica, so that it does not starve all others;
        and bodies on their way never take more than half of the router's places.

        Args:
            expert_tokens: The context of the expert.
            replica_sessions: That a replica of it holds.
            router_requests: That the router serves at the same time.
        """
        values: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        tokens = min(expert_tokens, self.context_tokens or expert_tokens)
        answers = self.answers or max(1, replica_sessions // 2)
        bodies = min(self.bodies, max(1, router_requests // 2))
        values |= {"context_tokens": tokens, "answers": answers, "bodies": bodies}
        return context.Limits(**values)


class Tls(Settings):
    """PEM files on every node: TLS between routers and tiers. See `protocol.tls`."""

    ca: str  # certificates of the authorities that the other side's may be issued by
    certificate: str  # for drafter.cascade, expert.cascade or router.cascade; it may name all
    key: str
    require_client: bool = True  # tiers serve nobody without the certificate of a router


class Changes(Settings):
    """The `user_config` of the Router: what Serve changes without starting a replica anew."""

    defaults: dict[str, Any] = Field(default_factory=dict)
    limits: dict[str, Any] = Field(default_factory=dict)


class Application(Settings):
    """The whole tree, which `cascade.app:build` takes."""

    name: str = "cascade"  # of the model, for clients
    drafter: Drafter = Drafter()
    expert: Expert = Expert()
    router: Router = Router()
    defaults: Defaults = Defaults()
    limits: Limits = Limits()
    cors: context.Cors = context.Cors()
    playground: bool = True  # `/` is a page to try the server out
    evaluation: str | None = None  # folder of `cascade evaluate --out`, whose curve the page draws
    tls: Tls | None = None  # None: as Ray's own (RAY_USE_TLS), which is off by default
    log_answers: bool = True  # one line per answer in the router's log
    api_keys: tuple[SecretStr, ...] = ()  # refused: see `_no_written_keys`
    api_keys_file: str | None = None  # on the node of each router: `api.keys` has its format
    api_key_variable: str = "CASCADE_API_KEYS"  # of the environment: more keys, separated by commas

    @model_validator(mode="after")
    def _no_written_keys(self) -> "Application":
        """Refuse keys that stand in the YAML: Ray logs it, and shows it to whoever asks its API."""
        actors = [
            part.deployment.ray_actor_options for part in (self.drafter, self.expert, self.router)
        ]
        written = [(one.get("runtime_env") or {}).get("env_vars") or {} for one in actors]
        if self.api_keys or any(self.api_key_variable in one for one in written):
            raise ValueError(
                "API keys in a YAML end up in Ray's logs; replace these keys, and put the new ones"
                f" into the environment variable {self.api_key_variable} of the routers, or into a"
                " file, such as a mounted Secret, that `api_keys_file` names"
            )
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _in_plain_words(
        cls, data: Any, handler: ModelWrapValidatorHandler["Application"]
    ) -> "Application":
        try:
            return handler(data)
        except ValidationError as error:
            raise in_plain_words(error, cls) from None

    def drafter_options(self) -> ReplicaOptions:
        """Return what a drafter takes, which drafts in the expert's tokens."""
        expert = self.expert.source()
        vocabulary = ExpertVocabulary(
            model=expert.name,
            revision=expert.revision,
            trust_remote_code=expert.trust_remote_code,
            way=self.drafter.vocabulary,
        )
        return replace(self.drafter.options(), expert=vocabulary)

    def pair(self) -> model_pair.ModelPair:
        """Return what the two models share.

        Raises:
            StartupError: The pair cannot be served.
        """
        pair = model_pair.load_pair(
            self.drafter.source(),
            self.expert.source(),
            generation_config=self.defaults.generation_config == "auto",
            way=self.drafter.vocabulary,
        )
        defaults = self.defaults.completed(pair.generation.sampling)  # refused before all else
        if pair.vocabulary.way is VocabularyWay.SLEM:
            _check_text_drafts(defaults)
        if pair.start_ids:
            pair = self._with_lengths(pair)
        for tier in (self.drafter, self.expert):
            if tier.engine.tensor_parallel > 1:
                config = model_loader.read_config(**asdict(tier.source()))
                tp_plan.check(tier.model_path, config, size=tier.engine.tensor_parallel)
        return pair

    @property
    def prices(self) -> Prices:
        """Return what a second of a replica costs."""
        return Prices(drafter=self.drafter.price_per_s, expert=self.expert.price_per_s)

    @property
    def tls_files(self) -> TlsFiles | None:
        """Return the files of TLS between router and tiers, if they are set."""
        return None if self.tls is None else TlsFiles(**dict(self.tls))

    def _with_lengths(self, pair: model_pair.ModelPair) -> model_pair.ModelPair:
        """Return a pair of encoder-decoders with the lengths that the engines give them."""
        found: list[encoder_decoder.Lengths] = []
        for tier in (self.drafter, self.expert):
            encoder_decoder.check_settings(tier.engine)
            config = model_loader.read_config(**asdict(tier.source()))
            found.append(encoder_decoder.lengths(config, tier.engine))
        drafter, expert = found
        return replace(
            pair,
            context_tokens=expert.answer,
            drafter_context_tokens=drafter.answer,
            source_tokens=expert.source,
        )

    def observe(
        self,
        generator: Generator,
        backend: MetricBackend,
        *,
        suspects: Callable[[], Mapping[str, int]] = dict,
    ) -> ObservedGenerator:
        """Return the generator with its answers measured in `backend`, logged and traced.

        Args:
            generator: Generates answers.
            backend: Takes their metrics.
            suspects: Returns how many drafters are under suspicion, by the kind of the rule.
        """
        observers: list[Observer] = [
            RequestMetrics(backend, model=self.name, prices=self.prices, suspects=suspects)
        ]
        if self.log_answers:
            observers.append(RequestLog())
        return ObservedGenerator(generator, observers=observers)

    def serving_context(  # noqa: PLR0913 - one parameter for each thing that only a router knows
        self,
        generator: Generator,
        pair: model_pair.ModelPair,
        *,
        ready: Callable[[], bool] = lambda: True,
        tier_context: Callable[[Mode, DrafterLoss], int | None] = context.unknown_context,
        warnings: Callable[[], list[str]] = list,
        metrics: Callable[[], Awaitable[bytes]] = context.no_metrics,
    ) -> ServingContext:
        """Return what the HTTP and gRPC APIs need.

        Args:
            generator: Generates answers.
            pair: What the two models share.
            ready: Returns whether requests can be answered now.
            tier_context: Returns the tokens that the tiers of such a request hold.
            warnings: Returns what is wrong though requests can be answered, a sentence each.
            metrics: Returns metrics in Prometheus' text format.

        Raises:
            StartupError: The API keys or the evaluation cannot be read, or the tokenizer's
                `response_template` is invalid.
        """
        chat_format(pair.tokenizer)  # one that is wrong stops the server, not its requests
        longest = int(pair.generation.sampling.get("max_new_tokens", context.COMPLETION_TOKENS))
        return ServingContext(
            generator=generator,
            tokenizer=pair.tokenizer,
            models=(self.name,),
            **self.of_requests(pair),
            stop_ids=pair.stop_ids,
            text_drafts=pair.vocabulary.way is VocabularyWay.SLEM,
            start_ids=pair.start_ids,
            source_tokens=pair.source_tokens or 0,
            bad_words=pair.generation.bad_words,
            grammars=GrammarChecker(pair.tokenizer),
            completion_tokens=min(longest, context.COMPLETION_TOKENS),
            ready=ready,
            tier_context=tier_context,
            warnings=warnings,
            cors=self.cors,
            metrics=metrics,
            prices=self.prices,
            keys=self._keys(),
            evaluation=None if self.evaluation is None else evaluation.read(self.evaluation),
        )

    def of_requests(self, pair: model_pair.ModelPair) -> dict[str, Any]:
        """Return the fields of a `ServingContext` that may change while it serves.

        Args:
            pair: What the two models share.
        """
        limits = self.limits.resolve(
            expert_tokens=pair.context_tokens or UNBOUNDED_CONTEXT,
            replica_sessions=self.expert.deployment.max_ongoing_requests,
            router_requests=self.router.deployment.max_ongoing_requests,
        )
        return {"limits": limits, "defaults": self.defaults.completed(pair.generation.sampling)}

    def changed(self, user_config: Any) -> "Application":
        """Return the settings with what the Router's `user_config` changes of their values.

        Args:
            user_config: `defaults` and `limits`, each with only some of their fields or absent.

        Raises:
            StartupError: It has something else, or a value that `args` may not have either.
        """
        try:
            changes = Changes.model_validate(user_config)
            parts = {
                name: asdict(getattr(self, name)) | change for name, change in dict(changes).items()
            }
            return Application.model_validate(dict(self) | parts)
        except ValidationError as error:
            wrong = [
                f"{'.'.join(('user_config', *map(str, one['loc'])))} {one['msg']}"
                for one in error.errors(include_url=False, include_input=False)
            ]
            raise StartupError("; ".join(wrong)) from error

    def _keys(self) -> Keys | None:
        """Return the keys of the environment and of the file; None: anyone may call.

        Raises:
            StartupError: A source that the settings name has no key: all callers would be let in.
        """
        variable, path = self.api_key_variable, self.api_keys_file
        plain = _KEY.findall(os.environ.get(variable, ""))
        if not plain and variable != Application.model_fields["api_key_variable"].default:
            raise StartupError(f"`api_key_variable` is {variable}, which has no keys here")
        return Keys(plain, path=path) if plain or path is not None else None


def _check_text_drafts(defaults: Defaults) -> None:
    """Raise StartupError if a request that says nothing could not be served."""
    policy = DecodingParams(rule=defaults.rule, bonus=defaults.bonus)
    try:
        check_text_drafts(
            Request(
                prompt=(),
                policy=policy,
                mode=defaults.mode,
                on_expert_loss=defaults.on_expert_loss,
            )
        )
    except InvalidRequest as error:
        message = error.message.replace("`cascade.", "`defaults.")
        raise StartupError(message) from error
