"""The processes of a real deployment: `serve` on the server, `join` on each node.

    serve   SuperLink with its state on disk; SuperExec, which starts a run's ServerApp; each survives the other
    join    SuperNode, which talks to the server and carries its messages to the warm worker

Everything listens on this machine alone unless told otherwise, TLS and the authentication of nodes are on unless
`insecure` is asked for, and nothing calls home or installs anything.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import ssl
import stat
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from fedeat import records
from fedeat.errors import FedeatError
from fedeat.flower import control, keys, quiet, server_app, supernode
from fedeat.flower.supervisor import Program, Supervisor, ended_by_signals

Tell = Callable[[str], None]
_SECRET = "superexec.secret"
_LONGEST_SOCKET_PATH = 100
_START_S = 120.0
_LOOK_S = 0.2
_UNKNOWN = "Failed to activate SuperNode"
"""What Flower's SuperNode writes when the server does not know its key."""


@dataclass(frozen=True)
class Server:
    """What `serve` needs.

    Attributes:
        state: directory of the SuperLink's database and logs.
        keys: directory that `fedeat keys` filled; None for plaintext without authentication.
        host: address to listen at.
        port: 1..65535.
    """

    state: Path
    keys: Path | None
    host: str = "127.0.0.1"
    port: int = 9092

    @property
    def local_address(self) -> str:
        """By which this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"{host}:{self.port}"


@dataclass(frozen=True)
class Silo:
    """What `join` needs.

    Attributes:
        superlink: HOST:PORT of the server.
        data: the node's own files.
        state: directory of its logs and of what error feedback needs.
        key: its private key; None without authentication.
        ca: the federation's certificate authority; None for plaintext.
        task: of its rows, where their columns do not tell.
        model: its base model; None for the one that the configuration names.
        share_counts: whether it tells the server how many examples of each label it has.
        secure_clients: it trains for secure sums over at least so many clients alone; 0 leaves that to the server.
    """

    superlink: str
    data: tuple[Path, ...]
    state: Path
    key: Path | None
    ca: Path | None
    task: str | None = None
    model: str | None = None
    share_counts: bool = False
    secure_clients: int = 0


def serve(server: Server, tell: Tell) -> None:
    """Runs a server until it is stopped with Ctrl-C or SIGTERM.

    Raises:
        FedeatError: a key is missing, the port is taken, or the SuperLink does not start.
    """
    quiet.hush()
    state = _private_directory(server.state)
    secret = _secret(state)
    _require_free(server.host, server.port)
    tls = _server_tls(server)
    superlink = [sys.executable, "-m", "fedeat.flower.superlink", "--host", server.host, "--port", str(server.port)]
    superlink += ["--database", str(state / "superlink.db"), "--isolation", "process", *tls]
    superlink += ["--superexec-auth-secret-file", str(secret), "--disable-runtime-dependency-installation"]
    ca = None if server.keys is None else server.keys / "ca.pem"
    superexec = [_script("flower-superexec"), "--runtime-api-address", server.local_address]
    superexec += ["--superexec-auth-secret-file", str(secret)]
    superexec += ["--insecure"] if ca is None else ["--root-certificates", str(ca)]
    nodes = state / "nodes.json"
    environment = {
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]),
        "FLWR_HOME": str(state / "flwr"),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.3",
        **({} if server.keys is None else {server_app.NODES: str(nodes)}),
    }
    with ended_by_signals() as ended, Supervisor(state, tell) as processes:
        processes.start(Program("superlink", superlink, environment))
        _wait_until_up(server, ca, processes, ended)
        if server.keys is not None:
            _register(server, ca, nodes, tell)
        processes.start(Program("superexec", superexec, environment))
        tell(f"serving at {server.host}:{server.port}{' in plaintext, to anybody' if ca is None else ''}")
        while not ended():
            processes.look()
            if server.keys is not None:
                _register(server, ca, nodes, tell)
            time.sleep(_LOOK_S)


def join(silo: Silo, tell: Tell) -> None:
    """Runs a node until it is stopped with Ctrl-C or SIGTERM.

    Raises:
        FedeatError: a file is missing, or the server refuses this node.
    """
    quiet.hush()
    for path in (*silo.data, *filter(None, (silo.key, silo.ca))):
        if not path.is_file():
            raise FedeatError(f"{path} does not exist. Check the path.")
    state = _private_directory(silo.state)
    with _socket_path(state) as worker_socket, ended_by_signals() as ended, Supervisor(state, tell) as processes:
        _require_same_language(silo, tell, ended)
        processes.start(Program("worker", _worker_command(silo, worker_socket)))
        # As a file, without the directory it lies in: it imports Flower alone.
        node = [sys.executable, "-P", supernode.__file__, "--superlink", silo.superlink, "--worker", str(worker_socket)]
        node += [] if silo.ca is None else ["--ca", str(silo.ca)]
        node += [] if silo.key is None else ["--key", str(silo.key)]
        processes.start(Program("supernode", node, {"FLWR_HOME": str(state / "flwr")}))
        tell(f"joining {silo.superlink}")
        said, shown = "", 0
        while not ended():
            processes.look()
            said, shown = _tell_of_node(processes.log("supernode"), said, shown, silo, tell)
            time.sleep(_LOOK_S)


def _worker_command(silo: Silo, worker_socket: Path) -> list[str]:
    command = [sys.executable, "-m", "fedeat.flower.worker", "--socket", str(worker_socket)]
    command += ["--state", str(silo.state.resolve())]
    for path in silo.data:
        command += ["--data", str(path.resolve())]
    command += ["--task", silo.task] if silo.task else []
    command += ["--model", silo.model] if silo.model else []
    command += ["--secure-clients", str(silo.secure_clients)] if silo.secure_clients else []
    return command + (["--share-counts"] if silo.share_counts else [])


def _tell_of_node(log: Path, said: str, shown: int, silo: Silo, tell: Tell) -> tuple[str, int]:
    """Says what became of the node's connection, once for each change; what was said, and how far the log was read."""
    with log.open("rb") as file:
        file.seek(shown)
        data = file.read()
    for line in data.decode("utf-8", "replace").splitlines():
        news = said
        if "SuperNode ID" in line:
            news = f"joined {silo.superlink}"
        elif _UNKNOWN in line:
            news = (
                f"{silo.superlink} refuses this node: it does not know its key (give the server nodes/NAME.pub), or "
                "takes an earlier process of this node for alive, which passes. This node tries again."
            )
        if news != said:
            tell(news)
            said = news
    return said, shown + len(data)


def _require_same_language(silo: Silo, tell: Tell, ended: Callable[[], bool]) -> None:
    """Waits for the server and checks that it proves itself, or is as plain as was asked for.

    Raises:
        FedeatError: it does not; the message says which of the two sides to change.
    """
    host, _, port = silo.superlink.rpartition(":")
    if not host or not port.isdigit():
        raise FedeatError(f"--superlink {silo.superlink}: expected HOST:PORT.")
    told = False
    while not ended():
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=10.0) as line:
                _handshake(line, host.strip("[]"), silo)
                return
        except ssl.SSLCertVerificationError as error:
            raise FedeatError(
                f"{silo.superlink} is refused: its certificate was not signed by {silo.ca}, or not for this name "
                f"({error.verify_message}). Take ca.pem from whoever runs the server."
            ) from None
        except ssl.SSLError as error:
            raise FedeatError(
                f"{silo.superlink} does not speak TLS ({error.reason}). Start the server with --keys, or this node "
                "with --insecure in place of --key and --ca."
            ) from None
        except OSError as error:
            if not told:
                tell(f"waiting for {silo.superlink}: {error.strerror or error}")
                told = True
            time.sleep(1.0)


def _handshake(line: socket.socket, host: str, silo: Silo) -> None:
    if silo.ca is not None:
        with ssl.create_default_context(cafile=str(silo.ca)).wrap_socket(line, server_hostname=host):
            return
    line.sendall(b"GET /health HTTP/1.1\r\nHost: fedeat\r\nConnection: close\r\n\r\n")
    if not line.recv(5).startswith(b"HTTP/"):
        raise FedeatError(
            f"{silo.superlink} speaks TLS: plaintext is refused. Give --key and --ca in place of --insecure."
        )


def _server_tls(server: Server) -> list[str]:
    if server.keys is None:
        return ["--insecure"]
    files = {option: server.keys / name for option, name in _TLS_FILES.items()}
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise FedeatError(f"{', '.join(missing)}: no such file. Make the keys first: fedeat keys --out {server.keys}")
    return [part for option, path in files.items() for part in (option, str(path))] + ["--enable-supernode-auth"]


_TLS_FILES = {"--ssl-ca-certfile": "ca.pem", "--ssl-certfile": "server.pem", "--ssl-keyfile": "server.key"}


def _register(server: Server, ca: Path | None, listing: Path, tell: Tell) -> None:
    """Registers the nodes whose public keys are there and which are not yet listed, and adds them to the listing.

    The listing only grows: a client's number is its place there.
    """
    assert server.keys is not None
    found = sorted((server.keys / "nodes").glob("*.pub"))
    listed = json.loads(listing.read_text(encoding="utf-8")) if listing.is_file() else []
    fresh = [path for path in found if path.stem not in {entry["name"] for entry in listed}]
    if not fresh:
        if not listing.is_file():
            records.write_json(listing, [])
        return
    client = control.open_client(server.local_address, ca)
    try:
        for path in fresh:
            node = control.register(client, path.stem, keys.read_public_key(path))
            listed.append({"name": path.stem, "node_id": str(node)})
            records.write_json(listing, listed)
            tell(f"client {len(listed) - 1} is {path.stem}, node {node}")
    finally:
        client.close()


def _wait_until_up(server: Server, ca: Path | None, processes: Supervisor, ended: Callable[[], bool]) -> None:
    address = f"{'http' if ca is None else 'https'}://{server.local_address}/health"
    deadline = time.monotonic() + _START_S
    while not ended():
        try:
            verify = True if ca is None else ssl.create_default_context(cafile=str(ca))
            if httpx.get(address, verify=verify, timeout=5.0).is_success:
                return
        except httpx.HTTPError:
            pass
        if processes.look() or time.monotonic() > deadline:
            tail = processes.log("superlink").read_text(encoding="utf-8", errors="replace")[-600:]
            raise FedeatError(f"the SuperLink did not start. The end of {processes.log('superlink')}:\n{tail}")
        time.sleep(0.2)


def _private_directory(path: Path) -> Path:
    records.make_directory(path)
    path.chmod(stat.S_IRWXU)
    return path.resolve()


def _secret(state: Path) -> Path:
    """A file with what the processes of this machine prove themselves to each other with."""
    path = state / _SECRET
    if not path.is_file():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    return path


def _script(name: str) -> str:
    path = Path(sysconfig.get_path("scripts")) / name
    found = str(path) if path.is_file() else shutil.which(name)
    if found is None:
        raise FedeatError(f'{name} is not installed: pip install "fedeat[flower]"')
    return found


@contextmanager
def _socket_path(state: Path) -> Iterator[Path]:
    """A place for the worker's socket; paths of sockets must be short, so it may have to be elsewhere."""
    path = state / "worker.sock"
    if len(str(path)) <= _LONGEST_SOCKET_PATH:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="fedeat-") as directory:
        yield Path(directory) / "worker.sock"


def _require_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise FedeatError(f"{host}:{port} is not to be had: {error.strerror}. Choose another --port.") from None
