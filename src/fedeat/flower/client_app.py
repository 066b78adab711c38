"""The ClientApp of simulations, and of nodes that Flower itself runs: answers each message in this process.

`fedeat join` runs nodes with a worker that keeps the base model loaded; there `supernode` asks it, in this one's place.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedeat.flower.client import Client, Node

STATE = "FEDEAT_RESIDUALS"
"""Environment variable with the directory where a simulation's clients keep what error feedback needs."""

app = ClientApp()


@app.train()
@app.query()
def answer(message: Message, context: Context) -> Message:
    """The answer to an order of the server."""
    settings: Any = context.node_config
    number = settings.get("partition-id")
    partition = int(number) if number is not None else None
    client = _client(str(settings.get("data", "")), str(settings.get("model", "")))
    return Message(client.answer(message.content, partition=partition), reply_to=message)


@functools.cache
def _client(data: str, model: str) -> Client:
    """This process's client: over files that the node names (`data="a.jsonl;b.jsonl"`), or over the configuration's."""
    state = os.environ.get(STATE)
    files = tuple(part for part in data.split(";") if part)
    return Client(Node(data=files, model=model or None, state=Path(state) if state else None))
