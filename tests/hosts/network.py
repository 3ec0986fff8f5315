"""Hosts on one machine: network namespaces on a bridge, whose links are long and can be cut.

The machine itself is on the bridge too, as the host of clients. Nothing leads out of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

SWITCH = "cascade-switch"  # the namespace of the bridge
BRIDGE = "bridge"
CLIENT = "10.213.77.1"
NETWORK = 24  # bits
APART_MS = 5.0  # from host to host, one way


def ip(*words: str) -> None:
    """Run `ip`; raises CalledProcessError with what it said."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)  # noqa: S603, S607 - our own words; found by PATH


@dataclass(frozen=True, kw_only=True)
class Host:
    """A namespace with one address."""

    name: str
    address: str
    port: str  # where its cable is plugged into the switch

    def command(self, *words: str) -> list[str]:
        """Return a command that runs on the host."""
        return ["ip", "netns", "exec", self.name, *words]

    @contextmanager
    def cut(self) -> Generator[None]:
        """Let nothing through to or from the host, silently, as when a switch fails."""
        ip("-n", SWITCH, "link", "set", self.port, "nomaster")
        try:
            yield
        finally:
            ip("-n", SWITCH, "link", "set", self.port, "master", BRIDGE)


@contextmanager
def hosts(*names: str) -> Generator[Sequence[Host]]:
    """Make a host for each name, in order of the addresses after the client's."""
    made = [
        Host(name=f"cascade-{name}", address=f"10.213.77.{i}", port=f"p{i}")
        for i, name in enumerate(names, start=2)
    ]
    relay: subprocess.Popen[bytes] | None = None
    try:
        ip("netns", "add", SWITCH)
        ip("-n", SWITCH, "link", "add", BRIDGE, "type", "bridge")
        ip("-n", SWITCH, "link", "set", BRIDGE, "up")
        ip("link", "add", "cascade0", "type", "veth", "peer", "name", "c1", "netns", SWITCH)
        ip("address", "add", f"{CLIENT}/{NETWORK}", "dev", "cascade0")
        ip("link", "set", "cascade0", "up")
        _plug("c1")
        for host in made:
            ip("netns", "add", host.name)
            ip("-n", host.name, "link", "set", "lo", "up")
            near, far = _ends(host)
            ip(*("-n", host.name, "link", "add", "eth0", "type", "veth"), *_peer(near))
            ip("-n", host.name, "address", "add", f"{host.address}/{NETWORK}", "dev", "eth0")
            ip("-n", host.name, "link", "set", "eth0", "up")
            ip("-n", SWITCH, "link", "add", far, "type", "veth", "peer", "name", host.port)
            for end in (near, far):
                ip("-n", SWITCH, "link", "set", end, "up")
            _plug(host.port)
        if made:
            relay = _relay([end for host in made for end in _ends(host)])
        yield made
    finally:
        if relay is not None:
            relay.kill()
            relay.wait()
        for words in (
            ("link", "delete", "cascade0"),
            *(("netns", "delete", name) for name in (*(host.name for host in made), SWITCH)),
        ):
            subprocess.run(["ip", *words], check=False, capture_output=True)  # noqa: S603, S607 - as above


def _ends(host: Host) -> tuple[str, str]:
    """Return the two ends of a host's cable that the relay joins: at the host, at the switch."""
    return host.port.replace("p", "n"), host.port.replace("p", "f")


def _relay(ends: Sequence[str]) -> subprocess.Popen[bytes]:
    """Join the ends of cables; a packet between hosts passes two of them."""
    script = str(Path(__file__).with_name("relay.py"))
    relay = subprocess.Popen(  # noqa: S603 - our own words
        ["ip", "netns", "exec", SWITCH, sys.executable, script, str(APART_MS / 2), *ends],  # noqa: S607 - by PATH
        stdout=subprocess.PIPE,
    )
    assert relay.stdout is not None
    assert relay.stdout.readline() == b"relaying\n"
    return relay


def _peer(port: str) -> tuple[str, ...]:
    return ("peer", "name", port, "netns", SWITCH)


def _plug(port: str) -> None:
    ip("-n", SWITCH, "link", "set", port, "master", BRIDGE, "up")


def unavailable() -> str:
    """Return why this machine cannot have hosts; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with hosts():
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces: {getattr(error, 'stderr', None) or error}"
