"""Writes every packet of a network namespace to standard output until it is interrupted."""

from __future__ import annotations

import socket
import sys

EVERYTHING = 0x0003  # of Linux's if_ether.h


def main() -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(EVERYTHING)) as tap:
        sys.stderr.write("capturing\n")
        sys.stderr.flush()
        while True:
            sys.stdout.buffer.write(tap.recv(2**16))
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
