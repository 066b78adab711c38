"""A Flower grid in this process whose nodes are functions: strategies and engines are tested without a network.

Needs the extra `flower`; without it `tests/conftest.py` leaves this directory out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

Node = Callable[[Message], Message | None]


class LocalGrid(Grid):
    """Sends a message by calling the node's function; None is a node that never answers, an exception an error reply.

    Attributes:
        sent: every message pushed.
        received: every reply pulled.
    """

    def __init__(self, nodes: Mapping[int, Node], names: Mapping[int, str] | None = None) -> None:
        self.nodes = dict(nodes)
        self.names = dict(names or {})
        self.sent: list[Message] = []
        self.received: list[Message] = []
        self._waiting: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        """Nothing depends on it."""

    @property
    def run(self) -> Any:
        """None."""
        return None

    def create_message(self, *arguments: Any, **options: Any) -> Message:
        """Flower's old way, which nothing here uses."""
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        """All nodes, in no useful order."""
        return list(self.nodes)[::-1]

    def get_nodes(self) -> list[NodeInfo]:
        """All nodes with their names."""
        return [NodeInfo(node_id=node, name=self.names.get(node, "")) for node in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Calls each node at once."""
        ids = []
        for message in messages:
            name = f"message-{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = name
            self.sent.append(message)
            ids.append(name)
            try:
                answer = self.nodes[message.metadata.dst_node_id](message)
            except Exception as error:
                answer = Message(Error(1, repr(error)), reply_to=message)
                answer.metadata.__dict__["_src_node_id"] = 1  # as Flower does: the link answers for the node
            if answer is not None:
                self._waiting[name] = answer
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies that are there, the last first."""
        found = [self._waiting.pop(name) for name in list(message_ids)[::-1] if name in self._waiting]
        self.received += found
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push and pull without waiting."""
        return self.pull_messages(self.push_messages(messages))


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sends messages, which Flower sets in the processes it starts."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def local_grid() -> type[LocalGrid]:
    """The grid's class."""
    return LocalGrid


@pytest.fixture
def reply() -> Callable[..., Message]:
    """Makes a reply of records."""

    def make(message: Message, **records: Any) -> Message:
        return Message(RecordDict(records), reply_to=message)

    return make
