"""Passes packets between pairs of interfaces, each after a delay: a long cable.

For kernels without netem. `relay.py MILLISECONDS NAME NAME [NAME NAME ...]`, in the namespace of
the interfaces.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from collections import deque
from contextlib import suppress

EVERYTHING = 0x0003  # of Linux's if_ether.h
SOL_PACKET = 263
# Frames come with what segmentation and checksums their sender left to a device, and go on so.
PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 15, 23
LONGEST = 2**17  # bytes of a frame


def tap(interface: str) -> socket.socket:
    """Return a socket that gets every frame that arrives at an interface, and sends from it."""
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(EVERYTHING))
    made.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    made.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**24)
    made.bind((interface, 0))
    made.settimeout(0)
    return made


def main() -> None:
    delay_s, names = float(sys.argv[1]) / 1000, sys.argv[2:]
    taps = [tap(name) for name in names]
    partner = {taps[i]: taps[i ^ 1] for i in range(len(taps))}
    underway = deque[tuple[float, socket.socket, bytes]]()
    sys.stdout.write("relaying\n")
    sys.stdout.flush()
    while True:
        wait_s = max(0.0, underway[0][0] - time.monotonic()) if underway else None
        readable, _, _ = select.select(taps, [], [], wait_s)
        for one in readable:
            with suppress(BlockingIOError):
                while frame := one.recv(LONGEST):
                    underway.append((time.monotonic() + delay_s, partner[one], frame))
        while underway and underway[0][0] <= time.monotonic():
            _, to, frame = underway.popleft()
            with suppress(OSError):  # lost, as at a switch whose queue is full
                to.send(frame)


if __name__ == "__main__":
    main()
