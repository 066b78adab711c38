"""One update a round, whoever asks for it again and whatever died in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict

from fedeat.config import load, to_toml
from fedeat.errors import RecordError, UpdateError
from fedeat.flower import messages
from fedeat.flower.client import Client, Node
from fedeat.flower.given import Given
from fedeat.flower.messages import Order
from fedeat.model import Lora, ModelSource, load_model
from fedeat.updates import Adapter, ClientUpdate

START = {"w": torch.zeros(2, 3), "head": torch.ones(1)}


def noisy() -> ClientUpdate:
    return ClientUpdate(3, {name: torch.randn_like(tensor) for name, tensor in START.items()}, 7, {"steps": 2.0})


def equal(one: Adapter, other: Adapter) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_round_that_is_asked_for_again_gets_the_same_update(on_disk: bool, tmp_path: Path) -> None:
    given = Given(tmp_path if on_disk else None)
    first = given.update(3, 5, START, noisy)
    again = (Given(tmp_path) if on_disk else given).update(3, 5, START, noisy)
    assert equal(again.delta, first.delta)
    assert (again.client_id, again.num_examples, again.metrics) == (3, 7, {"steps": 2.0})
    following = given.update(3, 6, START, noisy)
    assert not equal(following.delta, first.delta)
    assert equal(given.update(3, 6, START, noisy).delta, following.delta)


def test_another_adapter_or_an_earlier_round_is_refused(tmp_path: Path) -> None:
    given = Given(tmp_path)
    given.update(3, 5, START, noisy)
    for index, adapter in ((5, {**START, "head": torch.zeros(1)}), (4, START)):
        with pytest.raises(UpdateError, match=rf"answered round 5 before, and is asked for round {index}"):
            given.update(3, index, adapter, noisy)
    other = given.update(4, 0, START, lambda: ClientUpdate(4, START, 1))
    assert other.client_id == 4


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    Given(tmp_path).update(3, 0, START, noisy)
    (tmp_path / "client-0003" / "given.safetensors").write_bytes(b"no")
    with pytest.raises(RecordError, match=r"client-0003/given\.safetensors cannot be read.*one round more"):
        Given(tmp_path).update(3, 0, START, noisy)


@pytest.fixture
def adapter(language_model: Path) -> Adapter:
    """What the server sends first."""
    return load_model(ModelSource(str(language_model), template="plain", max_length=64), lora=Lora(2)).adapter()


@pytest.mark.usefixtures("accountant")
def test_a_node_that_was_killed_gives_the_update_of_its_round_and_no_second(
    make_config: Callable[..., Path], sentiment_files: dict[str, Path], adapter: Adapter, tmp_path: Path
) -> None:
    text = to_toml(load(make_config(privacy={"noise_multiplier": 1.0}, evaluation={"data": []})))
    node = Node(data=(str(sentiment_files["train"]),), state=tmp_path / "state")

    def asked(run: str, index: int = 0) -> Any:
        """What a node that has just been started answers."""
        order = Order("train", text, 0, index, tasks=("sst2",), run=run)
        return messages.read_update(Client(node).answer(messages.order_content(order, adapter)), 0, adapter, "float32")

    first = asked("one")
    assert equal(asked("one").delta, first.delta)
    assert set(first.metrics) == {"steps", "update_norm", "download_bytes", "upload_bytes"}
    assert not equal(asked("another").delta, first.delta)
    assert not equal(asked("one", 1).delta, first.delta)


def test_what_rounding_took_in_one_run_is_not_added_in_another(
    make_config: Callable[..., Path], sentiment_files: dict[str, Path], language_model: Path, tmp_path: Path
) -> None:
    def asked(state: str, run: str, index: int, rank: int = 2) -> RecordDict:
        changes = {"communication": {"encoding": "int8"}, "lora": {"rank": rank}, "federation": {"rounds": 9}}
        text = to_toml(load(make_config(**changes, evaluation={"data": []})))
        source = ModelSource(str(language_model), template="plain", max_length=64)
        order = messages.order_content(
            Order("train", text, 0, index, tasks=("sst2",), run=run), load_model(source, lora=Lora(rank)).adapter()
        )
        return Client(Node(data=(str(sentiment_files["train"]),), state=tmp_path / state)).answer(order)

    def sent(content: RecordDict) -> list[bytes]:
        return [array.data for array in content.array_records["update"].values()]

    for index in range(3):
        asked("silo", "one", index)
    fresh = sent(asked("fresh", "two", 5))
    assert sent(asked("silo", "two", 5)) == fresh
    assert sent(asked("silo", "one", 5)) != fresh
    assert sent(asked("silo", "two", 5, rank=3)) == sent(asked("other", "two", 5, rank=3))
