"""The warm worker of a node: a process that has imported torch and loaded the base model, asked through a socket.

The socket is a file that only its owner may open (mode 0600 in a directory of mode 0700); nothing listens on the
network. Orders are carried out one after the other. A worker that is killed is started again by `fedeat join`, and the
order is asked again: training depends on the order alone, so the answer is the same to the last bit. Where it draws
fresh noise too (`privacy`), an update is on disk before it is sent (`given`), and is sent again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import time
import traceback
from pathlib import Path

from fedeat.errors import FedeatError, explanation
from fedeat.flower.client import Client, Node
from fedeat.flower.supernode import ANSWER, REFUSAL, parsed, receive, send
from fedeat.flower.supervisor import die_with_parent


def serve(path: Path, node: Node) -> None:
    """Answers orders until the process ends.

    Args:
        path: of the socket; a file that an earlier worker left there is replaced.
        node: what the node knows of itself.
    """
    client = Client(node)
    listener = _listen(path)
    print(f"worker {os.getpid()} listens at {path}", flush=True)
    while True:
        line, _ = listener.accept()
        with line, contextlib.suppress(ConnectionError, EOFError):
            _, data = receive(line)
            print("order taken", flush=True)
            began = time.monotonic()
            try:
                send(line, ANSWER, client.answer(parsed(data)))
                print(f"order carried out in {time.monotonic() - began:.1f} s", flush=True)
            except Exception as error:  # whatever it is, the server learns of it and the worker goes on
                traceback.print_exc()
                send(line, REFUSAL, _reason(error))


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)  # from its first moment the file is its owner's alone
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen()
    return listener


def _reason(error: Exception) -> str:
    if isinstance(error, FedeatError):
        return str(error)
    return explanation(error) or f"{type(error).__name__}: {error}"


def main() -> None:
    """Starts a worker as `fedeat join` does."""
    parser = argparse.ArgumentParser(prog="python -m fedeat.flower.worker")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--task")
    parser.add_argument("--model")
    parser.add_argument("--share-counts", action="store_true")
    parser.add_argument("--secure-clients", type=int, default=0)
    options = parser.parse_args()
    die_with_parent()
    serve(
        options.socket,
        Node(
            data=tuple(options.data),
            task=options.task,
            model=options.model,
            state=options.state / "residuals",
            share_counts=options.share_counts,
            secure_clients=options.secure_clients,
        ),
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
