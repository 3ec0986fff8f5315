"""Who may call."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from cascade.errors import Unauthenticated

if TYPE_CHECKING:
    from cascade.ingress.service import Service

_SCHEME = "bearer "


def authenticate(service: Service, authorization: str | None) -> None:
    """Let a caller pass that has one of the service's keys, or any caller if there are none.

    Raises:
        Unauthenticated: The header is absent, of another scheme, or has no known key.
    """
    if not service.api_keys:
        return
    header = authorization or ""
    given = header[len(_SCHEME) :] if header[: len(_SCHEME)].lower() == _SCHEME else ""
    # Compared with each key in full, so that the time taken tells nothing.
    known = [hmac.compare_digest(given.encode(), key.encode()) for key in service.api_keys]
    if not any(known):
        raise Unauthenticated("No valid API key: send `Authorization: Bearer <key>`")
