"""Certificates of a test's own authority, one for each role."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade.protocol.tls import TlsFiles, role_name

if TYPE_CHECKING:
    from pathlib import Path

    import trustme


def write_certificate(
    folder: Path, ca: trustme.CA, *names: str, trusts: trustme.CA | None = None
) -> TlsFiles:
    """Write a certificate for DNS names over what the folder holds; return its files.

    Args:
        folder: Where to write.
        ca: Issues it.
        names: Of the certificate.
        trusts: Whose certificates the holder accepts; by default those of `ca`.
    """
    folder.mkdir(exist_ok=True)
    issued = ca.issue_cert(*names)
    (trusts or ca).cert_pem.write_to_path(folder / "ca.pem")
    for i, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(folder / "cert.pem", append=i > 0)
    issued.private_key_pem.write_to_path(folder / "key.pem")
    return TlsFiles(
        ca=str(folder / "ca.pem"),
        certificate=str(folder / "cert.pem"),
        key=str(folder / "key.pem"),
    )


def write_role(folder: Path, ca: trustme.CA, role: str) -> TlsFiles:
    """Write the certificate of a role; return its files."""
    return write_certificate(folder / role, ca, role_name(role))
