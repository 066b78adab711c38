"""The server's door: nodes from anywhere, everything else from this machine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fedeat.flower.superlink import FleetOnly


def status(path: str, host: str | None, kind: str = "http") -> int:
    async def behind(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": kind, "path": path, "client": (host, 5) if host else None}
    asyncio.run(FleetOnly(behind)(scope, None, send))
    return int(sent[0]["status"])


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "127.8.9.1"])
@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/runtime/acquire-task", "/v1/fleet/pull-messages"])
def test_this_machine_may_do_everything(host: str, path: str) -> None:
    assert status(path, host) == 200


@pytest.mark.parametrize("host", ["10.0.0.7", "2001:db8::1", "not an address", None])
def test_other_machines_reach_the_fleet_alone(host: str | None) -> None:
    assert status("/v1/fleet/pull-messages", host) == 200
    for path in ("/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/health", "/v1/fleet", "//v1/fleet/x"):
        assert status(path, host) == 403
    assert status("/v1/fleet/pull-messages", host, kind="websocket") == 403
