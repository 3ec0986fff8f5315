"""Faults: a replica is killed, hangs, slows down or loses its connections."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Sequence

    from tests.chaos.cluster import Replica

_PIDFD_GETFD = 438  # the system call's number, the same on every architecture
NICE = 19
_LOOPBACK = "127.0.0.1"  # where the chaos cluster's tiers bind, and nothing of Ray's in a replica


def kill(replica: Replica) -> None:
    """Kill a replica's process."""
    with suppress(ProcessLookupError):
        os.kill(replica.pid, signal.SIGKILL)


def lower_priority(replicas: Sequence[Replica]) -> None:
    """Lower the priority of running replicas, so that new ones start in time on busy cores."""
    for one in replicas:
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            for thread in psutil.Process(one.pid).threads():
                os.setpriority(os.PRIO_PROCESS, thread.id, NICE)


@contextmanager
def frozen(replica: Replica) -> Generator[None]:
    """Stop a process, as when its machine hangs: its sockets stay open."""
    os.kill(replica.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(replica.pid, signal.SIGCONT)


@asynccontextmanager
async def slowed(replica: Replica, *, share: float, period_s: float = 0.2) -> AsyncGenerator[None]:
    """Let a process run only for a share of the time."""

    async def throttle() -> None:
        while True:
            with frozen(replica):
                await asyncio.sleep((1 - share) * period_s)
            await asyncio.sleep(share * period_s)

    throttling = asyncio.create_task(throttle())
    try:
        yield
    finally:
        throttling.cancel()
        await asyncio.gather(throttling, return_exceptions=True)


def cut(replica: Replica, routers: Sequence[Replica]) -> int:
    """Cut the gRPC connections from routers to a replica; return how many there were."""
    ports = {
        one.laddr.port
        for one in psutil.Process(replica.pid).net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.laddr.ip.endswith(_LOOPBACK)
    }
    connections = [
        (router.pid, one.fd)
        for router in routers
        for one in psutil.Process(router.pid).net_connections("tcp")
        if one.raddr and one.raddr.port in ports
    ]
    for pid, number in connections:
        _shut(pid, number)
    return len(connections)


def _shut(pid: int, number: int) -> None:
    """Shut a socket of another process down, both ways."""
    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(pid)
    try:
        own = libc.syscall(_PIDFD_GETFD, process, number, 0)
        if own < 0:
            raise OSError(ctypes.get_errno(), f"cannot take socket {number} of process {pid}")
        with socket.socket(fileno=own) as taken:
            taken.shutdown(socket.SHUT_RDWR)
    finally:
        os.close(process)
