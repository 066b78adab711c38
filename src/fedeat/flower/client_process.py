"""The process that carries one message to a node's worker, in the place of Flower's `flwr-clientapp`.

Flower would unpack the code that came with the run and import the ClientApp from it. A node of this package runs what
is installed on it and nothing else: the code is not even unpacked, whoever sent it.

Flower starts this for every message, so it is run as a file (`python -P client_process.py`) and imports neither torch
nor this package, whose import would cost more than a round of a small model.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

SOCKET = "FEDEAT_WORKER_SOCKET"
"""Environment variable with the path of the worker's socket."""
ORDER, ANSWER, REFUSAL = b"?", b"=", b"!"
"""What a frame on the socket holds."""

_FRAME = struct.Struct(">cQ")
_MOST_BYTES = 1 << 34
_PATIENCE_S = 300.0
_ATTEMPTS = 3

app = ClientApp()


@app.train()
@app.query()
def answer(message: Message, context: Context) -> Message:
    """The worker's answer to an order of the server."""
    return Message(call(Path(os.environ[SOCKET]), message.content), reply_to=message)


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
    """Runs Flower's own process with this ClientApp."""
    from flwr.supernode.cli import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    def nothing(*arguments: Any, **options: Any) -> None:
        return None

    replaced: Any = run_clientapp
    replaced.install_from_fab = nothing
    replaced.get_project_dir = nothing
    replaced.get_load_client_app_fn = lambda **options: lambda *run: app
    flwr_clientapp()


if __name__ == "__main__":
    main()
