"""What nodes are asked is answered, or there is a reason why not; a SuperLink that is busy or killed loses nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from fedeat.flower import exchange
from fedeat.flower.exchange import Patience, ask

PATIENT = Patience(deadline_s=60.0, enough=4, grace_s=0.0)
NODES = (907, 12, 450, 33)
Node = Callable[[Message], Message | None]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_PULL_S", 0.0)


def content(number: int) -> RecordDict:
    return RecordDict({"number": ConfigRecord({"is": number})})


def double(message: Message) -> Message:
    return Message(content(2 * int(message.content["number"]["is"])), reply_to=message)


def asked(grid: Any, patience: Patience = PATIENT, **options: Any) -> dict[int, int | str]:
    """Asks the nodes 0, 1, 2 and 3 in their order; what each answered."""
    contents = {node: content(i) for i, node in enumerate(NODES)}
    answers = ask(grid, contents, kind=MessageType.TRAIN, group="5", patience=patience, **options)
    return {node: answer if isinstance(answer, str) else answer["number"]["is"] for node, answer in answers.items()}


def test_answers_come_in_the_order_of_the_contents(local_grid: Any) -> None:
    done: list[int] = []
    answers = asked(local_grid(dict.fromkeys(NODES, double)), on_answer=done.append)
    assert list(answers.items()) == [(907, 0), (12, 2), (450, 4), (33, 6)]
    assert done == [1, 2, 3, 4]


def test_failures_and_silence_have_their_reasons(local_grid: Any) -> None:
    def broken(message: Message) -> Message:
        raise RuntimeError("no disk")

    def silent(message: Message) -> None:
        return None

    grid = local_grid({907: double, 12: broken, 450: silent, 33: double})
    answers = asked(grid, Patience(60.0, 2, 0.0))
    assert (answers[907], answers[33]) == (0, 6)
    assert str(answers[12]).startswith("failed: RuntimeError")
    assert str(answers[450]).startswith("did not answer within 0 s")
    # An error is no answer that starts the grace.
    unfinished = asked(local_grid({907: double, 12: broken, 450: silent, 33: silent}), Patience(0.2, 2, 0.0))
    assert unfinished[33] == "did not answer within 0 s"


def test_a_reply_counts_only_for_the_node_that_was_asked(local_grid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = local_grid(dict.fromkeys(NODES, double))
    pull = grid.pull_messages

    def forged(names: list[str]) -> list[Message]:
        """Node 12 answers in the place of node 907, before it and after it, and a message that nobody sent."""
        replies = pull(names)
        for name in ("message-0", "message-99"):
            order = Message(content(0), 907, MessageType.TRAIN)
            order.metadata.__dict__["_message_id"] = name
            lie = Message(content(-1), reply_to=order)
            lie.metadata.__dict__["_src_node_id"] = 12
            replies = [lie, *replies, lie]
        return replies

    monkeypatch.setattr(grid, "pull_messages", forged)
    assert asked(grid) == {907: 0, 12: 2, 450: 4, 33: 6}


def test_a_busy_superlink_is_sent_messages_again_and_asked_again(
    local_grid: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = local_grid(dict.fromkeys(NODES, double))
    counts: Counter[str] = Counter()

    def busy(name: str) -> None:
        """Every second call finds the database locked, and one is killed while it takes messages."""
        honest = getattr(grid, name)

        def call(argument: Any) -> Any:
            counts[name] += 1
            if counts[name] == 1:
                request = httpx.Request("POST", "http://localhost")
                raise httpx.HTTPStatusError("locked", request=request, response=httpx.Response(500, request=request))
            if name == "push_messages" and counts[name] == 2:
                raise ObjectPushError("a", 1, "killed in between")
            return honest(argument)

        monkeypatch.setattr(grid, name, call)

    busy("push_messages")
    busy("pull_messages")
    assert asked(grid) == {907: 0, 12: 2, 450: 4, 33: 6}
    assert counts == {"push_messages": 3, "pull_messages": 2}
    assert len(grid.sent) == len(NODES)


@pytest.mark.parametrize("repeatable", [True, False])
def test_a_message_that_a_killed_superlink_lost_is_sent_again(
    repeatable: bool, local_grid: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Node 12's order is lost, and the answer of node 450."""
    orders: Counter[int] = Counter()

    def lost_once(node: int) -> Node:
        def answer(message: Message) -> Message | None:
            orders[node] += 1
            return None if orders[node] == 1 and node in (12, 450) else double(message)

        return answer

    grid = local_grid({node: lost_once(node) for node in NODES})
    grid._retry_invoker = SimpleNamespace(on_backoff=None)
    honest = grid.pull_messages

    def pull(names: list[str]) -> list[Message]:
        if grid._retry_invoker.on_backoff is not None:
            grid._retry_invoker.on_backoff(SimpleNamespace(exception=httpx.ConnectError("refused")))
        return list(honest(names))

    monkeypatch.setattr(grid, "pull_messages", pull)
    answers = asked(grid, PATIENT if repeatable else Patience(0.2, 4, 0.0), repeatable=repeatable)
    if repeatable:
        assert answers == {907: 0, 12: 2, 450: 4, 33: 6}
        assert orders == {907: 1, 12: 2, 450: 2, 33: 1}
    else:
        assert [node for node, answer in answers.items() if isinstance(answer, str)] == [12, 450]
        assert set(orders.values()) == {1}
    assert grid._retry_invoker.on_backoff is None


def test_who_is_not_registered_is_not_waited_for(local_grid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = local_grid(dict.fromkeys(NODES, double))
    honest = grid.push_messages

    def push(messages: Any) -> list[str]:
        def is_known(message: Message) -> bool:
            message.metadata.__dict__["_message_id"] = "unknown"
            return bool(message.metadata.dst_node_id != 450)

        known = [message for message in messages if is_known(message)]
        taken = iter(honest(known))
        return [next(taken) if message in known else "" for message in messages]

    monkeypatch.setattr(grid, "push_messages", push)
    answers = asked(grid)
    assert answers.pop(450) == "could not be sent the message: its node is not registered any more"
    assert answers == {907: 0, 12: 2, 33: 6}
