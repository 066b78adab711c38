"""Replies of which any field may be anything, at the seam where the server reads them: nothing crashes it, and nothing
changes an update silently, and every reply is accepted, refused or dropped, by a reason.

FEDEAT_FUZZ=1000000 is the long run; a reply costs about 200 microseconds of one core.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedeat.config import Config
from fedeat.config.schema import CommunicationSection, FederationSection, ModelSection
from fedeat.engine.encoding import Encoding, decode, encode, expected
from fedeat.flower import engine, exchange, messages
from fedeat.flower.messages import Order
from fedeat.updates import ClientUpdate, validate

ADAPTER = {"x.lora_A.weight": torch.linspace(-1, 1, 12).reshape(3, 4), "head": torch.tensor([0.5])}
COUNT = int(os.environ.get("FEDEAT_FUZZ", "4000"))
COHORT = 40
ENCODINGS: tuple[Encoding, ...] = ("float32", "float16", "bfloat16", "int8")

NAMES = ["", "update", "facts", "head", "float32", "int8", "int16", "float32/", "\0", "../../x", "näme", "n" * 10_000]
KEYS = [*NAMES, "num_examples", "loss", "client", "round", "malicious", "kind", "upload_bytes", "A", "1", "a b"]
NUMBERS: list[Any] = [-1, 0, 1, 7, 1 << 52, 1 << 53, 1 << 62, -(1 << 62), 0.0, -0.5, 1e308, math.nan, math.inf]
LISTS: list[Any] = [[], [1], [1.0, math.nan], [1] * 1000]
DTYPES = ["float32", "float16", "int16", "int8", "float64", "object", "O", "", ">f4", "V8", "float32\0", "bfloat16"]
SHAPES = [(), (0,), (1,), (12,), (3, 4), (4, 3), (-1, 4), (1 << 40, 1 << 40), (3, 4, 1), (2,), (True,)]
STYPES = ["numpy.ndarray", "", "pickle", "torch.Tensor", "numpy.ndarray\0"]
MANY = {f"m{i}": 1.0 for i in range(40)}
DROPPED = ["it answers no message that was sent", "its message was answered before", "its message went to another node"]
REASONS = ["", "no disk", "x" * 5000, "ünïcode\n\r\t\x00", "{}%s%n"]


class Mailbox:
    """A grid whose replies are handed over all at once."""

    def __init__(self) -> None:
        self.replies: list[Message] = []
        self.answering: Any = None

    def push_messages(self, sent: Iterable[Message]) -> list[str]:
        asked = list(sent)
        for number, message in enumerate(asked):
            message.metadata.__dict__["_message_id"] = f"m{number}"
        self.replies = self.answering(asked)
        return [message.metadata.message_id for message in asked]

    def pull_messages(self, names: list[str]) -> list[Message]:
        found, self.replies = self.replies, []
        return found


def damaged_bytes(chance: random.Random, data: bytes) -> bytes:
    """The bytes of an array with a few of them changed, or with more or fewer."""
    kind = chance.randrange(8)
    if kind < 3:
        changed = bytearray(data)
        for _ in range(chance.randrange(1, 4)):
            changed[chance.randrange(len(data))] = chance.randrange(256)
        return bytes(changed)
    if kind == 3:  # the text of the header, where a parser would be led astray
        changed = bytearray(data)
        changed[chance.randrange(10, 100)] = chance.choice(b"(){}[]'<>|=fiOV0123456789, LTrueFalse\x00\xff")
        return bytes(changed)
    if kind == 4:
        return data[: chance.randrange(len(data))]
    if kind == 5:
        return data + chance.randbytes(chance.randrange(1, 300))
    if kind == 6:
        return chance.randbytes(chance.randrange(300))
    return data[:8] + chance.randbytes(2) + data[10:]  # the header's length


def damaged_array(chance: random.Random, array: Array) -> Array:
    """An array of which one field is another."""
    fields: dict[str, Any] = {name: getattr(array, name) for name in ("dtype", "shape", "stype", "data")}
    kind = chance.randrange(9)
    if kind == 0:
        fields["dtype"] = chance.choice(DTYPES)
    elif kind == 1:
        fields["shape"] = chance.choice(SHAPES)
    elif kind == 2:
        fields["stype"] = chance.choice(STYPES)
    elif kind == 3:  # well formed, and another
        value = np.zeros([chance.randrange(5) for _ in range(chance.randrange(4))], chance.choice(DTYPES[:5]))
        return Array(value)
    elif kind == 4 and array.dtype.startswith("float"):  # well formed, with a value of its own
        value = array.numpy().copy()
        value.flat[chance.randrange(value.size)] = chance.choice([math.nan, math.inf, -math.inf, 1e-40, 65504.0, -0.0])
        return Array(value)
    else:
        fields["data"] = damaged_bytes(chance, array.data)
    return Array(**fields)


def damaged(chance: random.Random, good: RecordDict) -> RecordDict:
    """An honest answer with one or more things wrong, or none."""
    honest, facts = contents(good["update"]), dict(contents(good["facts"]))
    arrays = dict(honest)
    found: dict[str, Any] = {}
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        kind = chance.randrange(12)
        name = chance.choice(list(arrays)) if arrays else ""
        if kind < 5 and arrays:
            arrays[name] = damaged_array(chance, honest.get(name, next(iter(honest.values()))))
        elif kind == 5:
            arrays.pop(name, None)
        elif kind == 6 and arrays:
            arrays[chance.choice(NAMES)] = arrays[name]
        elif kind == 7:
            facts[chance.choice(KEYS)] = chance.choice(NUMBERS + LISTS)
        elif kind == 8:
            facts[chance.choice(list(facts) or ["x"])] = chance.choice(NUMBERS + LISTS)
        elif kind == 9:
            facts.pop(chance.choice(list(facts) or ["x"]), None)
        elif kind == 10:
            facts |= MANY if chance.random() < 0.1 else {}
        else:
            odd = chance.choice([ArrayRecord(), MetricRecord(), ConfigRecord({"x": "y"}), ConfigRecord({"b": b"\0"})])
            found[chance.choice(["update", "facts", "", "order", "third"])] = odd
    records = {"update": holding(ArrayRecord(), arrays), "facts": holding(MetricRecord(), facts), **found}
    if chance.random() < 0.02:
        records.pop(chance.choice(list(records)))
    return RecordDict(records)


def contents(record: Any) -> dict[str, Any]:
    """What a record of Flower holds."""
    found: dict[str, Any] = record.__dict__["_data"]
    return found


def holding(record: Any, values: dict[str, Any]) -> Any:
    """A record that holds values without Flower's checks on the way in, which a stranger's process need not make."""
    record.__dict__["_data"].update(values)
    return record


def letters(chance: random.Random, asked: list[Message], good: RecordDict) -> Iterator[tuple[Message, RecordDict]]:
    """A round's replies with what each holds: errors, replies to nothing, in another's name, twice, and not at all."""
    for message in asked:
        kind = chance.random()
        if kind < 0.03:
            continue
        if kind < 0.08:
            error = Error(chance.choice([-1, 0, 1, 3, 1 << 30]), chance.choice(REASONS))
            failed = Message(error, reply_to=message)
            failed.metadata.__dict__["_src_node_id"] = 1  # the link answers for the node
            yield failed, RecordDict()
            continue
        content = damaged(chance, good)
        reply = Message(content, reply_to=message)
        if kind < 0.12:
            reply.metadata.__dict__["_reply_to_message_id"] = chance.choice(["", "nothing", "m99999", "m-1"])
        elif kind < 0.16:  # to a message that went to another node
            other = chance.choice(asked)
            reply.metadata.__dict__["_reply_to_message_id"] = other.metadata.message_id
        elif kind < 0.20:
            reply.metadata.__dict__["_group_id"] = chance.choice(["", "7", "-1", "x"])
        yield reply, content
        if kind > 0.95:
            yield Message(damaged(chance, good), reply_to=message), RecordDict()


def as_read_by_numpy(content: RecordDict, encoding: Encoding) -> dict[str, torch.Tensor]:
    """What the bytes of an accepted answer say, read without any check: the ends of its arrays, tensor by tensor."""
    found = {}
    like = expected(ADAPTER, encoding)
    unread = {dtype: array.data for dtype, array in content["update"].items()}
    for name in sorted(like, reverse=True):
        dtype = str(like[name].dtype).removeprefix("torch.")
        length = like[name].numel() * like[name].element_size()
        unread[dtype], end = unread[dtype][:-length], unread[dtype][-length:]
        found[name] = torch.from_numpy(np.frombuffer(end, dtype).reshape(like[name].shape).copy())
    return decode(found, ADAPTER, encoding)


class Counted(logging.Handler):
    """Counts the lines of the log by what they say, a million here, and shows none."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = Counter[str]()

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == exchange.DROPPED:
            self.lines[f"dropped: {record.args[-1]}"] += 1  # type: ignore[index]


@pytest.fixture
def log() -> Iterator[Counter[str]]:
    """What the server says of replies that it drops: why, and how many."""
    logger = logging.getLogger("flwr")
    before = logger.handlers, logger.level
    counted = Counted()
    logger.handlers, logger.level = [counted], logging.WARNING
    yield counted.lines
    logger.handlers, logger.level = before


def test_replies_of_which_any_field_may_be_anything_are_read_right_or_refused(log: Counter[str]) -> None:
    chance, seen = random.Random(5), Counter[str]()
    update = ClientUpdate(0, ADAPTER, 7, {"loss": 0.5, "steps": 3.0})
    nodes = {client: 1000 + 7 * client for client in range(COHORT)}
    mailbox: Any = Mailbox()
    configs = {
        encoding: Config(
            model=ModelSection(name="none"),
            federation=FederationSection(clients_per_round=COHORT),
            communication=CommunicationSection(encoding=encoding, deadline_s=1e-9, grace_s=0.0),
        )
        for encoding in ENCODINGS
    }
    honest = {
        encoding: messages.update_content(encode(ADAPTER, encoding, torch.Generator().manual_seed(0)), update, {})
        for encoding in ENCODINGS
    }
    order = Order("train", "", 0)
    for encoding in itertools.cycle(ENCODINGS):
        if seen["replies"] >= COUNT:
            break
        good = honest[encoding]
        sent: list[tuple[Message, RecordDict]] = []

        def answering(asked: list[Message], good: RecordDict = good, sent: Any = sent) -> list[Message]:
            sent += list(letters(chance, asked, good))
            chance.shuffle(sent)
            return [reply for reply, _ in sent]

        mailbox.answering = answering
        updates = engine.run_clients(
            ADAPTER, range(COHORT), 3, config=configs[encoding], grid=mailbox, nodes=nodes, order=order
        )
        accepted, rejected = validate(updates, ADAPTER, range(COHORT))
        assert [found.client_id for found in updates] == list(range(COHORT))
        assert len(accepted) + len(rejected) == COHORT
        first: dict[int, RecordDict] = {}
        for reply, content in sent:  # of a node's several replies to its message the first counts
            if not reply.has_error() and reply.metadata.reply_to_message_id == f"m{_client(reply)}":
                first.setdefault(_client(reply), content)
        for found in accepted:
            content = first[found.client_id]
            said = as_read_by_numpy(content, encoding) if content else None
            for name, tensor in found.delta.items():
                assert (tensor.shape, tensor.dtype) == (ADAPTER[name].shape, ADAPTER[name].dtype)
                assert said is None or torch.equal(tensor, said[name])
            assert 0 < found.num_examples < 1 << 53
            assert len(found.metrics) <= 34
        silent = sum(found.failure.startswith("did not answer") for found in updates)
        seen.update(clients=COHORT, silent=silent)
        seen.update(replies=len(sent), accepted=len(accepted), refused=len(rejected) - silent)
    print({**seen, **log})
    # Every client that was asked, and every reply that came, is in one of the counts.
    assert seen["clients"] == seen["accepted"] + seen["refused"] + seen["silent"]
    assert seen["replies"] == seen["accepted"] + seen["refused"] + log.total()
    assert set(log) == {f"dropped: {reason}" for reason in DROPPED}
    assert min(seen["accepted"], seen["refused"]) > seen["replies"] / 10


def _client(reply: Message) -> int:
    """The client whose node sent a reply."""
    return (reply.metadata.src_node_id - 1000) // 7
