"""A page to try the server out, at `/`: it calls the API as any other client does.

One HTML file and ES modules without a build step. Nothing is loaded from elsewhere, and no inline
script or style is allowed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi.responses import FileResponse
from starlette.staticfiles import StaticFiles

if TYPE_CHECKING:
    from fastapi import FastAPI
    from fastapi.responses import Response
    from starlette.types import Scope

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


def install(app: FastAPI) -> None:
    """Serve the page at `/` and its files under `/playground`."""

    async def page() -> Response:
        return FileResponse(FOLDER / "index.html", headers=HEADERS)

    app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)(page)
    app.mount("/playground", _Files(directory=FOLDER))
