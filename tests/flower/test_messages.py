"""Answers from a stranger: read as asked for, or refused with a reason; never something in between."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedeat.engine.encoding import Encoding, encode
from fedeat.errors import UpdateError
from fedeat.flower import messages
from fedeat.flower.messages import Order
from fedeat.updates import ClientUpdate

ADAPTER = {"x.lora_A.weight": torch.linspace(-1, 1, 12).reshape(3, 4), "head": torch.tensor([0.5])}


def answer(encoding: Encoding = "float32", **metrics: Any) -> RecordDict:
    update = ClientUpdate(0, ADAPTER, 7, {"loss": 0.5, **metrics})
    return messages.update_content(encode(ADAPTER, encoding, torch.Generator().manual_seed(0)), update, {})


@pytest.mark.parametrize("encoding", ["float32", "float16", "bfloat16", "int8"])
def test_an_update_arrives_as_it_was_sent(encoding: Encoding) -> None:
    found = messages.read_update(answer(encoding), 5, ADAPTER, encoding)
    assert (found.client_id, found.num_examples, found.failure) == (5, 7, "")
    assert found.metrics["loss"] == 0.5
    for name, tensor in ADAPTER.items():
        torch.testing.assert_close(found.delta[name], tensor, rtol=0, atol=1 / 100)


def test_an_order_arrives_as_it_was_sent() -> None:
    order = Order("train", "seed = 1", 3, 2, ("", "sst2"), 4, "run 7", "0" * 64)
    assert messages.read_order(messages.order_content(order, ADAPTER)) == order


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"client": 2}, "'client', which is not a client's to report"),
        ({"kind": 1}, "'kind', which is not a client's to report"),
        ({"malicious": 0}, "'malicious', which is not"),
        ({"upload_bytes": 1}, "'upload_bytes', which is not"),
        ({"epsilon": 0.01}, "'epsilon', which is not"),
        ({"Loss!": 1.0}, "'Loss!', which is not"),
        ({"loss": [1.0, 2.0]}, "expected one number"),
        ({"num_examples": 0}, "num_examples must be a positive integer, got 0"),
        ({"num_examples": 2.5}, "num_examples must be a positive integer"),
        ({"num_examples": 1 << 60}, "num_examples must be a positive integer"),
        ({f"m{i}": 1.0 for i in range(40)}, "more than 32 numbers"),
    ],
)
def test_numbers_that_are_not_a_clients_are_refused(change: dict[str, Any], reason: str) -> None:
    content = answer()
    content["facts"] = MetricRecord({**content["facts"], **change})
    with pytest.raises(UpdateError, match=reason):
        messages.read_update(content, 0, ADAPTER, "float32")


def test_a_number_that_is_not_finite_is_recorded_as_such() -> None:
    assert math.isnan(messages.read_update(answer(loss=math.inf), 0, ADAPTER, "float32").metrics["loss"])


def test_other_records_are_refused() -> None:
    content = answer()
    content["text"] = ConfigRecord({"x": "y"})
    with pytest.raises(UpdateError, match="expected update and facts"):
        messages.read_update(content, 0, ADAPTER, "float32")
    with pytest.raises(UpdateError, match="expected update and facts"):
        messages.read_update(RecordDict(), 0, ADAPTER, "float32")
    with pytest.raises(UpdateError, match="expected update and facts"):
        messages.read_update(RecordDict({"update": MetricRecord(), "facts": MetricRecord()}), 0, ADAPTER, "float32")


def test_a_scale_that_is_not_finite_is_refused() -> None:
    content = answer("int8")
    record = dict(content["update"])
    # Of float32 there are the two scales alone, and that of the head is the first by name.
    record["float32"] = Array(torch.tensor([torch.inf, 1.0]).numpy())
    content["update"] = ArrayRecord(record)
    with pytest.raises(UpdateError, match="'head/scale' holds a NaN or an infinity"):
        messages.read_update(content, 0, ADAPTER, "int8")


@pytest.mark.parametrize(
    "facts",
    [
        {"examples": -1},
        {"examples": 1.5},
        {"examples": True},
        {"partition": -2},
        {"tasks": [1, 2]},
        {"tasks": ["x"] * 100},
        {"tasks": "sst2"},
        {"labels": ["a"], "counts": []},
        {"labels": ["a" * 1000], "counts": [1]},
    ],
)
def test_facts_of_another_form_are_refused(facts: dict[str, Any]) -> None:
    with pytest.raises(UpdateError):
        messages.read_facts(RecordDict({"facts": ConfigRecord(facts)}))


def test_orders_of_another_form_are_refused() -> None:
    good = Order("train", "", 0).record()
    for change in ({"step": "erase"}, {"config": 1}, {"tasks": [1]}, {"round": -5}, {"client": "0"}, {"threads": 1.5}):
        with pytest.raises(UpdateError):
            messages.read_order(RecordDict({"order": ConfigRecord({**good, **change})}))
    with pytest.raises(UpdateError, match="no order"):
        messages.read_order(RecordDict())
