"""A page to try the server out, at `/`: it calls the API as any other client does.

One HTML file and ES modules without a build step. Nothing is loaded from elsewhere, and no inline
script or style is allowed.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fastapi import FastAPI
    from starlette.types import Scope

    from cascade.api.playground.evaluation import Evaluation

FOLDER = Path(__file__).parent

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


class _Files(StaticFiles):
    """The files of the page, without the code that serves them."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Return a file."""
        return await super().get_response("" if path.endswith(".py") else path, scope)

    def file_response(self, *args: Any, **options: Any) -> Response:
        """Return a file with the headers of the page."""
        response = super().file_response(*args, **options)
        response.headers.update(HEADERS)
        return response


def install(
    app: FastAPI, *, evaluation: Callable[[], Evaluation | None], dependencies: Sequence[Any]
) -> None:
    """Serve the page at `/` and its files under `/playground`.

    Args:
        app: The HTTP API.
        evaluation: Returns the curve that the page draws, if there is one.
        dependencies: Of the route of the curve: who may see it.
    """

    async def page() -> Response:
        return FileResponse(FOLDER / "index.html", headers=HEADERS)

    async def curve() -> Response:
        found = evaluation()
        if found is None:
            return Response(status_code=204, headers=HEADERS)
        return Response(found.model_dump_json(), media_type="application/json", headers=HEADERS)

    route = partial(app.api_route, methods=["GET", "HEAD"], include_in_schema=False)
    route("/")(page)
    route("/playground/evaluation", dependencies=dependencies)(curve)
    app.mount("/playground", _Files(directory=FOLDER))
