"""Asks a SuperLink on this machine to register nodes and to run federations."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import ListRunsRequest, RegisterNodeRequest, StartRunRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedeat.errors import FedeatError
from fedeat.flower import server_app

THIN_APP = """# A Flower app whose code is the installed fedeat:
#     flwr run examples/flower-app --run-config 'config="/path/of/my.toml" directory="/path/of/runs/my"' --stream

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedeat"
version = "1.0.0"
description = "A fedeat federation; the code is what is installed"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedeat"

[tool.flwr.app.components]
serverapp = "fedeat.flower.server_app:app"
clientapp = "fedeat.flower.client_app:app"

[tool.flwr.app.config]
config = ""
directory = ""
"""
"""A Flower app of one file that points at the installed package."""
_FINISHED = "finished"


def open_client(address: str, ca: Path | None) -> ControlHttpClient:
    """A line to a SuperLink.

    Args:
        address: HOST:PORT.
        ca: what proves it; None for plaintext.
    """
    return ControlHttpClient.from_server_address(
        server_address=address,
        insecure=ca is None,
        root_certificates=None if ca is None else ca.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="fedeat")],
    )


def register(client: ControlHttpClient, name: str, public_key: bytes) -> int:
    """Registers a node; its id.

    Raises:
        FedeatError: the SuperLink refuses.
    """
    try:
        reply = client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))
    except httpx.HTTPError as error:
        raise FedeatError(f"node {name} could not be registered: {_text(error)}") from None
    return int(reply.node_id)


def submit(client: ControlHttpClient, config_toml: str, directory: Path) -> int:
    """Submits a federation to be run on the SuperLink's machine; the run's number.

    Args:
        client: of the SuperLink.
        config_toml: the configuration.
        directory: the run's, on that machine.

    Raises:
        FedeatError: the SuperLink cannot be reached, or refuses.
    """
    content, _ = build_fab_from_files({"pyproject.toml": THIN_APP.encode()})
    settings: Any = {"config": config_toml, "directory": str(directory)}
    request = StartRunRequest(
        fab=fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {})),
        override_config=user_config_to_proto(settings),
    )
    try:
        reply = client.StartRun(request)
    except httpx.HTTPError as error:
        raise FedeatError(f"the run could not be submitted: {_text(error)} Is fedeat serve running here?") from None
    if not reply.HasField("run_id"):
        raise FedeatError("the SuperLink did not start the run; its log says why.")
    return int(reply.run_id)


def follow(client: ControlHttpClient, run: int, directory: Path, tell: Callable[[int], None]) -> None:
    """Waits until a run has ended.

    Args:
        client: of the SuperLink.
        run: its number.
        directory: the run's, on this machine.
        tell: told how many rounds are done.

    Raises:
        FedeatError: the run failed; the message is the server's.
    """
    timings = directory / "timings.jsonl"
    while True:
        if timings.is_file():
            tell(timings.read_bytes().count(b"\n"))
        try:
            status = client.ListRuns(ListRunsRequest(run_id=run)).run_dict[run].status
        except httpx.HTTPError:  # the SuperLink is being started again
            time.sleep(1.0)
            continue
        if status.status == _FINISHED:
            break
        time.sleep(1.0)
    failure = directory / server_app.FAILURE
    if failure.is_file():
        raise FedeatError(json.loads(failure.read_text(encoding="utf-8"))["error"])
    if status.sub_status != "completed":
        raise FedeatError(
            f"the run ended as {status.sub_status!r}: {status.details or 'its process died'}. The same command goes on "
            "from the last finished round."
        )


def _text(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"{error.response.status_code} {error.response.text[:300]}"
    return f"{type(error).__name__}: {error}."
