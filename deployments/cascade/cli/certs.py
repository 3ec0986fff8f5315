"""`cascade certs`: certificates for TLS between router and tiers, from an authority made here.

For a cluster that is tried out. In production a service issues and renews them, such as
cert-manager, with the same DNS names.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascade.cli.serve import failed
from cascade.errors import StartupError
from cascade.protocol.tls import ROLES, role_name

if TYPE_CHECKING:
    import trustme

Folder = Annotated[Path, typer.Argument(help="Folder to write into; empty, or not there yet")]


def certs(folder: Folder) -> None:
    """Write a folder for each role, and `all` for a node with several: ca.pem, cert.pem, key.pem.

    The key of the authority that issues them is not kept: make a new set to renew them.
    """
    import trustme  # noqa: PLC0415 - no other command needs it

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise failed(StartupError(f"{folder} is not empty; wanted an empty folder"))
        ca = trustme.CA(organization_name="Speculative Cascades, for trying out")
        for name, roles in (("all", ROLES), *((role, (role,)) for role in ROLES)):
            _write(folder / name, ca, ca.issue_cert(*map(role_name, roles)))
    except OSError as error:
        raise failed(StartupError(f"{folder} cannot be written: {error}")) from error
    typer.echo(f"{folder} has certificates for {', '.join(ROLES)}; see `tls` in docs/reference.md")


def _write(folder: Path, ca: trustme.CA, issued: trustme.LeafCert) -> None:
    folder.mkdir()
    key = folder / "key.pem"
    key.touch(mode=0o600)
    issued.private_key_pem.write_to_path(key)
    ca.cert_pem.write_to_path(folder / "ca.pem")
    for i, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(folder / "cert.pem", append=i > 0)
