"""A client's side: carries out the server's orders over its own data, with a base model that is loaded once.

The server decides how to train and never what is read: on a node of its own a client takes its data and, where it says
so, its model from its own command line, and runs no code that a model brings.
"""

from __future__ import annotations

import hashlib
import logging
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict

from fedeat.attacks.byzantine import choose_malicious
from fedeat.config import Config, parse
from fedeat.data import Encoded, Example, require_targets, truncation
from fedeat.engine.encoding import Residuals, encode_update
from fedeat.errors import ConfigError, UpdateError
from fedeat.experiment import binding, playing, privacy
from fedeat.experiment.federation import ANOTHER_BASE, load_trained_model
from fedeat.experiment.inputs import TrainingData, split_examples, training_data
from fedeat.experiment.round_records import client_share
from fedeat.flower import messages
from fedeat.flower.given import Given
from fedeat.flower.messages import Order
from fedeat.model import AdaptedModel, fingerprint
from fedeat.updates import ClientUpdate

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """What a node knows about itself.

    Attributes:
        partition: its part of the data in a simulation; None where it has data of its own.
        data: its own files; none in a simulation, where the configuration's are split.
        task: of its rows, where their columns do not tell.
        model: directory or name of its base model; None for the configuration's.
        state: where it keeps what outlives a process (what error feedback needs, what fresh noise was spent on), on a
            node with data of its own in a directory for each run; None for nowhere.
        share_counts: whether it tells the server how many examples of each label it has.
        secure_clients: it trains for secure sums over at least so many clients alone; 0 leaves that to the server.
    """

    partition: int | None = None
    data: tuple[str, ...] = ()
    task: str | None = None
    model: str | None = None
    state: Path | None = None
    share_counts: bool = False
    secure_clients: int = 0


class Client:
    """Carries out orders; the model and the data of the newest run stay in memory between them."""

    def __init__(self, node: Node) -> None:
        """A client that has loaded nothing yet."""
        self._node = node
        self._run: _Run | None = None

    def answer(self, content: RecordDict, *, partition: int | None = None) -> RecordDict:
        """The answer to an order.

        Args:
            content: of the message.
            partition: the node's number in a simulation, whose processes serve many nodes.

        Raises:
            FedeatError: the order, the data or the model does not allow it; the message reaches the server.
        """
        order = messages.read_order(content)
        torch.set_num_threads(max(1, order.threads))
        if self._run is None or (self._run.text, self._run.name) != (order.config, order.run):
            self._run = _Run(order.config, order.run, self._node)
        run = self._run
        client = order.client if order.client >= 0 or partition is None else partition
        if order.step == "secure":
            return run.secure(content, order, client)
        if order.step == "describe":
            return messages.facts_content(run.description(client, partition))
        run.load(order)
        if order.step == "prepare":
            return messages.facts_content(run.share(client))
        return run.train(content, order, client)


class _Run:
    """One run's data and, once it is needed, its model."""

    def __init__(self, text: str, name: str, node: Node) -> None:
        self.text, self.name = text, name
        self._node = node
        self.config = _own_config(text, node)
        self._data = training_data(self.config)
        binding.check_harmful_rows(self.config, self._data.examples)
        self._held: Callable[[int], Sequence[Example]] = _examples(self.config, self._data, node)
        self._model: AdaptedModel | None = None
        self._base = ""
        self._tasks: tuple[str, ...] = ()
        self._shards: dict[int, list[Encoded]] = {}
        self._state = _place(node, text, name)
        self._given = Given(self._state) if privacy.fresh_noise(self.config) else None
        self._sessions = playing.sessions(self.config, least=node.secure_clients)
        if node.secure_clients and self._sessions is None:
            raise ConfigError(
                [
                    f"this node trains for secure sums over at least {node.secure_clients} clients alone "
                    "(--secure-clients). Expected secure_aggregation.enabled = true."
                ],
                source="the server's configuration, on this node",
            )

    def description(self, client: int, partition: int | None) -> dict[str, Any]:
        held = self._held(client)
        tasks = sorted({example.task or "" for example in held})
        # In a simulation all nodes read the same rows; one of them speaks for what was left out.
        speaks = self._node.data or client == 0
        left_out = {name: count if speaks else 0 for name, count in self._data.left_out.items()}
        number = -1 if partition is None else partition
        return {"examples": len(held), "tasks": tasks, "partition": number, **left_out}

    def load(self, order: Order) -> None:
        if self._model is None or self._tasks != order.tasks:
            self._model = load_trained_model(self.config, _tasks(order.tasks))
            self._tasks, self._shards = order.tasks, {}

    def share(self, client: int) -> dict[str, Any]:
        cut = truncation(self._shard(client))
        assert self._model is not None
        found = {"tasks": [], **{name: cut[name] for name in ("examples", "cut_prompts", "cut_answers")}}
        found["base"] = self._fingerprint()
        if self._node.share_counts or not self._node.data:
            counts = client_share(self._held(client), self._shard(client))["counts"]
            found |= {"labels": list(counts), "counts": list(counts.values())}
        return found

    def train(self, content: RecordDict, order: Order, client: int) -> RecordDict:
        assert self._model is not None
        if order.base and order.base != self._fingerprint():
            raise UpdateError(ANOTHER_BASE)
        adapter = messages.read_adapter(content, self._model.adapter())
        engine = binding.local_engine(self.config, self._model)

        def trained() -> ClientUpdate:
            return engine(adapter, [client], order.index, shards={client: self._shard(client)})[0]

        update = trained() if self._given is None else self._given.update(client, order.index, adapter, trained)
        if self._sessions is not None:
            return messages.update_content({}, self._sessions.keep(update, order.index), {})
        section = self.config.communication
        store = None
        if section.error_feedback and section.encoding != "float32" and self._state is not None:
            store = Residuals(self._state)
        encoded, facts = encode_update(
            update, order.index, encoding=section.encoding, residuals=store, seed=self.config.seed
        )
        return messages.update_content(encoded, update, facts)

    def secure(self, content: RecordDict, order: Order, client: int) -> RecordDict:
        if self._sessions is None:
            raise UpdateError("the run has no secure sums")
        # Imported here: it needs a package that only such runs do.
        from fedeat.flower import secure_messages

        request = secure_messages.read_request(content, client)
        return secure_messages.answer_content(self._sessions.answer(client, order.index, request))

    def _fingerprint(self) -> str:
        assert self._model is not None
        self._base = self._base or fingerprint(self._model)
        return self._base

    def _shard(self, client: int) -> list[Encoded]:
        if client not in self._shards:
            assert self._model is not None
            shard = [self._model.encode(example) for example in self._held(client)]
            require_targets(shard, source=f"client {client}")
            self._shards[client] = shard
        return self._shards[client]


def _own_config(text: str, node: Node) -> Config:
    """The run's configuration as this node may follow it."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"the server sent a configuration that is not TOML: {error}"]) from None
    raw["evaluation"] = {}
    if node.data:
        raw["data"] = {**raw.get("data", {}), "train": [_source(path, node.task) for path in node.data]}
        raw["partition"] = {"kind": "file"}
        raw["attack"] = {}
        # What concerns all clients is the server's to check; this node sees its own data alone.
        raw["federation"] = {"rounds": raw.get("federation", {}).get("rounds", 1)}
        raw["aggregation"] = {}
        raw["model"] = {**raw.get("model", {}), "trust_remote_code": False, "device": "auto"}
        if node.model is not None:
            raw["model"] |= {"name": node.model, "revision": None}
            raw["model"].pop("revision")
    return parse(raw, source="the server's configuration, on this node")


def _place(node: Node, text: str, name: str) -> Path | None:
    """Where a node keeps what is a run's alone; a simulation's is in that run's directory already."""
    if node.state is None or not node.data:
        return node.state
    return node.state / hashlib.sha256(f"{name}\n{text}".encode()).hexdigest()[:32]


def _source(path: str, task: str | None) -> Mapping[str, str]:
    return {"path": path} if task is None else {"path": path, "task": task}


def _examples(config: Config, data: TrainingData, node: Node) -> Callable[[int], Sequence[Example]]:
    """Client -> its examples: this node's own, or its part of the configuration's."""
    if node.data:
        return lambda client: data.examples
    split = split_examples(config, data.examples, data.sizes)
    malicious = choose_malicious(range(len(split)), config.attack.fraction, seed=config.seed)
    held = binding.client_examples(config, data.examples, split, malicious=malicious)

    def part_of(client: int) -> Sequence[Example]:
        if client not in held:
            raise UpdateError(f"there is no client {client} among {len(held)}; start as many nodes as clients")
        return held[client]

    return part_of


def _tasks(names: Collection[str]) -> set[str | None]:
    return {name or None for name in names}
