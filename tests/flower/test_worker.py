"""The warm worker: asked through a file that is its owner's alone, it answers or says why not, and goes on."""

from __future__ import annotations

import json
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedeat.config import load, to_toml
from fedeat.errors import ConfigError
from fedeat.flower import messages, worker
from fedeat.flower.client import Client, Node
from fedeat.flower.messages import Order
from fedeat.flower.supernode import call
from fedeat.model import Lora, ModelSource, load_model


@pytest.fixture
def socket_path(tmp_path: Path, sentiment_files: dict[str, Path]) -> Path:
    """Of a worker that runs in a thread until the tests end."""
    path = tmp_path / "w.sock"
    node = Node(data=(str(sentiment_files["train"]),), state=tmp_path / "state")
    threading.Thread(target=worker.serve, args=(path, node), daemon=True).start()
    while not path.exists():
        pass
    return path


def test_a_worker_describes_trains_and_refuses(
    socket_path: Path, make_config: Callable[..., Path], language_model: Path
) -> None:
    assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
    text = to_toml(load(make_config(evaluation={"data": []})))
    order = Order("describe", text, 0)
    facts = messages.read_facts(call(socket_path, messages.order_content(order, None)))
    assert (facts["examples"], facts["tasks"], facts["partition"]) == (48, ["sst2"], -1)
    prepare = Order("prepare", text, 0, tasks=("sst2",))
    assert messages.read_facts(call(socket_path, messages.order_content(prepare, None)))["counts"] == {}
    adapter = load_model(ModelSource(str(language_model), template="plain", max_length=64), lora=Lora(2)).adapter()
    train = messages.order_content(Order("train", text, 0, tasks=("sst2",)), adapter)
    update = messages.read_update(call(socket_path, train), 0, adapter, "float32")
    assert update.num_examples == 48
    assert any(bool(tensor.any()) for tensor in update.delta.values())
    again = messages.read_update(call(socket_path, train), 0, adapter, "float32")
    assert all(torch.equal(update.delta[name], again.delta[name]) for name in adapter)
    wrong = messages.order_content(Order("train", text, 0, tasks=("sst2",)), {"other": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="array 'float32' has shape"):
        call(socket_path, wrong)
    assert call(socket_path, messages.order_content(order, None))


@pytest.mark.usefixtures("accountant")
@pytest.mark.parametrize(
    "changes",
    [{"perturbation": {"objective": "kl", "start": "random"}}, {"privacy": {"noise_multiplier": 1.0}}],
    ids=["kl", "privacy"],
)
def test_a_node_refuses_what_would_train_its_rows_towards_a_harmful_answer_or_count_them_once(
    changes: dict[str, Any], make_config: Callable[..., Path], sentiment_files: dict[str, Path], tmp_path: Path
) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"prompt": "who ?", "safe": "no", "harmful": "bad story"}) + "\n")
    order = messages.order_content(Order("describe", to_toml(load(make_config(**changes))), 0), None)
    with pytest.raises(ConfigError, match="harmful"):
        Client(Node(data=(str(own),))).answer(order)
    Client(Node(data=(str(sentiment_files["train"]),))).answer(order)


def test_a_node_reads_its_own_files_and_runs_no_foreign_code_whatever_the_server_says(
    make_config: Callable[..., Path], sentiment_files: dict[str, Path], tmp_path: Path
) -> None:
    text = to_toml(
        load(make_config(model={"trust_remote_code": True}, attack={"kind": "label_flip", "fraction": 0.25}))
    )
    assert "trust_remote_code = true" in text
    client = Client(Node(data=(str(sentiment_files["benign"]),), model="elsewhere"))
    client.answer(messages.order_content(Order("describe", text, 0), None))
    run = client._run
    assert run is not None
    assert [source.path for source in run.config.data.train] == [str(sentiment_files["benign"])]
    assert not run.config.model.trust_remote_code
    assert run.config.model.name == "elsewhere"
    assert run.config.attack.kind == "none"
    assert run.config.evaluation.data == ()
