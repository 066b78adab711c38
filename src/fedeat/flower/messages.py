"""What travels between server and clients: orders one way, facts and updates the other.

    describe   who are you, how much data, of which tasks          -> facts
    prepare    load the model and the data, so that rounds are quick -> facts
    train      one round from this adapter                         -> update and facts
    secure     a request of a secure sum (`secure_messages`)       -> its answer

An order carries the run's configuration and name, the client's number, the round, the global adapter and the
fingerprint of its base model. An answer carries the
encoded update and numbers: never a text, never a token. Both sides read what arrives as if a stranger had sent it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, get_args

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedeat.engine.encoding import Encoding, expected, received
from fedeat.errors import UpdateError
from fedeat.flower.arrays import from_record, to_record
from fedeat.updates import Adapter, ClientUpdate

Step: TypeAlias = Literal["describe", "prepare", "train", "secure"]

_COUNTS = ("examples", "cut_prompts", "cut_answers", "blank", "excluded")
_MOST_METRICS = 32
_MOST_TASKS = 64
_BASE = re.compile(r"(?:[0-9a-f]{64})?")
_METRIC = re.compile(r"[a-z][a-z0-9_]{0,39}")
_OURS = {"kind", "round", "client", "malicious", "num_examples", "download_bytes", "upload_bytes", "epsilon"}
"""Keys of a record's line that the server writes itself."""


@dataclass(frozen=True)
class Order:
    """What a client is asked to do.

    Attributes:
        step: what.
        config: the run's configuration, as TOML.
        client: the client's number in this run, 0..n-1; -1 where the server does not know it yet.
        index: the round.
        tasks: of all clients' examples, "" among them for free text.
        threads: CPU threads of torch: other sums differ in their last bits.
        run: the run's random name, the same where it goes on; what a client keeps between rounds is kept under it.
        base: the fingerprint that the base model of a client must have that trains; "" for any.
    """

    step: Step
    config: str
    client: int
    index: int = 0
    tasks: tuple[str, ...] = ()
    threads: int = 1
    run: str = ""
    base: str = ""

    def record(self) -> ConfigRecord:
        """As Flower sends it."""
        return ConfigRecord(
            {
                "step": self.step,
                "config": self.config,
                "client": self.client,
                "round": self.index,
                "tasks": list(self.tasks),
                "threads": self.threads,
                "run": self.run,
                "base": self.base,
            }
        )


def read_order(content: RecordDict) -> Order:
    """The order in a message.

    Raises:
        UpdateError: there is none, or one that no server of this package would send.
    """
    record = content.config_records.get("order")
    if record is None:
        raise UpdateError("the message holds no order of fedeat")
    step, config, tasks = (record.get(name) for name in ("step", "config", "tasks"))
    run, base = record.get("run"), record.get("base")
    numbers = [record.get(name) for name in ("client", "round", "threads")]
    if step not in get_args(Step) or not all(isinstance(text, str) for text in (config, run, base)):
        raise UpdateError(f"unknown order {str(step)[:40]!r}; server and node must run the same version of fedeat")
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise UpdateError("the order's tasks are not names")
    if not all(isinstance(number, int) and -1 <= number < 1 << 31 for number in numbers):
        raise UpdateError("the order's numbers are out of range")
    client, index, threads = cast(list[int], numbers)
    run, base = cast(str, run), cast(str, base)
    return Order(cast(Step, step), cast(str, config), client, index, tuple(tasks), threads, run, base)


def facts_content(facts: Mapping[str, Any]) -> RecordDict:
    """An answer to describe or prepare."""
    return RecordDict({"facts": ConfigRecord(dict(facts))})


def read_facts(content: RecordDict) -> dict[str, Any]:
    """What a client says of its data.

    Returns:
        "examples", >= 0; "tasks", names, "" for free text; "partition", the node's own number, -1 for none;
        "cut_prompts", "cut_answers", "blank", "excluded", >= 0; "counts", label -> examples, empty unless the node
        shares it; "base", the fingerprint of its base model, "" before it has loaded one.

    Raises:
        UpdateError: it says something else.
    """
    record = content.config_records.get("facts")
    if record is None:
        raise UpdateError("answers without facts")
    numbers: dict[str, Any] = {}
    for name, least in {**dict.fromkeys(_COUNTS, 0), "partition": -1}.items():
        value = record.get(name, least)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 53:
            raise UpdateError(f"says {name} = {str(value)[:40]}, expected an integer of at least {least}")
        numbers[name] = value
    tasks, labels, counts = (record.get(name, []) for name in ("tasks", "labels", "counts"))
    names = [*tasks, *labels] if isinstance(tasks, list) and isinstance(labels, list) else [None]
    if len(names) > _MOST_TASKS or not all(isinstance(name, str) and len(name) <= 200 for name in names):
        raise UpdateError("names its tasks or labels in an unknown way")
    if not isinstance(counts, list) or len(counts) != len(labels) or not all(isinstance(n, int) for n in counts):
        raise UpdateError("counts its labels in an unknown way")
    base = record.get("base", "")
    if not isinstance(base, str) or not _BASE.fullmatch(base):
        raise UpdateError("says what its base model is in an unknown way")
    return {**numbers, "base": base, "tasks": list(tasks), "counts": dict(zip(labels, counts, strict=True))}


def order_content(order: Order, adapter: Adapter | ArrayRecord | None) -> RecordDict:
    """A message's content; of an adapter that many are sent, its record, which is then made once."""
    content = RecordDict({"order": order.record()})
    if adapter is not None:
        content["adapter"] = adapter if isinstance(adapter, ArrayRecord) else to_record(adapter)
    return content


def read_adapter(content: RecordDict, like: Adapter) -> dict[str, Any]:
    """The global adapter in an order to train.

    Raises:
        UpdateError: it does not fit the model of this node.
    """
    record = content.array_records.get("adapter")
    if record is None:
        raise UpdateError("the order to train holds no adapter")
    return from_record(record, like)


def update_content(encoded: Adapter, update: ClientUpdate, facts: Mapping[str, float]) -> RecordDict:
    """A client's answer to train."""
    numbers: dict[str, int | float] = {**update.metrics, **facts, "num_examples": update.num_examples}
    return RecordDict({"update": to_record(encoded), "facts": MetricRecord(cast(Any, numbers))})


def read_update(content: RecordDict, client_id: int, reference: Adapter, encoding: Encoding) -> ClientUpdate:
    """A client's update as the server has it.

    Args:
        content: what the client's node sent.
        client_id: whose node that was; nothing in the content can change it.
        reference: the round's global adapter.
        encoding: the run's.

    Raises:
        UpdateError: it is not what was asked for; the message says in what.
    """
    if set(content) != {"update", "facts"} or not isinstance(content["update"], ArrayRecord):
        raise UpdateError(f"answers with records {str(sorted(map(str, content)))[:120]}, expected update and facts")
    facts = content["facts"]
    if not isinstance(facts, MetricRecord) or len(facts) > _MOST_METRICS:
        raise UpdateError(f"reports more than {_MOST_METRICS} numbers, or none")
    numbers = dict(facts)
    claim = numbers.pop("num_examples", None)
    if not isinstance(claim, int) or isinstance(claim, bool) or not 0 < claim < 1 << 53:
        raise UpdateError(f"num_examples must be a positive integer, got {str(claim)[:40]}")
    metrics: dict[str, float] = {}
    for name, value in numbers.items():
        if not _METRIC.fullmatch(name) or name in _OURS:
            raise UpdateError(f"reports a number called {name[:40]!r}, which is not a client's to report")
        if not isinstance(value, int | float) or (isinstance(value, int) and abs(value) >= 1 << 53):
            raise UpdateError(f"reports {name} = {str(value)[:40]}, expected one number")
        metrics[name] = float(value) if math.isfinite(value) else math.nan
    encoded = from_record(cast(ArrayRecord, content["update"]), expected(reference, encoding))
    return received(encoded, ClientUpdate(client_id, {}, claim, metrics), reference, encoding)
