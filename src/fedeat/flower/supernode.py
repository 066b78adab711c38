"""Flower's SuperNode, which carries messages to the node's worker itself, in the place of Flower's `flwr-clientapp`.

Flower would start a process for each message, unpack the code that came with the run and import the ClientApp from it.
A node of this package runs what is installed on it and nothing else: the code is not even unpacked, whoever sent it. So
no process need be started, nothing of the node listens on the network, and what a message costs is carrying it.

It is run as a file (`python -P supernode.py`) and imports neither torch nor this package, which would take more memory
than all the rest of it.
"""

from __future__ import annotations

import argparse
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode, Status, SubStatus
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

ORDER, ANSWER, REFUSAL = b"?", b"=", b"!"
"""What a frame on the socket holds."""

_FRAME = struct.Struct(">cQ")
_MOST_BYTES = 1 << 34
_PATIENCE_S = 300.0
_ATTEMPTS = 3


class Pauses:
    """How long to wait before the SuperLink is asked again: a tenth of what was waited already, within limits.

    So it is asked seldom, and what is waited in vain is small beside what is waited for.
    """

    _LEAST_S = 0.1
    _SHARE = 0.1

    def __init__(self) -> None:
        """The waiting begins."""
        self._since = time.monotonic()

    def begin(self) -> None:
        """The waiting begins anew."""
        self._since = time.monotonic()

    def length_s(self, longest_s: float) -> float:
        """Of the next pause."""
        return min(longest_s, max(self._LEAST_S, self._SHARE * (time.monotonic() - self._since)))

    def sleep(self, seconds: float) -> None:
        """As `time.sleep`, but no longer than the next pause."""
        time.sleep(self.length_s(seconds))


def answer(worker: Path, state: Any, store: Any, insert: Callable[[Message, Any, Any], None]) -> None:
    """Has the worker answer the message that has just arrived, and puts the answer where Flower looks for it.

    Args:
        worker: path of its socket.
        state: of Flower's node; holds the message.
        store: holds the message's content.
        insert: Flower's way to put a message into both.
    """
    for task in state.get_tasks(statuses=[Status.PENDING]):
        state.finish_task(task.task_id, SubStatus.STOPPED, "no process is started for it")
    for message in state.get_messages_legacy(is_reply=False):
        name = message.metadata.message_id
        state.record_message_processing_start(name)
        try:
            parts = [tree.object_id for tree in iterate_object_tree(store.get_object_tree(name))]
            whole: Any = inflate_object_from_contents(name, {part: store.get(part) for part in parts})
            reply = Message(call(worker, whole.content), reply_to=message)
        except Exception as error:  # whatever it is, the server learns of it and the node goes on
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message)
        finally:
            store.delete(name)
        state.record_message_processing_end(name)
        insert(reply, state, store)


def call(path: Path, content: RecordDict) -> RecordDict:
    """The worker's answer to an order; waits for a worker that is being started again.

    Args:
        path: of its socket.
        content: the order.

    Raises:
        RuntimeError: the worker says why it cannot, or is not there after five minutes, or died three times over it.
    """
    for _ in range(_ATTEMPTS):
        with _connected(path) as line:
            try:
                send(line, ORDER, content)
                kind, data = receive(line)
            except (ConnectionError, EOFError):
                time.sleep(1.0)  # it died over this order, or before it; it is started again
                continue
        if kind == REFUSAL:
            raise RuntimeError(data.decode("utf-8", "replace"))
        return parsed(data)
    raise RuntimeError(f"the worker died {_ATTEMPTS} times over one order; its log is beside its socket")


def send(line: socket.socket, kind: bytes, content: RecordDict | str) -> None:
    """Writes a frame."""
    is_text = isinstance(content, str)
    data = content.encode() if is_text else recorddict_to_proto(content).SerializeToString()
    line.sendall(_FRAME.pack(kind, len(data)))
    line.sendall(data)


def receive(line: socket.socket) -> tuple[bytes, bytes]:
    """Reads a frame: what it holds, and its bytes.

    Raises:
        EOFError: the other side left.
        ConnectionError: it announces an absurd length.
    """
    kind, length = _FRAME.unpack(_exactly(line, _FRAME.size))
    if length > _MOST_BYTES:
        raise ConnectionError("a frame of absurd length")
    return kind, _exactly(line, length)


def parsed(data: bytes) -> RecordDict:
    """The records of a frame."""
    return recorddict_from_proto(ProtoRecordDict.FromString(data))


def _connected(path: Path) -> socket.socket:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            line.connect(str(path))
            return line
        except OSError as error:
            line.close()
            if time.monotonic() > deadline:
                raise RuntimeError(f"no worker at {path} after {_PATIENCE_S:.0f} s: {error}") from None
            time.sleep(0.2)


def _exactly(line: socket.socket, count: int) -> bytes:
    found = bytearray()
    while len(found) < count:
        part = line.recv(min(count - len(found), 1 << 20))
        if not part:
            raise EOFError("the other side left")
        found += part
    return bytes(found)


def main() -> None:
    """Connects to the SuperLink and carries messages until the process ends."""
    parser = argparse.ArgumentParser(prog="python -P supernode.py")
    parser.add_argument("--superlink", required=True)
    parser.add_argument("--worker", type=Path, required=True)
    parser.add_argument("--ca", type=Path)
    parser.add_argument("--key", type=Path)
    options = parser.parse_args()
    # Here, for the worker takes from this module how frames are read, and needs none of these.
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supernode import start_client_internal as flower
    from flwr.supernode.nodestate import NodeStateFactory

    key: Any = None if options.key is None else load_ssh_private_key(options.key.read_bytes(), None)
    pauses, send_replies = Pauses(), flower._push_messages

    def answer_and_send(state: Any, object_store: Any, **carriers: Any) -> None:
        answer(options.worker, state, object_store, flower._insert_message)
        send_replies(state=state, object_store=object_store, **carriers)
        pauses.begin()

    replaced: Any = flower
    # Flower's loop uses of `time` that it sleeps, three seconds whenever there is no message.
    replaced.time, replaced._push_messages = pauses, answer_and_send
    flower.start_client_internal(
        state_factory=NodeStateFactory(objectstore_factory=ObjectStoreFactory()),
        server_address=options.superlink,
        node_config={},
        root_certificates=None if options.ca is None else options.ca.read_bytes(),
        insecure=options.ca is None,
        authentication_keys=None if key is None else (key, key.public_key()),
        isolation="process",  # so that Flower starts none
    )


if __name__ == "__main__":
    main()
