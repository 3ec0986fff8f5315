"""What is wrong with the files that start a cluster for a Serve YAML: KubeRay's, and `ray up`'s."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from cascade.cli.check_serve import SECRETS, ServeConfig, YamlLoader, check_serve, summed
from cascade.cli.findings import Check, fail, warn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_TOKEN = "RAY_AUTH_MODE=token"  # noqa: S105 - how Ray is told to ask for one
_OPEN = "whoever reaches a node could run programs on it"
_KUBERNETES_UNITS = {"m": 1e-3, "": 1}  # of processors


@dataclass(frozen=True, slots=True)
class NodeType:
    """A kind of node that a cluster may have."""

    name: str
    resources: Mapping[str, float]
    most: int

    def holds(self, needed: Mapping[str, float]) -> bool:
        """Return whether one such node has that much; any type of GPU, where it names none."""
        typed = any(name.startswith("accelerator_type:") for name in self.resources)
        return all(
            self.resources.get(name, 0) >= amount
            or (name.startswith("accelerator_type:") and not typed and self.resources.get("GPU", 0))
            for name, amount in needed.items()
        )

    def room(self, needed: Mapping[str, float]) -> int:
        """Return how many times all such nodes have that much."""
        if not self.holds(needed):
            return 0
        amounts = [(self.resources.get(name, 0), amount) for name, amount in needed.items()]
        return self.most * min((int(has // amount) for has, amount in amounts if has), default=1)

    def __str__(self) -> str:
        return f"{self.name} has {_listed(self.resources)}"


def _listed(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(resources.items()) if amount)


def check_fit(config: ServeConfig, types: Sequence[NodeType]) -> Iterator[Check]:
    """Check that some type of node can hold each replica, and all nodes those at the start."""
    for place, bundles in config.replicas.items():
        for needed in bundles:
            if not any(one.holds(needed) for one in types):
                yield fail(
                    f"{place}: a replica needs {_listed(needed)} on one node; "
                    + "; ".join(map(str, types)),
                    "change ray_actor_options, or the types of nodes",
                )
    named = {name for one in types for name in one.resources}
    total = summed((one.most, one.resources) for one in types)
    for name, amount in sorted(config.resources.items()):
        if name in named and amount > total.get(name, 0):
            yield fail(
                f"the replicas at the start need {amount:g} {name}, and all nodes together have"
                f" {total.get(name, 0):g} at most",
                "allow more nodes, or lower num_replicas or min_replicas",
            )
    for place, count in config.spared.items():
        needed, *more = config.replicas[place]
        room = sum(one.room(needed) for one in types)
        if not more and count <= room < count + 1:
            yield warn(
                f"{place}: a new version starts before the old one stops, and the nodes have room"
                f" for {room} of its replicas at most",
                "allow one more node, or set max_surge_percent: 0 and run two replicas",
            )


def check_ray_service(document: dict[str, Any]) -> Iterator[Check]:
    """Check a RayService of KubeRay: the Serve YAML inside, and the pods around it."""
    try:
        spec = document["spec"]
        cluster = spec["rayClusterConfig"]
        groups = {"headGroupSpec": cluster["headGroupSpec"]} | {
            f"workerGroupSpecs[{number}]": group
            for number, group in enumerate(cluster.get("workerGroupSpecs") or [])
        }
        pods = {name: group["template"]["spec"] for name, group in groups.items()}
        types = [_pod_type(name, group) for name, group in groups.items()]
        serve = yaml.load(spec["serveConfigV2"], YamlLoader)  # noqa: S506 - a safe loader
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        yield fail(f"it is no RayService that can be read ({error!r})", "see cluster/kuberay.yaml")
        return
    except yaml.YAMLError as error:
        yield fail(f"spec.serveConfigV2 is not YAML: {' '.join(str(error).split())}", "correct it")
        return
    found, config = check_serve(serve)
    for check in (*found, *check_fit(config, types)):
        yield check._replace(message=f"spec.serveConfigV2: {check.message}")
    yield from _ray_cluster(cluster, types[0])
    yield from _served_ports(serve, pods["headGroupSpec"])
    for name, pod in pods.items():
        yield from _pod(f"spec.rayClusterConfig.{name}", pod, drain_s=config.drain_s)


def _ray_cluster(cluster: dict[str, Any], head: NodeType) -> Iterator[Check]:
    where = "spec.rayClusterConfig"
    if (cluster.get("authOptions") or {}).get("mode") != "token":
        yield fail(f"{where} asks for no token: {_OPEN}", "set authOptions: {mode: token}")
    elif not cluster.get("rayVersion"):
        yield fail(f"{where}.rayVersion is missing", "KubeRay wants it for authOptions")
    if not cluster.get("gcsFaultToleranceOptions"):
        message = f"{where}.gcsFaultToleranceOptions is missing: all ends when the head restarts"
        yield warn(message, "give it a Redis")
    if head.resources.get("CPU"):
        fix = 'set rayStartParams: {num-cpus: "0"}'
        yield warn(f"{where}.headGroupSpec may get replicas beside Ray's own services", fix)


def _pod(place: str, pod: dict[str, Any], *, drain_s: float) -> Iterator[Check]:
    grace_s = pod.get("terminationGracePeriodSeconds", 30)
    if grace_s <= drain_s:
        yield fail(
            f"{place}: terminationGracePeriodSeconds is {grace_s}, so Kubernetes ends replicas"
            f" before graceful_shutdown_timeout_s, {drain_s:g}",
            "set it above that",
        )
    for container in pod["containers"]:
        for one in container.get("env") or []:
            if one.get("value") and one["name"].endswith(SECRETS):
                message = f"{place}: {one['name']} is written in the file"
                yield fail(message, "take it from a Secret, with valueFrom")


def _served_ports(serve: dict[str, Any], pod: dict[str, Any]) -> Iterator[Check]:
    """Check the names of ports: KubeRay's service has `serve` and those that begin `serve-`."""
    ports = {
        one["containerPort"]: str(one.get("name", "")) for one in pod["containers"][0]["ports"]
    }
    for protocol, default, wanted in (("http", 8000, "serve"), ("grpc", 9000, "serve-grpc")):
        options = serve.get(f"{protocol}_options")
        if options is None and protocol == "grpc":
            continue
        port = (options or {}).get("port", default)
        if not re.match(rf"{wanted.partition('-')[0]}(-|$)", ports.get(port, "")):
            yield fail(
                f"the head's container has no port {port} whose name begins with `serve`, so no"
                f" service leads to {protocol}_options.port",
                f"add {{containerPort: {port}, name: {wanted}}}",
            )


def _pod_type(name: str, group: dict[str, Any]) -> NodeType:
    """Return what Ray finds in a pod, unless `rayStartParams` or `resources` say otherwise."""
    limits = (group["template"]["spec"]["containers"][0].get("resources") or {}).get("limits") or {}
    number, unit = re.fullmatch(r"([\d.]+)(m?)", str(limits.get("cpu", 0))).groups()  # pyright: ignore[reportOptionalMemberAccess] - the caller catches it
    started = group["rayStartParams"]
    custom = yaml.safe_load(yaml.safe_load(started.get("resources", '"{}"')))
    stated = {
        "CPU": started.get("num-cpus", float(number) * _KUBERNETES_UNITS[unit]),
        "GPU": started.get("num-gpus", limits.get("nvidia.com/gpu", 0)),
        **custom,
        **(group.get("resources") or {}),
    }
    resources = {name: float(amount) for name, amount in stated.items()}
    most = group.get("maxReplicas", 1) * group.get("numOfHosts", 1)
    return NodeType(group.get("groupName", name), resources, most)


def check_launcher(document: dict[str, Any]) -> Iterator[Check]:
    """Check a YAML of `ray up` as Ray does, and that its nodes ask for a token."""
    from ray.autoscaler._private.util import prepare_config, validate_config  # noqa: PLC0415 - slow

    try:
        prepared = prepare_config(document)
        validate_config(prepared)
    # Ray's validator raises its own errors, jsonschema's and those of its command line.
    except Exception as error:  # noqa: BLE001 - as above
        yield fail(f"Ray refuses it: {str(error).partition(chr(10))[0]}", "see `ray up --help`")
        return
    mounts = prepared.get("file_mounts") or {}
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        for number, command in enumerate(prepared[name]):
            before, started, _ = command.partition("ray start")
            if started and _TOKEN not in before:
                message = f"{name}[{number}] starts Ray without a token: {_OPEN}"
                yield fail(message, f"begin it with `export {_TOKEN}; `")
    if not any(str(target).endswith("auth_token") for target in mounts):
        fix = "add {~/.ray/auth_token: ~/.ray/auth_token}, and make it before `ray up`"
        yield fail("file_mounts does not bring the token to the nodes", fix)


def node_types(document: dict[str, Any]) -> list[NodeType]:
    """Return the types of nodes of a YAML of `ray up`."""
    return [
        NodeType(
            name,
            one.get("resources") or {},
            1 if name == document["head_node_type"] else one.get("max_workers", 0),
        )
        for name, one in (document.get("available_node_types") or {}).items()
    ]
