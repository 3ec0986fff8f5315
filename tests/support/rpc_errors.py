"""Reads the details of failed gRPC calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from google.rpc import error_details_pb2, status_pb2

from cascade.protocol.grpc_status import DETAILS_KEY

if TYPE_CHECKING:
    from collections.abc import Iterable

    import grpc


def status_of(metadata: Iterable[tuple[str, Any]] | None) -> status_pb2.Status:
    """Return the status with details in trailing metadata."""
    return status_pb2.Status.FromString(cast("bytes", dict(metadata or ())[DETAILS_KEY]))


def error_info(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    """Return the reason, domain and metadata of a failed call."""
    info = error_details_pb2.ErrorInfo()
    assert status_of(error.trailing_metadata()).details[0].Unpack(info)
    return info
