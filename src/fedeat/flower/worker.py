"""The warm worker of a node: a process that has imported torch and loaded the base model, asked through a socket.

The socket is a file that only its owner may open (mode 0600 in a directory of mode 0700); nothing listens on the
network. Orders are carried out one after the other. A worker that is killed is started again by `fedeat join`, and the
order is asked again: training depends on the order alone, so the answer is the same to the last bit.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import struct
import sys
import time
import traceback
from pathlib import Path

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fedeat.errors import FedeatError, explanation
from fedeat.flower.supervisor import die_with_parent

_LENGTH = struct.Struct(">cQ")
_MOST_BYTES = 1 << 34
_PATIENCE_S = 300.0
_ATTEMPTS = 3


class WorkerError(FedeatError):
    """The worker could not carry an order out, or is not there."""


def call(path: Path, content: RecordDict) -> RecordDict:
    """The worker's answer to an order; waits for a worker that is being started again.

    Args:
        path: of its socket.
        content: the order.

    Raises:
        WorkerError: the worker says why it cannot, or is not there after five minutes, or died three times over it.
    """
    for attempt in range(_ATTEMPTS):
        with _connected(path) as line:
            try:
                _send(line, b"?", recorddict_to_proto(content).SerializeToString())
                kind, data = _receive(line)
            except (ConnectionError, EOFError):
                if attempt + 1 < _ATTEMPTS:
                    time.sleep(1.0)
                continue
        if kind == b"!":
            raise WorkerError(data.decode("utf-8", "replace"))
        return _parsed(data)
    raise WorkerError(f"the worker died {_ATTEMPTS} times over one order; its log is beside its socket")


@contextlib.contextmanager
def _connected(path: Path):  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            line.connect(str(path))
            break
        except OSError as error:
            line.close()
            if time.monotonic() > deadline:
                raise WorkerError(f"no worker at {path} after {_PATIENCE_S:.0f} s: {error}") from None
            time.sleep(0.2)
    try:
        yield line
    finally:
        line.close()


def serve(path: Path, node: object) -> None:
    """Answers orders until the process ends.

    Args:
        path: of the socket; a file that an earlier worker left there is replaced.
        node: what the node knows of itself, a `fedeat.flower.client.Node`.
    """
    from fedeat.flower.client import Client, Node

    assert isinstance(node, Node)
    client = Client(node)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)  # from its first moment the file is its owner's alone
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen()
    print(f"worker {os.getpid()} listens at {path}", flush=True)
    while True:
        line, _ = listener.accept()
        with line, contextlib.suppress(ConnectionError, EOFError):
            _, data = _receive(line)
            began = time.monotonic()
            try:
                answer = client.answer(_parsed(data))
                _send(line, b"=", recorddict_to_proto(answer).SerializeToString())
                print(f"order carried out in {time.monotonic() - began:.1f} s", flush=True)
            except Exception as error:
                traceback.print_exc()
                _send(line, b"!", _reason(error).encode())


def _reason(error: Exception) -> str:
    if isinstance(error, FedeatError):
        return str(error)
    return explanation(error) or f"{type(error).__name__}: {error}"


def _parsed(data: bytes) -> RecordDict:
    return recorddict_from_proto(ProtoRecordDict.FromString(data))


def _send(line: socket.socket, kind: bytes, data: bytes) -> None:
    line.sendall(_LENGTH.pack(kind, len(data)))
    line.sendall(data)


def _receive(line: socket.socket) -> tuple[bytes, bytes]:
    kind, length = _LENGTH.unpack(_exactly(line, _LENGTH.size))
    if length > _MOST_BYTES:
        raise ConnectionError("a frame of absurd length")
    return kind, _exactly(line, length)


def _exactly(line: socket.socket, count: int) -> bytes:
    found = bytearray()
    while len(found) < count:
        part = line.recv(min(count - len(found), 1 << 20))
        if not part:
            raise EOFError("the other side left")
        found += part
    return bytes(found)


def main() -> None:
    """Starts a worker as `fedeat join` does."""
    parser = argparse.ArgumentParser(prog="python -m fedeat.flower.worker")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--task")
    parser.add_argument("--model")
    parser.add_argument("--share-counts", action="store_true")
    options = parser.parse_args()
    die_with_parent()
    from fedeat.flower.client import Node

    serve(
        options.socket,
        Node(
            data=tuple(options.data),
            task=options.task,
            model=options.model,
            state=options.state / "residuals",
            share_counts=options.share_counts,
        ),
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
