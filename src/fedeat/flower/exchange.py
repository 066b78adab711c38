"""Asks nodes through Flower's grid and collects what they answer.

The loop is our own: it ends when everybody has answered, at the deadline, or a while after enough have. Who a reply is
from follows from the message it answers, which went to one registered node; nothing in a reply can change it. A
SuperLink may be busy, or be killed and come back, while it holds the messages.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from flwr.app import Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from fedeat.flower.supernode import Pauses

_WARNING = 30
_PULL_S = 0.3
DROPPED = "a reply of node %d to %s is dropped: %s"
"""A line of the log."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for answers.

    Attributes:
        deadline_s: > 0, for all of them.
        enough: how many answers start the grace.
        grace_s: >= 0, for the others after that.
    """

    deadline_s: float
    enough: int
    grace_s: float


def ask(
    grid: Grid,
    contents: Mapping[int, RecordDict],
    *,
    kind: str,
    group: str,
    patience: Patience,
    repeatable: bool = False,
    on_answer: Callable[[int], None] = lambda done: None,
) -> dict[int, RecordDict | str]:
    """Sends each node its content and collects what they answer.

    A SuperLink that is killed between noting a message as delivered and delivering it never delivers it again. So where
    the connection to it broke, those who have not answered are sent their content once more; the first answer counts.

    Args:
        grid: Flower's.
        contents: node -> what it is sent.
        kind: Flower's type of the messages.
        group: what Flower shows them under, the round.
        patience: when to stop waiting.
        repeatable: whether a node that gets its content twice gives the same answer twice.
        on_answer: told how many have answered.

    Returns:
        Node -> its answer, or the reason why there is none, in the order of `contents`.
    """
    began = time.monotonic()
    exchange = _Exchange(grid, contents, kind, group, patience)
    with _breaks(grid) as broken:
        exchange.send(contents, until=began + patience.deadline_s)
        enough_since, pauses = None, Pauses()
        while exchange.waiting:
            for reply in _pull(grid, list(exchange.waiting)):
                if exchange.take(reply):
                    on_answer(len(exchange.answers))
            now = time.monotonic()
            if enough_since is None and exchange.good >= patience.enough:
                enough_since = now
            is_over = enough_since is not None and now - enough_since >= patience.grace_s
            if is_over or now - began >= patience.deadline_s:
                break
            if broken.is_set():
                broken.clear()
                if repeatable and exchange.waiting:
                    log(_WARNING, "the connection to the SuperLink broke; who has not answered is asked again")
                    exchange.send(sorted(set(exchange.waiting.values())), until=began + patience.deadline_s)
            if exchange.waiting:
                pauses.sleep(_PULL_S)
    silent = dict.fromkeys(exchange.waiting.values(), f"did not answer within {time.monotonic() - began:.0f} s")
    answers = exchange.answers | silent
    return {node: answers[node] for node in contents}


@dataclass
class _Exchange:
    """Messages under way, and what came back.

    Attributes:
        waiting: message without an answer yet -> the node that it went to; a node that was asked twice has two.
        asked: all messages that were sent.
        answers: node -> its answer, or the reason why there is none.
        good: how many answers are no errors.
    """

    grid: Grid
    contents: Mapping[int, RecordDict]
    kind: str
    group: str
    patience: Patience
    waiting: dict[str, int] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    answers: dict[int, RecordDict | str] = field(default_factory=dict)
    good: int = 0

    def send(self, nodes: Iterable[int], *, until: float) -> None:
        """Sends nodes their content; a busy SuperLink is tried until then."""
        lifetime = self.patience.deadline_s + self.patience.grace_s
        batch = [Message(self.contents[node], node, self.kind, ttl=lifetime, group_id=self.group) for node in nodes]
        taken = _push(self.grid, batch, until)
        self.asked |= taken
        for message in batch:
            node = message.metadata.dst_node_id
            if message.metadata.message_id in taken:
                self.waiting[message.metadata.message_id] = node
            elif node not in self.waiting.values():
                self.answers[node] = "could not be sent the message: its node is not registered any more"

    def take(self, reply: Message) -> bool:
        """Notes a reply; whether its node has answered by it."""
        if problem := self._stray(reply):
            log(_WARNING, DROPPED, reply.metadata.src_node_id, self.group, problem)
            return False
        node = self.waiting.pop(reply.metadata.reply_to_message_id)
        if reply.has_error():
            if node in self.waiting.values():
                return False  # it was sent the same again, and may answer that
            self.answers[node] = f"failed: {str(reply.error.reason)[:300]} (Flower's error {reply.error.code})"
        else:
            self.answers[node] = reply.content
            self.good += 1
        self.waiting = {name: other for name, other in self.waiting.items() if other != node}
        return True

    def _stray(self, reply: Message) -> str:
        """Why a reply counts for nobody; "" where it is waited for."""
        name = reply.metadata.reply_to_message_id
        if name not in self.asked:
            return "it answers no message that was sent"
        if name not in self.waiting:
            return "its message was answered before"
        # An error is the link's, in the node's stead; an answer is the node's that was asked, or nobody's.
        if not reply.has_error() and reply.metadata.src_node_id != self.waiting[name]:
            return "its message went to another node"
        return ""


@contextlib.contextmanager
def _breaks(grid: Grid) -> Iterator[threading.Event]:
    """Set when the connection to the SuperLink breaks, which Flower mends without a word to its caller."""
    broken = threading.Event()
    invoker = getattr(grid, "_retry_invoker", None)
    if invoker is None:  # a simulation's grid, in this process
        yield broken
        return
    before = invoker.on_backoff

    def note(state: Any) -> None:
        if isinstance(state.exception, httpx.NetworkError | httpx.RemoteProtocolError):
            broken.set()
        if before is not None:
            before(state)

    invoker.on_backoff = note
    try:
        yield broken
    finally:
        invoker.on_backoff = before


def _push(grid: Grid, batch: list[Message], until: float) -> set[str]:
    """Sends messages and returns the names of those that were taken.

    A SuperLink that is busy, or was killed while it took them, is sent them again until then: a message that it has
    already keeps its name, and counts once.
    """
    while True:
        try:
            return set(grid.push_messages(batch))
        except httpx.HTTPStatusError as error:
            if error.response.status_code < 500 or time.monotonic() > until:
                raise
            log(_WARNING, "the SuperLink answered with %d; sent again", error.response.status_code)
        except ObjectPushError as error:
            if time.monotonic() > until:
                raise
            log(_WARNING, "the SuperLink took a part of the messages; sent again: %s", str(error)[:200])
        time.sleep(_PULL_S)


def _pull(grid: Grid, names: list[str]) -> list[Message]:
    """The replies that are there; none while one of them cannot be read, whose sender then misses the deadline."""
    try:
        return list(grid.pull_messages(names))
    except httpx.HTTPStatusError as error:
        if error.response.status_code < 500:
            raise
        # A busy SuperLink whose database was locked for a moment; the replies are still there.
        log(_WARNING, "the SuperLink answered with %d; asked again", error.response.status_code)
        return []
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        log(_WARNING, "a reply could not be read: %s: %s", type(error).__name__, str(error)[:200])
    found: list[Message] = []
    for name in names:  # one by one, so that one sender's damage is its own
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, IndexError):
            found += grid.pull_messages([name])
    return found
