"""The node's line between Flower and the worker: each message is answered, or its sender learns why not."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import Status
from flwr.supercore.constant import TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode import start_client_internal
from flwr.supernode.nodestate import NodeStateFactory

from fedeat.flower import supernode


def worker(path: Path, kind: bytes, content: RecordDict | str) -> threading.Thread:
    """A worker that gives one answer, whatever the order."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with listener:
            line, _ = listener.accept()
            with line:
                assert supernode.receive(line)[0] == supernode.ORDER
                supernode.send(line, kind, content)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def record(text: str) -> RecordDict:
    return RecordDict({"text": ConfigRecord({"is": text})})


@pytest.mark.parametrize("refused", [False, True])
def test_a_message_is_answered_by_the_worker_or_with_its_reason(tmp_path: Path, refused: bool) -> None:
    objects = ObjectStoreFactory()
    state: Any = NodeStateFactory(objectstore_factory=objects).state()
    state.set_node_id(7)
    task = state.create_task(task_type=TaskType.CLIENT_APP, run_id=1, fab_hash="")
    message = Message(record("order"), 7, "query")
    start_client_internal._insert_message(message, state, objects.store())
    thread = worker(
        tmp_path / "w", supernode.REFUSAL if refused else supernode.ANSWER, "no disk" if refused else record("answer")
    )
    supernode.answer(tmp_path / "w", state, objects.store(), start_client_internal._insert_message)
    thread.join()
    (reply,) = state.get_messages_legacy(is_reply=True)
    assert reply.metadata.reply_to_message_id == message.metadata.message_id
    assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (7, 1)
    if refused:
        assert reply.error.reason == "no disk"
    else:
        assert reply.content == record("answer")
    # What is kept of it is the answer alone.
    assert message.metadata.message_id not in objects.store()
    assert [found.task_id for found in state.get_tasks(statuses=[Status.FINISHED])] == [task]
    assert state.get_message_processing_duration(message.metadata.message_id) > 0


def test_pauses_are_short_after_a_message_and_grow_with_what_was_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(supernode.time, "monotonic", lambda: clock[0])
    pauses = supernode.Pauses()
    lengths = []
    for waited in (0.0, 0.5, 5.0, 20.0, 1000.0):
        clock[0] = 100.0 + waited
        lengths.append(pauses.length_s(3.0))
    assert lengths == pytest.approx([0.1, 0.1, 0.5, 2.0, 3.0])
    pauses.begin()
    assert pauses.length_s(3.0) == pytest.approx(0.1)
