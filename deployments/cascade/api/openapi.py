"""The OpenAPI description of the HTTP door: bodies as they are parsed, errors as they are sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from cascade.api.schema import Body, ChatBody, CompletionBody

if TYPE_CHECKING:
    from fastapi import FastAPI

_REF = "#/components/schemas/{model}"

_BODIES: tuple[type[Body], ...] = (ChatBody, CompletionBody)

_NULLABLE = ["string", "null"]

_EVENTS = {
    "schema": {"type": "string", "description": "Where `stream` is true: one chunk an event"}
}

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": _NULLABLE},
                "code": {"type": _NULLABLE},
            },
        }
    },
}


def request_body(kind: type[Body]) -> dict[str, Any]:
    """Return what an operation says of its body."""
    schema = {"$ref": _REF.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI) -> None:
    """Give the app its description; it is made once, when somebody asks."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _openapi(app)
        return app.openapi_schema

    app.openapi = openapi


def _openapi(app: FastAPI) -> dict[str, Any]:
    schema = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    _, definitions = models_json_schema(
        [(kind, "validation") for kind in _BODIES], ref_template=_REF
    )
    schema["components"] = {"schemas": definitions["$defs"] | {"Error": _ERROR}}
    content = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    for operation in (one for path in schema["paths"].values() for one in path.values()):
        operation["responses"].pop("422", None)
        operation["responses"]["default"] = {"description": "An error", "content": content}
        if "requestBody" in operation:
            operation["responses"]["200"]["content"]["text/event-stream"] = _EVENTS
    return schema
