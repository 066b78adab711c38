"""Reaches clients through Flower's grid: the `RunClients` of a federation over many processes or machines."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from flwr.app import MessageType
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedeat.config import Config
from fedeat.errors import QuorumError, UpdateError
from fedeat.experiment import privacy
from fedeat.experiment.federation import Elsewhere
from fedeat.flower import messages
from fedeat.flower.arrays import to_record
from fedeat.flower.exchange import Patience, ask
from fedeat.flower.messages import Order
from fedeat.updates import Adapter, ClientUpdate

_WARNING, _INFO = 30, 20
_LOOK_S = 0.3


def connect(config: Config, *, grid: Grid, text: str, name: str, nodes: Mapping[int, int] | None = None) -> Elsewhere:
    """Finds a run's clients and has them load what they need.

    Args:
        config: the run's.
        grid: Flower's.
        text: the configuration as it is sent to clients, as TOML.
        name: the run's, by which clients know it again.
        nodes: client -> its registered node; None where nodes know their number themselves, in a simulation.

    Raises:
        QuorumError: too few clients are there after `communication.wait_s`.
    """
    section = config.communication
    order = Order("describe", text, -1, threads=torch.get_num_threads(), run=name)
    if nodes is None:
        nodes = _ask_their_numbers(config, grid, order)
    quorum = config.federation.quorum or len(nodes) // 2 + 1
    patience = Patience(section.wait_s, min(quorum, len(nodes)), section.grace_s)
    described = _facts(grid, nodes, order, patience)
    _require(described, quorum, section.wait_s, "described their data")
    tasks = tuple(sorted({task for facts, _ in described.values() if facts for task in facts["tasks"]}))
    prepared = _facts(grid, nodes, replace(order, step="prepare", tasks=tasks), patience)
    _require(prepared, quorum, section.wait_s, "loaded the model")
    shares = {client: _share(facts) for client, (facts, _) in prepared.items()}
    bases = {client: facts["base"] for client, (facts, _) in prepared.items() if facts}
    ready = replace(order, step="train", tasks=tasks)
    run = functools.partial(run_clients, config=config, grid=grid, nodes=nodes, order=ready)
    told = [facts for facts, _ in described.values() if facts]
    left_out = {name: sum(facts[name] for facts in told) for name in ("blank", "excluded")}
    asking = functools.partial(ask_secretly, config=config, grid=grid, nodes=nodes, order=replace(ready, step="secure"))
    return Elsewhere(run, shares, frozenset(task or None for task in tasks), left_out, asking, bases)


def run_clients(
    adapter: Adapter,
    cohort: Sequence[int],
    index: int,
    *,
    config: Config,
    grid: Grid,
    nodes: Mapping[int, int],
    order: Order,
    base: str = "",
    on_client: Callable[[int, int], None] = lambda index, done: None,
) -> list[ClientUpdate]:
    """Trains a cohort on its nodes; with its keywords bound it is a `RunClients`.

    Args:
        adapter: the round's global adapter.
        cohort: the clients to train.
        index: the round.
        config: the run's.
        grid: Flower's.
        nodes: client -> its registered node.
        order: to train, but for its client and round.
        base: the fingerprint of the server's base model; a client with another does not train.
        on_client: told the round and how many of its clients have answered.

    Returns:
        One update a client, with its `failure` where the client sent none that can be read.
    """
    section = config.communication
    size = config.federation.clients_per_round or len(nodes)
    enough = min(config.federation.quorum or size // 2 + 1, len(cohort))
    asked = {nodes[client]: replace(order, client=client, index=index, base=base) for client in cohort}
    record = to_record(adapter)
    answers = ask(
        grid,
        {node: messages.order_content(order, record) for node, order in asked.items()},
        kind=MessageType.TRAIN,
        group=str(index),
        patience=Patience(section.deadline_s, enough, section.grace_s),
        # A client's part in a secure sum is kept from its training on; to train again would begin it anew. And with
        # fresh noise it would not be the same answer, but one more look at the client's data.
        repeatable=not config.secure_aggregation.enabled and not privacy.fresh_noise(config),
        on_answer=functools.partial(on_client, index),
    )
    found = []
    for client in cohort:
        content = answers[nodes[client]]
        try:
            if isinstance(content, str):
                raise UpdateError(content)
            # Where sums are secure, the update stays with its client.
            expected = {} if config.secure_aggregation.enabled else adapter
            found.append(messages.read_update(content, client, expected, section.encoding))
        except UpdateError as error:
            log(_WARNING, "round %d: client %d is left out: %s", index, client, error)
            found.append(ClientUpdate(client, {}, 0, failure=str(error)))
    return found


def ask_secretly(
    index: int,
    requests: Mapping[int, Any],
    *,
    config: Config,
    grid: Grid,
    nodes: Mapping[int, int],
    order: Order,
) -> dict[int, Any]:
    """Brings the clients of a secure sum their requests; with its keywords bound it is an `AskClients`.

    Args:
        index: the round.
        requests: client -> its request, of `fedeat.secure_aggregation.messages`.
        config: the run's.
        grid: Flower's.
        nodes: client -> its registered node.
        order: for a secure sum, but for its client and round.

    Returns:
        Client -> its answer, or the reason why there is none that can be read.
    """
    from fedeat.flower import secure_messages
    from fedeat.secure_aggregation import threshold

    section = config.communication
    contents = {}
    for client, request in requests.items():
        content = messages.order_content(replace(order, client=client, index=index), None)
        contents[nodes[client]] = secure_messages.with_request(content, request, client)
    patience = Patience(section.deadline_s, min(threshold(len(requests)), len(requests)), section.grace_s)
    answers = ask(grid, contents, kind=MessageType.QUERY, group=f"{index}-secure", patience=patience)
    found: dict[int, Any] = {}
    for client, request in requests.items():
        answer = answers[nodes[client]]
        try:
            found[client] = answer if isinstance(answer, str) else secure_messages.read_answer(answer, request)
        except UpdateError as error:
            found[client] = str(error)
        if isinstance(found[client], str):
            log(_WARNING, "round %d: client %d is lost from the secure sum: %s", index, client, found[client])
    return found


def _ask_their_numbers(config: Config, grid: Grid, order: Order) -> dict[int, int]:
    """Client -> node, from what nodes know of themselves; waits for as many as the configuration has clients."""
    section = config.communication
    deadline = time.monotonic() + section.wait_s
    while not (present := sorted(grid.get_node_ids())):
        if time.monotonic() > deadline:
            raise QuorumError(f"no node is there after {section.wait_s:g} s (communication.wait_s). Start the nodes.")
        time.sleep(_LOOK_S)
    patience = Patience(section.wait_s, len(present), section.grace_s)
    contents = dict.fromkeys(present, messages.order_content(order, None))
    answers = ask(grid, contents, kind=MessageType.QUERY, group="numbers", patience=patience, repeatable=True)
    found: dict[int, int] = {}
    for node, content in answers.items():
        number = messages.read_facts(content)["partition"] if not isinstance(content, str) else -1
        if number < 0 or number in found:
            problem = content if isinstance(content, str) else f"says that its number is {number}"
            raise QuorumError(f"node {node}: {problem}. Expected each node to have one number of its own from 0 up.")
        found[number] = node
    if sorted(found) != list(range(len(found))):
        raise QuorumError(f"the nodes are numbered {sorted(found)}, expected 0..{len(found) - 1}.")
    return dict(sorted(found.items()))


def _facts(
    grid: Grid, nodes: Mapping[int, int], order: Order, patience: Patience
) -> dict[int, tuple[dict[str, Any] | None, str]]:
    """Client -> what it says of itself, or None and why."""
    log(_INFO, "asking %d clients to %s", len(nodes), order.step)
    contents = {node: messages.order_content(replace(order, client=c), None) for c, node in nodes.items()}
    answers = ask(grid, contents, kind=MessageType.QUERY, group=order.step, patience=patience, repeatable=True)
    found: dict[int, tuple[dict[str, Any] | None, str]] = {}
    for client, node in nodes.items():
        content = answers[node]
        try:
            if isinstance(content, str):
                raise UpdateError(content)
            found[client] = (messages.read_facts(content), "")
        except UpdateError as error:
            log(_WARNING, "client %d: %s", client, error)
            found[client] = (None, str(error))
    return found


def _require(found: Mapping[int, tuple[dict[str, Any] | None, str]], quorum: int, wait_s: float, what: str) -> None:
    ready = sum(facts is not None for facts, _ in found.values())
    if ready < quorum:
        reasons = "".join(f"\n  - client {client}: {why}" for client, (facts, why) in found.items() if facts is None)
        raise QuorumError(
            f"{ready} of {len(found)} clients {what} within {wait_s:g} s (communication.wait_s), expected at least "
            f"{quorum} (federation.quorum):{reasons}"
        )


def _share(facts: Mapping[str, Any] | None) -> dict[str, Any]:
    """What partition.json says of a client's data."""
    names = ("examples", "cut_prompts", "cut_answers")
    return {**{name: facts[name] if facts else 0 for name in names}, "counts": dict(facts["counts"]) if facts else {}}
