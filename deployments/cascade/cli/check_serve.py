"""What is wrong with a Serve YAML though `serve deploy` accepts it, and what it asks for."""

from __future__ import annotations

import inspect
from collections import defaultdict
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from cascade.cli.findings import Check, fail, ok, warn
from cascade.errors import StartupError, wanted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from cascade.settings import Application, TierSettings

IMPORT_PATH = "cascade.app:build"

_LOOPBACK = {"127.0.0.1", "::1", "localhost"}
_PORTS_OF_RAY = {6379: "Ray's GCS", 8265: "Ray's dashboard", 52365: "Ray's agent on each node"}
_WORKER_PORTS = range(10002, 20000)  # by default
_LAST_PORT = 65535
SECRETS = ("KEY", "PASSWORD", "SECRET", "TOKEN")  # at the end of a variable's name


# What reading a document raises where a value is a text instead of a mapping, say.
WRONG_SHAPE = (AttributeError, IndexError, KeyError, TypeError, ValueError)


class YamlLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 - PyYAML's signature
        """Return the mapping."""
        keys: list[Any] = []
        for key_node, _ in node.value:
            keys.append(self.construct_object(key_node, deep=True))
            if keys.count(keys[-1]) > 1:
                message = f"{keys[-1]!r} stands twice, and only the last would count"
                raise yaml.MarkedYAMLError(problem=message, problem_mark=key_node.start_mark)
        return super().construct_mapping(node, deep)


def read(path: Path) -> tuple[list[Any], list[Check]]:
    """Return the documents of a file, or why it cannot be read."""
    try:
        return list(yaml.load_all(path.read_text(), YamlLoader)), []
    except (OSError, UnicodeDecodeError) as error:
        return [], [fail(f"{path} cannot be read: {error}", "give a YAML file")]
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        return [], [fail(f"{path} is not YAML: {problem}", "correct it")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """The ports of a Serve YAML, and what its replicas reserve."""

    http_port: int = 8000
    grpc_port: int = 9000
    resources: Mapping[str, float] = field(default_factory=dict[str, float])  # of all at the start
    # what one node must have for a replica, by the place of its deployment
    replicas: Mapping[str, list[dict[str, float]]] = field(default_factory=dict[str, Any])
    # replicas at the start where a new version starts before the old one stops, by place
    spared: Mapping[str, int] = field(default_factory=dict[str, int])
    drain_s: float = 0  # how long a replica may finish its sessions
    open_doors: Sequence[Check] = ()  # what anybody could read or call


def check_serve(document: Any) -> tuple[list[Check], ServeConfig]:
    """Return what is wrong with a configuration of Serve, and what it asks for."""
    from ray.serve.schema import ServeDeploySchema  # noqa: PLC0415 - takes seconds

    if not isinstance(document, dict) or "applications" not in document:
        fix = f"it needs `applications:` with one of import_path {IMPORT_PATH}"
        return [fail("it is not a Serve YAML", fix)], ServeConfig()
    checks = list(_unknown_keys(document, ServeDeploySchema))
    try:
        schema = ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        return [*checks, *_errors(error)], ServeConfig()
    checks += _doors(schema)
    parts: list[ServeConfig] = []
    open_doors = list(_open_doors(schema))
    for number, application in enumerate(document["applications"]):
        if application["import_path"] == IMPORT_PATH:
            found, config = _check_application(f"applications[{number}]", application, schema)
            checks += found
            parts.append(config)
    if not parts:
        checks.append(warn(f"no application has import_path {IMPORT_PATH}", "others are not read"))
    return checks, ServeConfig(
        http_port=schema.http_options.port,
        grpc_port=schema.grpc_options.port,
        resources=summed((1, part.resources) for part in parts),
        replicas={place: one for part in parts for place, one in part.replicas.items()},
        spared={place: count for part in parts for place, count in part.spared.items()},
        open_doors=[*open_doors, *(one for part in parts for one in part.open_doors)],
        drain_s=max((part.drain_s for part in parts), default=0),
    )


def _errors(error: ValidationError, place: str = "") -> Iterator[Check]:
    for one in error.errors(include_url=False):
        where = _join(place, *one["loc"])
        yield fail(f"{where} {one['msg']}", "see docs/reference.md")


def _join(place: str, *names: str | int) -> str:
    for name in names:
        place += f"[{name}]" if isinstance(name, int) else f"{'.' * bool(place)}{name}"
    return place


def _unknown_keys(value: Any, kind: type[BaseModel], place: str = "") -> Iterator[Check]:
    """Find keys that a model of Serve's ignores, in it and in the models that its fields hold."""
    if not isinstance(value, dict):
        return
    names = {name: field.annotation for name, field in kind.model_fields.items()}
    for key, inner in value.items():
        where = _join(place, str(key))
        if key not in names:
            yield fail(f"{where} is unknown: {wanted(key, names)}", "Serve ignores it; correct it")
            continue
        for model in _models(names[key]):
            if isinstance(inner, list):
                for number, one in enumerate(inner):
                    yield from _unknown_keys(one, model, f"{where}[{number}]")
            else:
                yield from _unknown_keys(inner, model, where)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def _doors(schema: Any) -> Iterator[Check]:
    """Check the ports and what listens on them."""
    http, grpc = schema.http_options, schema.grpc_options
    ports = {"http_options.port": http.port}
    if grpc.grpc_servicer_functions:  # without any, Serve starts no gRPC server
        ports["grpc_options.port"] = grpc.port
    for place, port in ports.items():
        if not 0 < port <= _LAST_PORT:
            yield fail(f"{place} is {port}", f"set one of 1 to {_LAST_PORT}")
        elif port in _PORTS_OF_RAY:
            yield fail(f"{place} is {port}, the port of {_PORTS_OF_RAY[port]}", "set another")
    if len(set(ports.values())) < len(ports):
        yield fail(f"http_options.port and grpc_options.port are both {http.port}", "change one")
    if http.ssl_keyfile_password:
        yield _written_secret("http_options.ssl_keyfile_password")
    if grpc.grpc_servicer_functions:
        yield from _grpc_door(http.host, grpc)


def _open_doors(schema: Any) -> Iterator[Check]:
    """Say which ports of the APIs other machines reach without TLS."""
    http, grpc = schema.http_options, schema.grpc_options
    fix = (
        "put a proxy with TLS before it, as cluster/nginx.conf, and let nobody else reach the port"
    )
    if http.host not in _LOOPBACK and not http.ssl_certfile:
        yield warn(f"HTTP at port {http.port} is open to the network without TLS", fix)
    if grpc.grpc_servicer_functions:
        message = f"gRPC at port {grpc.port} is open to the network without TLS: Serve has none"
        yield warn(message, fix)


def _open_application(settings: Application, schema: Any) -> Iterator[Check]:
    """Say what of an application anybody could call or read."""
    if not settings.api_keys_file and schema.http_options.host not in _LOOPBACK:
        message = f"there is no api_keys_file; without {settings.api_key_variable} anybody may call"
        yield warn(message, "write one with `cascade key NAME >> keys.yaml`")
    tiers = settings.drafter, settings.expert
    if settings.tls is None and any(one.bind_host not in _LOOPBACK for one in tiers):
        message = "without tls (or RAY_USE_TLS=1) prompts cross in clear between routers and tiers"
        yield warn(message, "set tls, as docs/reference.md says")


def _grpc_door(http_host: str, grpc: Any) -> Iterator[Check]:
    for number, name in enumerate(grpc.grpc_servicer_functions):
        module, _, function = name.replace(":", ".").rpartition(".")
        try:
            getattr(import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            place = f"grpc_options.grpc_servicer_functions[{number}]"
            yield fail(f"{place} cannot be imported: {error}", "Serve does not start without it")
    if http_host in _LOOPBACK:
        yield warn(
            f"http_options.host is {http_host}, but gRPC listens on all interfaces at port"
            f" {grpc.port}: Serve has no host for it",
            "remove grpc_options, or close the port to other machines with a firewall",
        )
    elif grpc.enable_reflection:
        yield warn(
            "grpc_options.enable_reflection is true, so whoever connects can list the services",
            "set it to false, unless tools such as grpcurl need it",
        )


def _written_secret(place: str) -> Check:
    fix = "replace that secret, and give the nodes the new one in their environment or in a file"
    return fail(f"{place} holds a secret, which Ray writes to its logs and shows in its API", fix)


def _secrets(place: str, runtime_env: Any) -> Iterator[Check]:
    variables = runtime_env.get("env_vars") if isinstance(runtime_env, dict) else None
    for name in variables or ():
        if str(name).upper().removesuffix("S").endswith(SECRETS):
            yield _written_secret(f"{place}.runtime_env.env_vars.{name}")


def _check_application(
    place: str, application: dict[str, Any], schema: Any
) -> tuple[list[Check], ServeConfig]:
    """Check one application of ours.

    Args:
        place: Of the application in the YAML.
        application: The application as it stands there.
        schema: The whole document, as Serve reads it.
    """
    from cascade.settings import Application  # noqa: PLC0415 - imports torch

    checks = list(_secrets(place, application.get("runtime_env")))
    try:
        settings = Application.model_validate(application.get("args") or {})
    except ValidationError as error:
        return [*checks, *_errors(error, f"{place}.args")], ServeConfig()
    deployments = {
        "Router": (f"{place}.args.router", settings.router.deployment.options()),
        "Drafter": (f"{place}.args.drafter", settings.drafter.serve_options(environment={})),
        "Expert": (f"{place}.args.expert", settings.expert.serve_options(environment={})),
    }
    checks += [
        check for where, options in deployments.values() for check in _refused(where, options)
    ]
    checks += _overrides(place, application.get("deployments") or [], deployments, settings)
    for name, tier in (("Drafter", settings.drafter), ("Expert", settings.expert)):
        where, options = deployments[name]
        checks += _devices(where, options, tier)
        if tier.bind_host in _LOOPBACK and schema.http_options.host not in _LOOPBACK:
            message = f"{where}.bind_host is {tier.bind_host}, where no other node can connect"
            checks.append(warn(message, "leave it out, unless all runs on one machine"))
    for name in ("Router", "Expert"):
        where, options = deployments[name]
        if (options.get("autoscaling_config") or {}).get("min_replicas", 1) == 0:
            message = f"{where} scales to zero; until one has started, requests fail with 503"
            checks.append(warn(message, "set min_replicas: 1 or more"))
    where, options = deployments["Router"]
    if options["ray_actor_options"].get("num_gpus"):
        checks.append(fail(f"{where} reserves a GPU and runs no model", "leave num_gpus out"))
    checks += _times(deployments, settings, schema)
    checks += _tier_ports(deployments, settings, schema)
    checks += _upgrades(deployments, schema)
    drains = [options["graceful_shutdown_timeout_s"] for _, options in deployments.values()]
    replicas = {where: _bundles(options) for where, options in deployments.values()}
    resources = summed(
        (_count(options), amounts)
        for where, options in deployments.values()
        for amounts in replicas[where]
    )
    return checks, ServeConfig(
        resources=resources,
        replicas=replicas,
        spared={
            where: _count(options)
            for where, options in deployments.values()
            if options["max_surge_percent"]
        },
        open_doors=list(_open_application(settings, schema)),
        drain_s=max(drains),
    )


def _refused(place: str, options: dict[str, Any]) -> list[Check]:
    """Let Serve check the options of a deployment, without deploying it."""
    from ray import serve  # noqa: PLC0415 - takes seconds

    deployment: serve.Deployment = serve.deployment(_Nothing)  # pyright: ignore[reportAssignmentType] - its overloads do not say so
    known = inspect.signature(deployment.options).parameters
    try:
        deployment.options(**{k: v for k, v in options.items() if k in known})
    except ValidationError as error:
        return list(_errors(error, place))
    except (ValueError, TypeError) as error:
        return [fail(f"{place}: {error}", "Serve refuses it at deployment; correct it")]
    return []


class _Nothing:
    """Something to deploy."""


def _overrides(
    place: str,
    overrides: list[dict[str, Any]],
    deployments: dict[str, tuple[str, dict[str, Any]]],
    settings: Application,
) -> Iterator[Check]:
    """Check Serve's `deployments` beside `args`, and apply them.

    Args:
        place: Of the application.
        overrides: The list.
        deployments: Places and options of the three, which change.
        settings: The application's.
    """
    seen: set[str] = set()
    for number, one in enumerate(overrides):
        where, name = f"{place}.deployments[{number}]", one["name"]
        if name not in deployments:
            yield fail(f"{where}.name is {name}: {wanted(name, deployments)}", "correct it")
            continue
        if name in seen:
            yield fail(f"{where} is the second for {name}, which replaces the first", "remove one")
        seen.add(name)
        source, before = deployments[name]
        if name == "Router":
            yield from _user_config(where, one.get("user_config"), settings)
        if isinstance(one.get("num_replicas"), int) and before.get("autoscaling_config"):
            yield fail(
                f"{where}.num_replicas has no effect: {name} scales by itself",
                f"leave it out, or the scaling in {source}",
            )
        if "ray_actor_options" in one:
            yield fail(
                f"{where}.ray_actor_options replaces all of {source}.deployment.ray_actor_options,"
                " with the environment that a replica needs",
                "write them there",
            )
            yield from _secrets(
                f"{where}.ray_actor_options", one["ray_actor_options"].get("runtime_env")
            )
        after = before | {key: value for key, value in one.items() if key != "name"}
        if (tier := {"Drafter": settings.drafter, "Expert": settings.expert}.get(name)) and (
            after["max_ongoing_requests"] > (most := tier.options().engine.max_sessions)
        ):
            yield fail(
                f"{where}.max_ongoing_requests is {after['max_ongoing_requests']}, and an engine"
                f" of this tier holds {most} sessions",
                f"change {source}.deployment.max_ongoing_requests instead",
            )
        if after.get("autoscaling_config"):
            after.pop("num_replicas", None)
        if refused := _refused(where, after):
            yield from refused
        else:
            deployments[name] = where, after


def _user_config(place: str, user_config: Any, settings: Application) -> Iterator[Check]:
    """Check what changes running routers, which ignore one that is wrong."""
    try:
        settings.changed(user_config or {})
    except StartupError as error:
        yield fail(f"{place}.user_config: {error}", "routers keep the settings before it")


def _devices(place: str, options: dict[str, Any], tier: TierSettings) -> Iterator[Check]:
    """Compare the GPUs that a replica reserves with what its engine uses."""
    gpus = options["ray_actor_options"].get("num_gpus") or 0
    engine, ranks = tier.engine, tier.engine.tensor_parallel
    chosen = f"engine.device is {engine.device}, engine.path is {engine.path.value}"
    where = f"{place}.deployment.ray_actor_options.num_gpus is {gpus:g}"
    if gpus and (engine.device.startswith("cpu") or engine.path == "lean"):
        yield fail(f"{where}, but the model runs on the CPU: {chosen}", "leave one of them out")
    elif not gpus and (engine.device.startswith("cuda") or engine.path == "captured"):
        yield fail(f"{where}, so the replica sees no GPU, but {chosen}", "set num_gpus: 1")
    elif gpus > 1 and ranks == 1:
        fix = "set num_gpus: 1, or engine.tensor_parallel for a model that needs several"
        yield fail(f"{where}, but a replica uses one GPU", fix)
    elif gpus not in {0, 1} and ranks > 1:
        message = f"{where} of each of {ranks} processes, which need a GPU each"
        yield fail(message, "set num_gpus: 1")


def _times(
    deployments: dict[str, tuple[str, dict[str, Any]]], settings: Application, schema: Any
) -> Iterator[Check]:
    """Compare the longest generation with whatever could end it earlier."""
    longest_s = settings.router.max_generation_s
    for door in ("http_options", "grpc_options"):
        limit_s = getattr(schema, door).request_timeout_s
        if limit_s is not None and limit_s <= longest_s:
            yield fail(
                f"{door}.request_timeout_s is {limit_s:g}, so answers end before"
                f" router.max_generation_s, {longest_s:g}",
                "set it above that",
            )
    for place, options in deployments.values():
        if (drain_s := options["graceful_shutdown_timeout_s"]) <= longest_s:
            yield fail(
                f"{place}: graceful_shutdown_timeout_s is {drain_s:g}, so a replica that is"
                f" replaced loses answers that take router.max_generation_s, {longest_s:g}",
                "set it above that",
            )


def _upgrades(deployments: dict[str, tuple[str, dict[str, Any]]], schema: Any) -> Iterator[Check]:
    """Find deployments that have no replica while a new version replaces the only one."""
    if schema.http_options.host in _LOOPBACK:
        return  # one machine, which may have no room for two
    for name, (place, options) in deployments.items():
        scaling = options.get("autoscaling_config")
        fewest = scaling.get("min_replicas", 1) if scaling else options["num_replicas"]
        if fewest == 1 and not options["max_surge_percent"]:
            yield warn(
                f"{place} may have one replica, and max_surge_percent is 0: there is no {name}"
                " while an upgrade replaces it",
                "leave max_surge_percent out and keep room for one more, or run two",
            )


def _tier_ports(
    deployments: dict[str, tuple[str, dict[str, Any]]], settings: Application, schema: Any
) -> Iterator[Check]:
    """Check the ports of tiers against those of others, and against the number of replicas."""
    taken = _PORTS_OF_RAY | {schema.http_options.port: "http_options"}
    if schema.grpc_options.grpc_servicer_functions:
        taken[schema.grpc_options.port] = "grpc_options"
    needed = dict[range, tuple[int, list[str]]]()
    for name, tier in (("Drafter", settings.drafter), ("Expert", settings.expert)):
        place, options = deployments[name]
        ports = _port_range(tier.bind_ports)
        if 0 in ports:
            continue
        for port, whose in taken.items():
            if port in ports:
                message = f"{place}.bind_ports {tier.bind_ports} has {port}, the port of {whose}"
                yield fail(message, "choose others")
        if any(port in _WORKER_PORTS for port in ports):
            yield warn(
                f"{place}.bind_ports {tier.bind_ports} is among the ports of Ray's workers,"
                f" {_WORKER_PORTS[0]} to {_WORKER_PORTS[-1]}",
                "choose others, or start Ray with --min-worker-port and --max-worker-port",
            )
        scaling = options.get("autoscaling_config")
        most = scaling["max_replicas"] if scaling else options["num_replicas"]
        count, places = 2 * most, [place]  # old replicas keep their ports until sessions end
        for other in [one for one in needed if max(one[0], ports[0]) <= min(one[-1], ports[-1])]:
            others, where = needed.pop(other)
            count, places = count + others, where + places
            ports = range(min(ports[0], other[0]), max(ports[-1], other[-1]) + 1)
        needed[ports] = count, places
    for ports, (count, places) in needed.items():
        if len(ports) < count:
            yield warn(
                f"{' and '.join(places)} share {len(ports)} of bind_ports, and need {count} where"
                " all replicas are on one node, old and new ones during an upgrade",
                f"give {count}, such as {ports[0]}-{ports[0] + count - 1}, unless nodes have fewer",
            )


def _port_range(ports: str) -> range:
    first, _, last = ports.partition("-")
    return range(int(first), int(last or first) + 1)


def _count(options: dict[str, Any]) -> int:
    """Return how many replicas a deployment has at the start."""
    if scaling := options.get("autoscaling_config"):
        return scaling.get("initial_replicas") or scaling.get("min_replicas", 1)
    return options["num_replicas"]


def _bundles(options: dict[str, Any]) -> list[dict[str, float]]:
    """Return what a replica reserves, an entry for each node that it may be spread over."""
    actor = options["ray_actor_options"]
    if bundles := options.get("placement_group_bundles"):
        together = options.get("placement_group_strategy") == "STRICT_PACK"
        return [summed((1, one) for one in bundles)] if together else bundles
    amounts = {"CPU": actor.get("num_cpus", 1), "GPU": actor.get("num_gpus") or 0}
    amounts |= actor.get("resources", {})
    if kind := actor.get("accelerator_type"):
        amounts[f"accelerator_type:{kind}"] = 0.001  # what Ray asks for
    return [summed([(1, amounts)])]


def summed(parts: Iterable[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    """Return the sum of amounts by name, each so many times, without those of 0."""
    total: defaultdict[str, float] = defaultdict(float)
    for times, amounts in parts:
        for name, amount in amounts.items():
            total[name] += times * amount
    return {name: amount for name, amount in total.items() if amount}


def misshapen(error: Exception) -> Check:
    """Return the failure of a document that is read on after a value of an unexpected type."""
    fix = "compare it with the file of its kind in cluster/"
    return fail(f"some value in it is not of the type that belongs there ({error!r})", fix)


def check_config(path: Path) -> tuple[list[Check], ServeConfig]:
    """Read a Serve YAML; return what is wrong with it, and what it asks for."""
    documents, failures = read(path)
    if failures:
        return failures, ServeConfig()
    try:
        checks, config = check_serve(documents[0] if documents else None)
    except WRONG_SHAPE as error:
        checks, config = [misshapen(error)], ServeConfig()
    named = [one._replace(message=f"{path}: {one.message}") for one in checks]
    return named or [ok(f"{path} is valid")], config
