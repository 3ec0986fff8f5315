"""Start here: the Ray Serve application, three deployments from one tree of settings.

`serve run cluster/local.yaml` calls `build`. Each deployment wraps a part that also runs without
Ray (`cascade tier`, `cascade router`, `cascade.local`).
"""

# No postponed annotations: Serve reads those of `build` at run time and must find a class.

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
import ray.util
from fastapi import FastAPI
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from ray import serve
from ray.serve.config import BackpressureConfig
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cascade.api.grpc import GenerationServicer
from cascade.api.http import create_app
from cascade.errors import StartupError, Unavailable
from cascade.observability.metric_specs import ENGINE, ROUTER
from cascade.observability.metrics import ServeMetrics
from cascade.observability.request_log import to_serve
from cascade.protocol import services
from cascade.protocol.client import ReplicaClients
from cascade.protocol.services import LeaseTicket
from cascade.protocol.tls import TlsFiles, credentials_of
from cascade.replica.metrics import LoadTracker, keep_reporting, resource_counts
from cascade.replica.options import ReplicaOptions
from cascade.router.leases import HedgedLeases, ServeLeases
from cascade.router.tier_session import TierClient
from cascade.settings import Application, TierSettings
from cascade.v1 import cascade_pb2

if TYPE_CHECKING:
    from cascade.engine.tensor_parallel import RankTask
    from cascade.replica.replica import Replica


logger = logging.getLogger(__name__)

FULL = BackpressureConfig(status_code=429, retry_after_s=1)  # the response when queues are full


class _TierDeployment(ABC):
    """A replica of a tier under Serve. Routers only call `lease`; messages go over gRPC."""

    _replica: "Replica[Any] | None" = None  # until it has started

    async def __init__(
        self, options: ReplicaOptions, bind_host: str, bind_ports: str, tls: TlsFiles | None
    ) -> None:
        to_serve()
        logger.info("Loading torch, then %s", options.model)
        anywhere = bind_host in {"0.0.0.0", "[::]"}  # noqa: S104 - compared, not bound
        self._replica = await self.replica_class().start(
            options,
            address=f"{bind_host}:{bind_ports}",
            advertised_host=ray.util.get_node_ip_address() if anywhere else bind_host,
            credentials=credentials_of(tls),
            launch=_RankOnRay,
        )
        self._load = LoadTracker(self._replica.engine.stats())
        self._reports = asyncio.create_task(keep_reporting(self._replica, ServeMetrics(ENGINE)))

    @staticmethod
    @abstractmethod
    def replica_class() -> "type[Replica[Any]]":
        """Return the replica's class; imported late, since the router's process needs no torch."""

    async def lease(self) -> AsyncGenerator[LeaseTicket]:
        """Grant one session, and return when it is over."""
        assert self._replica is not None, "Serve calls replicas that have started"
        async for ticket in self._replica.lease():
            yield ticket

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the load since the last call; Serve passes it to the autoscaling policy."""
        assert self._replica is not None, "Serve asks replicas that have started"
        return self._load.read(self._replica.engine.stats())

    async def debug_state(self) -> dict[str, int]:
        """Return counts of what this replica holds, for tests that look for leaks."""
        assert self._replica is not None, "Serve calls replicas that have started"
        stats = self._replica.engine.stats()
        return resource_counts(
            leases=len(self._replica.leases),
            sessions=self._replica.num_sessions,
            cache_tokens=stats.cache_tokens_live,
            preemptions=stats.preemptions,
        )

    def check_health(self) -> None:
        """Raise if the engine's thread has ended or hangs; Serve then replaces the replica."""
        if self._replica is not None and not self._replica.alive:
            raise Unavailable(f"the engine of this {self._replica.kind.name} has stopped")

    async def __del__(self) -> None:
        """End the server and the engine after Serve has drained the replica."""
        if self._replica is not None:
            self._reports.cancel()
            await self._replica.stop()


@ray.remote(max_restarts=0)
class Rank:
    """The process of one rank of a sharded model; rank 0 is the replica itself."""

    def run(self, task: "RankTask") -> None:
        """Run the rank until the replica ends."""
        task.run()


class _RankOnRay:
    """A rank in an actor, which takes a bundle of the replica's placement group."""

    def __init__(self, task: "RankTask") -> None:
        group = ray.util.get_current_placement_group()
        assert group is not None, "tiers with engine.tensor_parallel get one"
        bundle = dict(group.bundle_specs[task.rank])
        self._actor: Any = Rank.options(  # pyright: ignore[reportFunctionMemberAccess] - the decorator adds it
            num_cpus=bundle.pop("CPU", 0),
            num_gpus=bundle.pop("GPU", 0),
            memory=bundle.pop("memory", None),
            resources=bundle,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, task.rank),
        ).remote()
        self._end = self._actor.run.remote(task)

    def wait(self) -> None:
        ray.wait([self._end])

    def kill(self) -> None:
        ray.kill(self._actor)


class DrafterDeployment(_TierDeployment):
    """The drafter tier."""

    @staticmethod
    def replica_class() -> "type[Replica[Any]]":
        """Return the drafter."""
        from cascade.drafter.drafter import Drafter  # noqa: PLC0415 - see `_TierDeployment.replica_class`

        return Drafter


class ExpertDeployment(_TierDeployment):
    """The expert tier."""

    @staticmethod
    def replica_class() -> "type[Replica[Any]]":
        """Return the expert."""
        from cascade.expert.expert import Expert  # noqa: PLC0415 - see `_TierDeployment.replica_class`

        return Expert


class RouterDeployment:
    """The HTTP and gRPC APIs and the draft-verify loop."""

    async def __init__(
        self, settings: Application, drafters: DeploymentHandle[Any], experts: DeploymentHandle[Any]
    ) -> None:
        to_serve()
        self._settings = settings
        self._app: FastAPI | None = None
        self._refused = ""  # why the last `user_config` was not taken
        options = settings.router
        pair, credentials = settings.pair(), credentials_of(settings.tls_files)
        self._tiers = [
            TierClient(
                leases=HedgedLeases(
                    ServeLeases(handle, kind=kind, timeout_s=options.lease_timeout_s),
                    after_s=options.lease_hedge_s,
                ),
                clients=ReplicaClients(kind, credentials=credentials),
                max_queued=tier.deployment.max_queued_requests,
                always_there=tier.always_there,
                context_tokens=context_tokens,
            )
            for handle, kind, tier, context_tokens in (
                (drafters, services.DRAFTER, settings.drafter, pair.drafter_context_tokens),
                (experts, services.EXPERT, settings.expert, pair.context_tokens),
            )
        ]
        drafter_tier, expert_tier = self._tiers
        router = options.loop(drafters=drafter_tier, experts=expert_tier)
        # Serve's own checks do not ask whether a router is ready: one without experts must not die.
        self._watch = asyncio.create_task(router.watch())
        self._pair = pair
        observed = settings.observe(router, ServeMetrics(ROUTER), suspects=router.suspects)
        self._context = settings.serving_context(
            observed,
            pair,
            ready=router.ready,
            tier_context=router.context_tokens,
            warnings=lambda: [*router.warnings(), *filter(None, [self._refused])],
            metrics=_node_metrics,
        )
        self._grpc = GenerationServicer(lambda: self._context)
        assert self._context.grammars is not None, "settings make one"
        await self._context.grammars.start()  # before the first request that needs it

    def reconfigure(self, user_config: Any) -> None:
        """Let `defaults` and `limits` of the `user_config` apply to the requests from now on.

        One that is wrong changes nothing: the log and `/health` say so. Raising would make Serve
        stop a replica that works.
        """
        self._refused = ""
        try:
            settings = self._settings.changed(user_config)
            self._context = replace(self._context, **settings.of_requests(self._pair))
        except StartupError as error:
            self._refused = f"Keeping the settings before a user_config that is wrong: {error}"
            logger.warning(self._refused)
        if self._app is not None:
            self._app.state.service = self._context

    async def debug_state(self) -> dict[str, int]:
        """Return counts of what this replica holds."""
        return resource_counts()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the HTTP API."""
        self._app = create_app(
            self._context, add_request_id=False, has_playground=self._settings.playground
        )
        return self._app

    async def Generate(  # noqa: N802 - Serve calls the RPC's name
        self, request: cascade_pb2.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> cascade_pb2.GenerateResponse:
        """Answer a unary call."""
        return await self._grpc.Generate(request, grpc_context)

    async def GenerateStream(  # noqa: N802 - as above
        self, request: cascade_pb2.GenerateStreamRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[cascade_pb2.GenerateStreamResponse]:
        """Answer a streaming call."""
        async with aclosing(self._grpc.GenerateStream(request, grpc_context)) as frames:
            async for frame in frames:
                yield frame

    async def ListModels(  # noqa: N802 - as above
        self, request: cascade_pb2.ListModelsRequest, grpc_context: RayServegRPCContext
    ) -> cascade_pb2.ListModelsResponse:
        """List the models."""
        return await self._grpc.ListModels(request, grpc_context)

    async def Tokenize(  # noqa: N802 - as above
        self, request: cascade_pb2.TokenizeRequest, grpc_context: RayServegRPCContext
    ) -> cascade_pb2.TokenizeResponse:
        """Return the tokens of a prompt."""
        return await self._grpc.Tokenize(request, grpc_context)

    async def Detokenize(  # noqa: N802 - as above
        self, request: cascade_pb2.DetokenizeRequest, grpc_context: RayServegRPCContext
    ) -> cascade_pb2.DetokenizeResponse:
        """Return the text of tokens."""
        return await self._grpc.Detokenize(request, grpc_context)

    async def Check(  # noqa: N802 - as above
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> health_pb2.HealthCheckResponse:
        """Answer `grpc.health.v1`."""
        return await self._grpc.Check(request, grpc_context)

    async def List(  # noqa: N802 - as above
        self, request: Message, grpc_context: RayServegRPCContext
    ) -> Message:
        """Answer `grpc.health.v1` for all names."""
        return await self._grpc.List(request, grpc_context)

    async def Watch(  # noqa: N802 - as above
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse]:
        """Answer `grpc.health.v1` now and after every change."""
        async with aclosing(self._grpc.Watch(request, grpc_context)) as responses:
            async for response in responses:
                yield response

    async def __del__(self) -> None:
        """Close the streams to the tiers."""
        self._watch.cancel()
        for tier in self._tiers:
            await tier.clients.close()
        if self._context.grammars is not None:
            await self._context.grammars.close()


async def _node_metrics() -> bytes:
    """Return what Ray's agent on this node exports: the metrics of all its processes.

    Raises:
        Unavailable: The agent does not answer.
    """
    node_id = ray.get_runtime_context().get_node_id()
    nodes = await asyncio.to_thread(ray.nodes)
    node = next(one for one in nodes if one["NodeID"] == node_id)
    address = node["NodeManagerAddress"]
    host = f"[{address}]" if ":" in address else address
    url = f"http://{host}:{node['MetricsExportPort']}/metrics"
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
            response = await client.get(url)
        return response.raise_for_status().content
    except httpx.HTTPError as error:
        raise Unavailable(f"Ray's metrics agent at {url} does not answer: {error}") from error


def build(args: Application) -> serve.Application:
    """Return the application.

    Raises:
        StartupError: The pair cannot be served.
    """
    args.pair()
    drafter, expert, tls = args.drafter_options(), args.expert.options(), args.tls_files
    drafters = _tier(DrafterDeployment, "Drafter", args.drafter, drafter, tls)
    experts = _tier(ExpertDeployment, "Expert", args.expert, expert, tls)
    options = args.router.deployment.options(environment={"GRPC_VERBOSITY": "NONE"})
    deployment = serve.deployment(name="Router", backpressure_config=FULL)
    router = deployment(serve.ingress()(RouterDeployment))
    return router.options(**options).bind(args, drafters, experts)


def _tier(
    kind: type[_TierDeployment],
    name: str,
    settings: TierSettings,
    replica: ReplicaOptions,
    tls: TlsFiles | None,
) -> serve.Application:
    options = settings.serve_options(environment={"GRPC_VERBOSITY": "NONE"})
    deployment = serve.deployment(name=name, backpressure_config=FULL)(kind)
    where = settings.bind_host, settings.bind_ports
    return deployment.options(**options).bind(replica, *where, tls)
