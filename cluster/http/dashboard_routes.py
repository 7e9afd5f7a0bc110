"""The dashboard's files. They hold no data, so their door is open; what they show comes through the ops door.

Read once, at the start: only files that are in the folder then can be asked for, by their exact name.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvbank.cluster.http.app import Front
from kvbank.cluster.http.routes import Routes
from kvbank.errors import NotFound

FOLDER = Path(__file__).resolve().parent / "dashboard"
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
         ".svg": "image/svg+xml"}


def routes(front: Front) -> Routes:
    """`/dashboard`, its files, and whether a page has to ask for a key."""
    made = Routes()
    files = {path.name: (path.read_bytes(), TYPES[path.suffix]) for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}
    tags = {name: f'"{hashlib.sha256(data).hexdigest()[:24]}"' for name, (data, _) in files.items()}

    def send(request: Request, name: str) -> Response:
        if name not in files:
            raise NotFound("the dashboard has no such file")
        data, kind = files[name]
        headers = {"ETag": tags[name], "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == tags[name]:
            return Response(status_code=304, headers=headers)
        return Response(data, headers={**headers, "Content-Type": kind})

    @made.get("/dashboard")
    @made.get("/dashboard/")
    async def page(request: Request) -> Response:
        return send(request, "index.html")

    @made.get("/dashboard/door")
    async def door(_request: Request) -> Response:
        keys = front.api_keys() if callable(front.api_keys) else front.api_keys
        return JSONResponse({"sign_in": bool(keys)})

    @made.get("/dashboard/{name}")
    async def file(request: Request) -> Response:
        return send(request, request.path_params["name"])

    return made
