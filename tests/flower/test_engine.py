"""A federation over Flower's messages: the same bits as in one process, and what happens when clients fail."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from safetensors.torch import load_file, save_file

from fedeat import experiment
from fedeat.config import load, to_toml
from fedeat.errors import QuorumError
from fedeat.flower import client_app, engine, server_app
from fedeat.flower.client import Client, Node
from fedeat.flower.messages import Order

MakeConfig = Callable[..., Path]


def digest(directory: Path) -> str:
    return hashlib.sha256((directory / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def lines(directory: Path, kind: str) -> list[dict[str, Any]]:
    text = (directory / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


def context(partition: int) -> Context:
    return Context(
        run_id=1,
        node_id=partition,
        node_config={"partition-id": partition, "num-partitions": 4},
        state=RecordDict(),
        run_config={},
    )


def honest(partition: int) -> Callable[[Message], Message]:
    return lambda message: client_app.app(message, context(partition))


@pytest.fixture
def nodes() -> dict[int, Callable[[Message], Message | None]]:
    """Four nodes whose ids say nothing of their numbers."""
    return {907: honest(0), 12: honest(1), 450: honest(2), 33: honest(3)}


# On nodes clients train one by one; at once, sums are taken in another order.
SETTINGS: dict[str, Any] = {"evaluation": {"data": []}, "client": {"clients_per_batch": 1}}


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"dropout": 0.1}, "federation": {"clients_per_round": 3}},
        {"attack": {"kind": "sign_flip", "fraction": 0.25}, "communication": {"encoding": "bfloat16"}},
        {"attack": {"kind": "label_flip", "fraction": 0.25}, "task": "sequence-classification"},
        {"communication": {"encoding": "int8"}, "federation": {"rounds": 3}},
    ],
    ids=["dropout and cohorts", "attack on messages", "attack through data", "int8 with error feedback"],
)
def test_flower_and_one_process_agree_to_the_last_bit(
    changes: dict[str, Any],
    make_config: MakeConfig,
    tmp_path: Path,
    nodes: Any,
    local_grid: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load(make_config(**SETTINGS, **changes))
    experiment.run(config, tmp_path / "here")
    monkeypatch.setenv(client_app.STATE, str(tmp_path / "residuals"))
    client_app._client.cache_clear()
    server_app.run(local_grid(nodes), to_toml(config), tmp_path / "there")
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    here, there = (json.loads((tmp_path / place / "partition.json").read_text()) for place in ("here", "there"))
    if config.attack.kind != "label_flip":  # whose clients count the labels they train on
        assert here == there
    assert (tmp_path / "there" / "report.html").is_file()


def reply_with(message: Message, arrays: dict[str, Array], facts: dict[str, Any]) -> Message:
    return Message(RecordDict({"update": ArrayRecord(arrays), "facts": MetricRecord(facts)}), reply_to=message)


def test_bad_clients_are_left_out_by_name_and_the_round_goes_on(
    make_config: MakeConfig, tmp_path: Path, nodes: Any, local_grid: Any
) -> None:
    def twisted(node: Callable[[Message], Message], how: str) -> Callable[[Message], Message | None]:
        def answer(message: Message) -> Message | None:
            good = node(message)
            if message.metadata.message_type != "train" or message.content["order"]["round"] != 1:
                return good
            if how == "silent":
                return None
            if how == "claims to be another":
                facts = {**good.content["facts"], "client": 2}
                return reply_with(message, dict(good.content["update"]), facts)
            arrays = dict(good.content["update"])
            name = next(iter(arrays))
            value = arrays[name].numpy().copy()
            arrays[name] = Array(value * float("nan") if how == "nan" else value[:1])
            return reply_with(message, arrays, dict(good.content["facts"]))

        return answer

    config = load(
        make_config(
            **SETTINGS,
            federation={"rounds": 3, "quorum": 1},
            communication={"deadline_s": 1.0, "grace_s": 0.3},
        )
    )
    bad = {
        907: nodes[907],
        12: twisted(nodes[12], "nan"),
        450: twisted(nodes[450], "rank"),
        33: twisted(nodes[33], "silent"),
    }
    server_app.run(local_grid(bad), to_toml(config), tmp_path / "run")
    rounds = lines(tmp_path / "run", "round")
    assert [line["accepted"] for line in rounds] == [[0, 1, 2, 3], [0], [0, 1, 2, 3]]
    reasons = {item["client"]: item["reason"] for item in rounds[1]["rejected"]}
    assert "holds a NaN" in reasons[1]
    assert "has shape" in reasons[2]
    assert "did not answer within" in reasons[3]


def test_a_client_cannot_write_another_clients_record(
    make_config: MakeConfig, tmp_path: Path, nodes: Any, local_grid: Any
) -> None:
    def boaster(message: Message) -> Message:
        good = nodes[12](message)
        if message.metadata.message_type != "train":
            return good
        return reply_with(message, dict(good.content["update"]), {**good.content["facts"], "client": 2})

    config = load(make_config(**SETTINGS, federation={"rounds": 1}, communication={"grace_s": 0.0}))
    server_app.run(local_grid({**nodes, 12: boaster}), to_toml(config), tmp_path / "run")
    (line,) = lines(tmp_path / "run", "round")
    assert line["rejected"] == [
        {"client": 1, "reason": "reports a number called 'client', which is not a client's to report"}
    ]


def test_a_missed_quorum_names_each_client_and_leaves_the_reason_to_who_shows_it(
    make_config: MakeConfig, tmp_path: Path, nodes: Any, local_grid: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(node: Callable[[Message], Message]) -> Callable[[Message], Message]:
        def answer(message: Message) -> Message:
            if message.metadata.message_type == "train":
                raise RuntimeError("no disk")
            return node(message)

        return answer

    config = load(make_config(**SETTINGS, communication={"deadline_s": 1.0}))
    grid = local_grid({node: broken(answer) if node != 12 else answer for node, answer in nodes.items()})
    logging.getLogger("flwr").addHandler(caplog.handler)
    try:
        with pytest.raises(
            QuorumError, match=r"(?s)1 usable updates, expected at least 3.*client 0: failed: .*no disk"
        ):
            server_app.run(grid, to_toml(config), tmp_path / "run")
    finally:
        logging.getLogger("flwr").removeHandler(caplog.handler)
    assert "is left out" in caplog.text
    assert "usable updates" not in caplog.text
    left = json.loads((tmp_path / "run" / server_app.FAILURE).read_text())
    assert "client 3: failed" in left["error"]
    # The same command again, with the nodes repaired, goes on.
    server_app.run(local_grid(nodes), to_toml(config), tmp_path / "run")
    assert not (tmp_path / "run" / server_app.FAILURE).exists()
    assert len(lines(tmp_path / "run", "round")) == 2


@pytest.mark.usefixtures("accountant")
@pytest.mark.parametrize(
    ("section", "repeatable"),
    [({}, True), ({"noise_multiplier": 1.0}, False), ({"noise_multiplier": 1.0, "seeded": True}, True)],
    ids=["without noise", "with fresh noise", "with seeded noise"],
)
def test_an_order_to_train_is_repeated_only_where_its_answer_would_be_the_same(
    section: dict[str, Any], repeatable: bool, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def ask(grid: Any, contents: Any, **options: Any) -> dict[int, str]:
        asked.update(options)
        return dict.fromkeys(contents, "gone")

    monkeypatch.setattr(engine, "ask", ask)
    config, order = load(make_config(privacy=section)), Order("train", "", 0)
    engine.run_clients({}, [0], 3, config=config, grid=None, nodes={0: 7}, order=order)  # type: ignore[arg-type]
    assert asked["repeatable"] is repeatable


@pytest.mark.usefixtures("accountant")
def test_a_round_that_is_begun_again_shows_no_second_update_with_fresh_noise(
    make_config: MakeConfig, tmp_path: Path, nodes: Any, local_grid: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(message: Message) -> Message:
        if message.metadata.message_type == "train":
            raise RuntimeError("no disk")
        return honest(1)(message)

    def updates(grid: Any) -> set[bytes]:
        received = [message.content.array_records for message in grid.received if message.has_content()]
        return {array.data for found in received for array in found.get("update", {}).values()}

    monkeypatch.setenv(client_app.STATE, str(tmp_path / "residuals"))
    client_app._client.cache_clear()
    config = load(make_config(**SETTINGS, privacy={"noise_multiplier": 1.0}, federation={"rounds": 1, "quorum": 4}))
    first, second = local_grid({**nodes, 12: broken}), local_grid(nodes)
    with pytest.raises(QuorumError):
        server_app.run(first, to_toml(config), tmp_path / "run")
    client_app._client.cache_clear()
    server_app.run(second, to_toml(config), tmp_path / "run")
    assert len(updates(first)) == 3
    assert updates(first) < updates(second)
    (line,) = lines(tmp_path / "run", "round")
    assert line["epsilon"] == 1.0
    client_app._client.cache_clear()


def test_no_text_and_no_token_travels(make_config: MakeConfig, tmp_path: Path, nodes: Any, local_grid: Any) -> None:
    """Every message of a run is read: orders hold the configuration and the adapter, answers floats and counts."""
    config = load(make_config(**SETTINGS))
    grid = local_grid(nodes)
    server_app.run(grid, to_toml(config), tmp_path / "run")
    adapter_sizes = set()
    for message in grid.sent:
        assert set(message.content) <= {"order", "adapter"}
        assert message.content["order"]["config"] == to_toml(config)
    for message in grid.received:
        content = message.content
        assert set(content) <= {"update", "facts"}
        for array in content.array_records.get("update", {}).values():
            assert array.dtype == "float32"
        adapter_sizes.add(tuple(sorted(content.array_records.get("update", {}))))
        values = [value for record in content.metric_records.values() for value in record.values()]
        assert all(isinstance(value, int | float) for value in values)
        for record in content.config_records.values():
            assert set(record) <= {
                *("examples", "tasks", "partition", "cut_prompts", "cut_answers", "blank", "excluded"),
                *("labels", "counts", "base"),
            }
            texts = [item for value in record.values() if isinstance(value, list) for item in value]
            # Names of the task and its answers, which the format of the data gives, are all the words there are.
            assert {item for item in texts if isinstance(item, str)} <= {"sst2", "sst2:negative", "sst2:positive"}
    assert len(adapter_sizes) == 2  # the adapter's tensors, or none
    everything = b"".join(
        str(message.content.config_records).encode()
        + b"".join(array.data for record in message.content.array_records.values() for array in record.values())
        for message in (*grid.sent, *grid.received)
    )
    for word in (b"film", b"story", b"dull", b"bright"):
        assert word not in everything


def test_a_client_with_another_base_model_is_left_out_by_name(
    make_config: MakeConfig, tmp_path: Path, nodes: Any, local_grid: Any
) -> None:
    def another(message: Message) -> Message:
        answer = honest(1)(message)
        facts = answer.content.config_records.get("facts")
        if facts is not None and facts.get("base"):
            facts["base"] = "0" * 64
        return answer

    grid = local_grid({**nodes, 12: another})
    config = load(make_config(**SETTINGS, federation={"rounds": 1}))
    server_app.run(grid, to_toml(config), tmp_path / "run")
    (line,) = lines(tmp_path / "run", "round")
    assert line["accepted"] == [0, 2, 3]
    assert [item["client"] for item in line["rejected"]] == [1]
    assert "its base model is another than the server's" in line["rejected"][0]["reason"]
    trained = [message for message in grid.sent if message.metadata.message_type == "train"]
    assert 12 not in {message.metadata.dst_node_id for message in trained}


def test_a_client_that_could_not_say_what_its_base_model_is_trains_only_on_the_servers(
    make_config: MakeConfig, tmp_path: Path, nodes: Any, local_grid: Any, sentiment_files: Any, language_model: Path
) -> None:
    def late(model: Path, partition: int) -> Callable[[Message], Message]:
        client = Client(Node(data=(str(sentiment_files["train"]),), model=str(model)))

        def answer(message: Message) -> Message:
            if message.content["order"]["step"] == "prepare":
                raise RuntimeError("the disk is not there yet")
            return Message(client.answer(message.content, partition=partition), reply_to=message)

        return answer

    other = tmp_path / "other"
    shutil.copytree(language_model, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    grid = local_grid({**nodes, 12: late(other, 1), 450: late(language_model, 2)})
    config = load(make_config(**SETTINGS, federation={"rounds": 1, "quorum": 2}, communication={"grace_s": 0.0}))
    server_app.run(grid, to_toml(config), tmp_path / "run")
    (line,) = lines(tmp_path / "run", "round")
    assert line["accepted"] == [0, 2, 3]
    assert [item["client"] for item in line["rejected"]] == [1]
    assert "its base model is another than the server's" in line["rejected"][0]["reason"]
