"""The services of the gRPC API as Ray Serve's proxies serve them: `grpc_servicer_functions`.

A proxy parses messages itself, and answers one that it cannot parse with the status UNKNOWN. These
functions make it pass on an `Unreadable` instead, which `GenerationServicer` refuses. Imported by
proxies, so nothing else of this package is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2_grpc

from cascade.v1 import cascade_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A message of a client that is none of its type."""

    reason: str


def add_GenerationServiceServicer_to_server(  # noqa: N802 - as in generated code
    servicer: Any, server: Any
) -> None:
    """Serve the completions."""
    cascade_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, _Careful(server))  # pyright: ignore[reportArgumentType] - a server by the methods that are called


def add_HealthServicer_to_server(  # noqa: N802 - as in generated code
    servicer: Any, server: Any
) -> None:
    """Serve `grpc.health.v1`."""
    health_pb2_grpc.add_HealthServicer_to_server(servicer, _Careful(server))


class _Careful:
    """A server whose handlers get an `Unreadable` for what cannot be parsed."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: tuple[Any, ...]) -> None:
        for one in handlers:
            one._method_handlers = _careful(one._method_handlers)  # noqa: SLF001 - as Serve's own server changes them
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, name: str, handlers: Mapping[str, Any]) -> None:
        self._server.add_registered_method_handlers(name, _careful(handlers))


def _careful(handlers: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: one._replace(request_deserializer=partial(_parse, one.request_deserializer))
        for name, one in handlers.items()
    }


def _parse(parse: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return parse(data)
    except DecodeError as error:
        return Unreadable(f"{len(data)} bytes are no message of this call: {error}")
