"""TLS between router and tiers: each side presents a certificate that the other's CA has issued.

Addresses of replicas change, so certificates name roles instead: `drafter.cascade`,
`expert.cascade` and `router.cascade`. A router asks for the name of the tier that it calls, and a
tier serves only routers. Where Ray's own TLS is on (`RAY_USE_TLS=1`) and the settings name no
files, its files are used as Ray uses them: they name hosts, and any holder may call.

Files are read again when they change. Streams that are open stay so.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import grpc

from cascade.changing_file import file_stamp
from cascade.errors import StartupError, Unauthenticated

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

ROUTER = "router"
ROLES = (ROUTER, "drafter", "expert")

Pem: TypeAlias = tuple[bytes, bytes, bytes]  # the CA's certificates, our certificate, our key


def role_name(role: str) -> str:
    """Return the DNS name that the certificate of a role has."""
    return f"{role}.cascade"


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Paths of PEM files on the node of each process."""

    ca: str  # certificates of the authorities that the other side's may be issued by
    certificate: str  # our own, and those between it and the authority
    key: str
    require_client: bool = True  # routers must present a certificate
    names_roles: bool = True  # else the certificates name hosts

    @classmethod
    def of_ray(cls) -> TlsFiles | None:
        """Return the files of Ray's own TLS, or None where it is off.

        Raises:
            StartupError: It is on, and the environment names not all its files.
        """
        if os.environ.get("RAY_USE_TLS", "0").lower() not in {"1", "true"}:
            return None
        names = ("RAY_TLS_CA_CERT", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY")
        missing = [name for name in names if not os.environ.get(name)]
        if missing:
            raise StartupError(f"RAY_USE_TLS is set and {' and '.join(missing)} is not")
        ca, certificate, key = (os.environ[name] for name in names)
        return cls(ca=ca, certificate=certificate, key=key, names_roles=False)


class Credentials:
    """The credentials of one process, from files that may change."""

    def __init__(self, files: TlsFiles) -> None:
        """Read the files.

        Raises:
            StartupError: They cannot be read, or are no certificates with their key.
        """
        self.files = files
        self._lock = threading.Lock()  # servers ask for changes on gRPC's threads
        self._seen = self._stamps()
        try:
            self._pem = self._read()
        except (OSError, ValueError) as error:
            raise StartupError(f"`tls` cannot be used: {error}") from error

    def server(self) -> grpc.ServerCredentials:
        """Return a server's credentials, which follow the files."""
        return grpc.dynamic_ssl_server_credentials(
            self._server_configuration(),
            self._server_configuration,  # asked at each new connection
            require_client_authentication=self.files.require_client,
        )

    def channel(self) -> grpc.ChannelCredentials:
        """Return a client's credentials, as the files are now."""
        ca, certificate, key = self.current()
        return grpc.ssl_channel_credentials(ca, key, certificate)

    def channel_options(self, role: str) -> tuple[tuple[str, str], ...]:
        """Return the options with which a client asks for the name of a role."""
        if not self.files.names_roles:
            return ()
        return (("grpc.ssl_target_name_override", role_name(role)),)

    def check_client(self, names: Sequence[bytes]) -> None:
        """Check the names in the certificate of a client that calls a tier.

        Raises:
            Unauthenticated: They are not those of a router.
        """
        if not (self.files.names_roles and self.files.require_client):
            return
        wanted = role_name(ROUTER)
        if wanted.encode() not in names:
            found = ", ".join(name.decode(errors="replace") for name in names) or "none"
            raise Unauthenticated(
                f"the client's certificate is for {found}; only that of {wanted} may call a tier"
            )

    def current(self) -> Pem:
        """Return the contents of the files; the last that were usable, if they are not now."""
        with self._lock:
            stamps = self._stamps()
            if stamps != self._seen:
                self._seen = stamps
                try:
                    self._pem = self._read()
                    logger.info("Read new certificates from %s", self.files.certificate)
                except (OSError, ValueError) as error:
                    logger.warning("Keeping the certificates read before: %s", error)
            return self._pem

    def _server_configuration(self) -> grpc.ServerCertificateConfiguration:
        ca, certificate, key = self.current()
        return grpc.ssl_server_certificate_configuration([(key, certificate)], ca)

    def _stamps(self) -> tuple[tuple[int, int] | None, ...]:
        return tuple(map(file_stamp, (self.files.ca, self.files.certificate, self.files.key)))

    def _read(self) -> Pem:
        files = self.files
        ca, certificate, key = (
            Path(path).read_bytes() for path in (files.ca, files.certificate, files.key)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_verify_locations(files.ca)
        except ssl.SSLError as error:
            raise ValueError(f"{files.ca} has no certificate of an authority: {error}") from error
        try:
            context.load_cert_chain(files.certificate, files.key, password=_no_password)
        except ssl.SSLError as error:
            raise ValueError(
                f"{files.certificate} and {files.key} are no certificate and its key: {error}"
            ) from error
        return ca, certificate, key


def credentials_of(files: TlsFiles | None) -> Credentials | None:
    """Return what this process presents, by default with the files of Ray's TLS; None: without TLS.

    Raises:
        StartupError: The files cannot be used.
    """
    files = files or TlsFiles.of_ray()
    return None if files is None else Credentials(files)


def _no_password() -> str:
    """Refuse an encrypted key, instead of asking the terminal."""
    raise ValueError("the key is encrypted; give one that is not, readable by this user alone")
