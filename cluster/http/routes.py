"""Routes: what the sibling files serve, each function behind the door of its room.

    routes = Routes("/v1/jobs")

    @routes.get("/{job_id}")
    async def one(request: Request) -> Response: ...
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

Handler = Callable[[Request], Awaitable[Response]]
Door = Callable[[Request], None]


class Routes:
    """Collects handlers. A path may hold `{name}`, which the handler finds in `request.path_params`."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._handlers: list[tuple[str, str, Handler]] = []

    def get(self, path: str) -> Callable[[Handler], Handler]:
        return self._of("GET", path)

    def head(self, path: str) -> Callable[[Handler], Handler]:
        return self._of("HEAD", path)

    def post(self, path: str) -> Callable[[Handler], Handler]:
        return self._of("POST", path)

    def delete(self, path: str) -> Callable[[Handler], Handler]:
        return self._of("DELETE", path)

    def _of(self, method: str, path: str) -> Callable[[Handler], Handler]:
        def add(handler: Handler) -> Handler:
            self._handlers.append((method, self._prefix + path, handler))
            return handler

        return add

    def behind(self, door: Door) -> Iterator[tuple[str, Route]]:
        """(method, route) of each: `door` raises before the handler sees the request."""
        for method, path, handler in self._handlers:
            route = Route(path, _guarded(door, handler), methods=[method])
            route.methods = {method}                 # without a HEAD for each GET, which would begin streams that nobody can read
            yield method, route


def _guarded(door: Door, handler: Handler) -> Handler:
    async def pass_door(request: Request) -> Response:
        door(request)
        return await handler(request)

    return pass_door
