"""Every error a user can meet, as one small tree; each leaf knows its three codes.

    CascadeError
    ├── InvalidRequest            400  INVALID_ARGUMENT
    │   ├── ContextTooLong        400  INVALID_ARGUMENT
    │   └── UnsupportedParameter  400  INVALID_ARGUMENT
    ├── Unauthenticated           401  UNAUTHENTICATED
    ├── ModelNotFound             404  NOT_FOUND
    ├── Overloaded                429  RESOURCE_EXHAUSTED   (retry)
    ├── DeadlineExceeded          504  DEADLINE_EXCEEDED
    ├── Unavailable               503  UNAVAILABLE          (retry)
    │   ├── DrafterUnavailable
    │   └── ExpertUnavailable
    ├── Cancelled                 499  CANCELLED
    ├── Internal                  500  INTERNAL
    └── StartupError              what stops a server before it serves
        ├── InvalidSettings
        ├── UnsupportedModel
        ├── MismatchedPair
        └── InvalidMeasurement

`grpc` is the name of a `grpc.StatusCode`, `http` a status, `type` and `code` the words of OpenAI's
error object.
"""

from __future__ import annotations

from typing import ClassVar


class CascadeError(Exception):
    """The root: nothing else crosses a door of this server."""

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
    """The request cannot be served as it stands; repeating it will not help."""

    grpc, http, type, code = "INVALID_ARGUMENT", 400, "invalid_request_error", None


class ContextTooLong(InvalidRequest):
    """Prompt and answer together do not fit the context of the pair."""

    code = "context_length_exceeded"


class UnsupportedParameter(InvalidRequest):
    """A parameter that would change the text and that this server does not implement."""

    code = "unsupported_parameter"


class Unauthenticated(CascadeError):
    """No valid key or lease token came with the call."""

    grpc, http, type, code = "UNAUTHENTICATED", 401, "authentication_error", "invalid_api_key"


class ModelNotFound(CascadeError):
    """The request names a model that this server does not serve."""

    grpc, http, type, code = "NOT_FOUND", 404, "invalid_request_error", "model_not_found"


class Overloaded(CascadeError):
    """No room now; the same request can succeed after `retry_after_s` seconds."""

    grpc, http, type, code = "RESOURCE_EXHAUSTED", 429, "rate_limit_error", "overloaded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(CascadeError):
    """The request took longer than its deadline or the server's maximum generation time."""

    grpc, http, code = "DEADLINE_EXCEEDED", 504, "deadline_exceeded"


class Unavailable(CascadeError):
    """A part of the server is not there now; the same request can succeed after `retry_after_s`."""

    grpc, http, code = "UNAVAILABLE", 503, "unavailable"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DrafterUnavailable(Unavailable):
    """No drafter replica answers."""

    code = "drafter_unavailable"


class ExpertUnavailable(Unavailable):
    """No expert replica answers."""

    code = "expert_unavailable"


class Cancelled(CascadeError):
    """The caller left."""

    grpc, http, code = "CANCELLED", 499, "cancelled"


class Internal(CascadeError):
    """A defect of ours; the log has the details, the answer has none."""


class StartupError(CascadeError):
    """The server refuses to start, and says why."""

    code = "startup_error"


class InvalidSettings(StartupError):
    """Settings that contradict themselves or the machine."""


class UnsupportedModel(StartupError):
    """A model that cannot be served exactly."""


class MismatchedPair(StartupError):
    """Drafter and expert do not share a vocabulary."""


class InvalidMeasurement(StartupError):
    """A workload, grid, target or results that cannot be measured or read as they stand."""
