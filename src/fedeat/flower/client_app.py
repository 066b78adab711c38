"""The ClientApp: hands each message to the node's warm worker, or answers it in this process where there is none.

Flower starts a process for every message on a real node. Importing torch and loading the base model there would cost
more than training, so `fedeat join` keeps a worker that has done both; this process imports neither. In a simulation
processes stay, and the client lives in them.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

if TYPE_CHECKING:
    from fedeat.flower.client import Client

SOCKET = "FEDEAT_WORKER_SOCKET"
"""Environment variable with the path of the worker's socket."""
STATE = "FEDEAT_RESIDUALS"
"""Environment variable with the directory where a simulation's clients keep what error feedback needs."""

app = ClientApp()


@app.train()
@app.query()
def answer(message: Message, context: Context) -> Message:
    """The answer to an order of the server."""
    socket = os.environ.get(SOCKET)
    if socket:
        from fedeat.flower.worker import call

        return Message(call(Path(socket), message.content), reply_to=message)
    settings: Any = context.node_config
    number = settings.get("partition-id")
    partition = int(number) if number is not None else None
    client = _client(str(settings.get("data", "")), str(settings.get("model", "")))
    return Message(client.answer(message.content, partition=partition), reply_to=message)


@functools.cache
def _client(data: str, model: str) -> Client:
    """This process's client: over files that the node names (`data="a.jsonl;b.jsonl"`), or over the configuration's."""
    from fedeat.flower.client import Client, Node

    state = os.environ.get(STATE)
    files = tuple(part for part in data.split(";") if part)
    return Client(Node(data=files, model=model or None, state=Path(state) if state else None))
