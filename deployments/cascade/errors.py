"""All errors a user can get, as a tree; each has its HTTP status and gRPC code.

    CascadeError
    ├── InvalidRequest            400  INVALID_ARGUMENT
    │   ├── BodyTooLarge          413  INVALID_ARGUMENT
    │   ├── ContextTooLong        400  INVALID_ARGUMENT
    │   └── UnsupportedParameter  400  INVALID_ARGUMENT
    ├── Unauthenticated           401  UNAUTHENTICATED
    ├── ModelNotFound             404  NOT_FOUND
    ├── Overloaded                429  RESOURCE_EXHAUSTED   (retry)
    │   └── QuotaExceeded         429  RESOURCE_EXHAUSTED   (retry)
    ├── DeadlineExceeded          504  DEADLINE_EXCEEDED
    ├── BodyTooSlow               408  DEADLINE_EXCEEDED    (retry)
    ├── Unavailable               503  UNAVAILABLE          (retry)
    │   ├── DrafterUnavailable
    │   └── ExpertUnavailable
    ├── Cancelled                 499  CANCELLED
    ├── Internal                  500  INTERNAL
    │   └── InvalidLogits
    └── StartupError              stops a server or a command before it starts
        ├── UnsupportedModel
        ├── MismatchedPair
        └── InvalidMeasurement

`grpc` is the name of a `grpc.StatusCode`, `http` a status; `type` and `code` are those of OpenAI's
error object.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable


class CascadeError(Exception):
    """The root: the HTTP and gRPC APIs return no other errors."""

    grpc: ClassVar[str] = "INTERNAL"
    http: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = "internal_error"
    retry_after_s: float | None = None
    param: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(CascadeError):
    """The request is wrong; repeating it will not help."""

    grpc, http, type, code = "INVALID_ARGUMENT", 400, "invalid_request_error", None


class BodyTooLarge(InvalidRequest):
    """The body of the request has more bytes than this server reads."""

    http, code = 413, "body_too_large"


class ContextTooLong(InvalidRequest):
    """Prompt and completion together do not fit the context of the models."""

    code = "context_length_exceeded"


class UnsupportedParameter(InvalidRequest):
    """The request has a parameter that this server does not implement."""

    code = "unsupported_parameter"


class Unauthenticated(CascadeError):
    """The call has no valid API key or lease token."""

    grpc, http, type, code = "UNAUTHENTICATED", 401, "authentication_error", "invalid_api_key"


class ModelNotFound(CascadeError):
    """The request names a model that this server does not serve."""

    grpc, http, type, code = "NOT_FOUND", 404, "invalid_request_error", "model_not_found"


class Overloaded(CascadeError):
    """No capacity now; the same request can succeed after `retry_after_s` seconds."""

    grpc, http, type, code = "RESOURCE_EXHAUSTED", 429, "rate_limit_error", "overloaded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QuotaExceeded(Overloaded):
    """The caller has used what its key may use, for now."""

    code = "rate_limit_exceeded"


class DeadlineExceeded(CascadeError):
    """The request took longer than its deadline or the server's maximum generation time."""

    grpc, http, code = "DEADLINE_EXCEEDED", 504, "deadline_exceeded"


class BodyTooSlow(CascadeError):
    """The body of the request did not arrive in time."""

    grpc, http, type, code = "DEADLINE_EXCEEDED", 408, "invalid_request_error", "body_too_slow"


class Unavailable(CascadeError):
    """A part of the server is down; the same request can succeed after `retry_after_s` seconds."""

    grpc, http, code = "UNAVAILABLE", 503, "unavailable"

    def __init__(self, message: str, *, retry_after_s: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DrafterUnavailable(Unavailable):
    """No drafter replica is reachable."""

    code = "drafter_unavailable"


class ExpertUnavailable(Unavailable):
    """No expert replica is reachable."""

    code = "expert_unavailable"


class Cancelled(CascadeError):
    """The caller disconnected."""

    grpc, http, code = "CANCELLED", 499, "cancelled"


class Internal(CascadeError):
    """A bug in this server; the log has the details, the response does not."""


class InvalidLogits(Internal):
    """A model's logits for a text are NaN or infinite, so that no token can be chosen."""

    code = "invalid_logits"


class StartupError(CascadeError):
    """The server or command cannot start."""

    code = "startup_error"


class UnsupportedModel(StartupError):
    """A model that cannot be served exactly."""


class MismatchedPair(StartupError):
    """Drafter and expert do not share a vocabulary."""


class InvalidMeasurement(StartupError):
    """A workload, grid, target or results file that cannot be used."""


def wanted(given: object, valid: Iterable[str]) -> str:
    """Return the end of an error about a mistyped name: all valid ones, then the nearest."""
    names = list(valid)
    spelled = {name.lower().replace("-", "_"): name for name in names}
    near = get_close_matches(str(given).strip().lower().replace("-", "_"), spelled, n=1)
    meant = f"; did you mean `{spelled[near[0]]}`?" if near else ""
    return f"wanted one of {', '.join(names)}{meant}"
