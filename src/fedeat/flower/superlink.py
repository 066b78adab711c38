"""Flower's SuperLink with a door for nodes alone: other machines reach the paths of the fleet and nothing else.

In this Flower nodes, those who submit code, and the processes that run it all use one port, and whoever submits code
need not log in. So what comes from another machine may only be a node's request; submitting is for this machine.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.middleware import Middleware

from fedeat.flower.supervisor import die_with_parent

FLEET = "/v1/fleet/"
Scope = MutableMapping[str, Any]
Asgi = Callable[[Scope, Any, Any], Awaitable[None]]


class FleetOnly:
    """Refuses every request from another machine but a node's."""

    def __init__(self, app: Asgi) -> None:
        """The application behind the door."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Passes a request on, or answers it with 403."""
        if scope["type"] != "lifespan" and not _allowed(scope):
            body = b"fedeat: from other machines only nodes are served; submit runs on the server itself\n"
            headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": body})
            return
        await self._app(scope, receive, send)


def _allowed(scope: Scope) -> bool:
    host = (scope.get("client") or ("", 0))[0]
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    return local or (scope["type"] == "http" and str(scope.get("path", "")).startswith(FLEET))


def main() -> None:
    """Starts a SuperLink with Flower's own options."""
    die_with_parent()
    from flwr.superlink import extensions
    from flwr.superlink.cli import flower_superlink

    extensions.get_middleware = lambda: (Middleware(FleetOnly),)
    flower_superlink()


if __name__ == "__main__":
    main()
