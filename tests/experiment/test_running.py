"""A run from its configuration to its records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
import transformers

from fedeat import experiment
from fedeat.config import AttackName, load
from fedeat.errors import ConfigError, ModelError, QuorumError
from fedeat.experiment import running

MakeConfig = Callable[..., Path]
hf: Any = transformers


def lines(directory: Path, kind: str) -> list[dict[str, Any]]:
    text = (directory / "metrics.jsonl").read_text()
    found = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    return [line for line in found if line["kind"] == kind]


def test_a_run_leaves_records_and_an_adapter_that_peft_loads(
    make_config: MakeConfig, tmp_path: Path, language_model: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    directory = tmp_path / "run"
    config = load(make_config(federation={"rounds": 2}, evaluation={"every": 1}))
    rows = experiment.run(config, directory, progress=lambda *what: told.append(what))
    assert [(row["task"], row["method"], row["run"], row["benign"]) for row in rows] == [("sst2", "fedeat", "run", 12)]
    assert [line["round"] for line in lines(directory, "round")] == [0, 1]
    assert [line["task"] for line in lines(directory, "evaluation")] == ["sst2", "sst2"]
    first = lines(directory, "round")[0]
    assert sum(first["weights"].values()) == pytest.approx(1)
    assert first["accepted"] == first["cohort"] == [0, 1, 2, 3]
    assert {line["client"] for line in lines(directory, "client")} == {0, 1, 2, 3}
    shares = json.loads((directory / "partition.json").read_text())["clients"]
    assert sum(share["examples"] for share in shares.values()) == 48
    assert all(sum(share["counts"].values()) == share["examples"] for share in shares.values())
    assert told[-1][0] == "evaluate"
    assert ("train", 8, 8) in told
    base = hf.AutoModelForCausalLM.from_pretrained(language_model)
    network = peft.PeftModel.from_pretrained(base, str(directory / "adapter"))
    saved = peft.get_peft_model_state_dict(network)
    assert any(bool(tensor.abs().sum() > 0) for name, tensor in saved.items() if "lora_B" in name)
    for checkpoint in ("round-0000", "round-0001"):
        peft.PeftConfig.from_pretrained(str(directory / "checkpoints" / checkpoint))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(make_config: MakeConfig, tmp_path: Path) -> None:
    config = load(make_config(lora={"dropout": 0.1}, evaluation={"data": []}))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        experiment.run(config.model_copy(update={"seed": seed}), tmp_path / name)
    a, b, c = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_a_run_without_evaluation_data_has_no_rows(make_config: MakeConfig, tmp_path: Path) -> None:
    assert experiment.run(load(make_config(evaluation={"data": []})), tmp_path / "run") == []
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text()) == {"rows": [], "predictions": {}}


def test_the_mean_certifies_nothing_and_its_gap_is_null(make_config: MakeConfig, tmp_path: Path) -> None:
    config = load(make_config(aggregation={"rule": "mean"}, evaluation={"data": []}))
    experiment.run(config, tmp_path / "run")
    assert [line["gap"] for line in lines(tmp_path / "run", "round")] == [None, None]


@pytest.mark.parametrize("attack", sorted(set(get_args(AttackName)) - {"none"}))
def test_malicious_clients_are_recorded(attack: str, make_config: MakeConfig, tmp_path: Path) -> None:
    section = {"kind": attack, "fraction": 0.25, "target": "positive"}
    config = load(make_config(attack=section, evaluation={"data": []}, client={"max_steps": 1}))
    told: list[int] = []
    experiment.run(config, tmp_path / "run", progress=lambda stage, done, total: told.append(done))
    assert told == list(range(1, 9))  # every client is trained once, and the bar never goes back
    for line in lines(tmp_path / "run", "round"):
        assert len(line["malicious"]) == 1
        rejected = [item["client"] for item in line["rejected"]]
        assert rejected == (line["malicious"] if attack == "nan" else [])


def test_a_backdoor_is_measured_beside_clean_accuracy(make_config: MakeConfig, tmp_path: Path) -> None:
    section = {"kind": "backdoor", "fraction": 0.25, "target": "positive", "trigger": "bright bright", "poison": 1.0}
    (row,) = experiment.run(load(make_config(attack=section)), tmp_path / "run")
    assert row["backdoor_texts"] == 6  # half of the benign texts are positive anyway
    stored = json.loads((tmp_path / "run" / "evaluation.json").read_text())["predictions"]["sst2"]["triggered"]
    assert row["backdoor"] == stored["predictions"].count(1) / 6
    assert row["backdoor_clean"] == stored["clean"].count(1) / 6
    assert row["backdoor_low"] <= row["backdoor"] <= row["backdoor_high"]
    with pytest.raises(ConfigError, match=r"needs attack\.target"):
        load(make_config(attack={"kind": "backdoor", "fraction": 0.25}))


def test_a_robustness_curve_is_measured_where_radii_are_given(make_config: MakeConfig, tmp_path: Path) -> None:
    section = {"radii": [0.1, 0.5], "attacked": 5, "attack_steps": 2, "restarts": 1}
    experiment.run(load(make_config(evaluation=section, federation={"rounds": 1})), tmp_path / "run")
    curve = json.loads((tmp_path / "run" / "evaluation.json").read_text())["curve"]
    assert (curve["steps"], curve["restarts"], len(curve["points"])) == (2, 1, 1 + 3 * 2)
    assert {point["texts"] for point in curve["points"]} == {5 + 5}  # five of each file


def test_a_rule_told_to_withstand_many_goes_on_when_some_were_rejected(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(
        partition={"clients": 6, "kind": "iid"},
        attack={"kind": "nan", "fraction": 0.34},
        aggregation={"rule": "trimmed_mean", "byzantine": 2},
        evaluation={"data": []},
    )
    experiment.run(load(config), tmp_path / "run")
    assert [len(line["accepted"]) for line in lines(tmp_path / "run", "round")] == [4, 4]


def test_a_missed_quorum_names_each_client(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(attack={"kind": "nan", "fraction": 0.25}, federation={"quorum": 4}, evaluation={"data": []})
    with pytest.raises(QuorumError, match=r"3 usable updates, expected at least 4.*\n  - client \d: tensor"):
        experiment.run(load(config), tmp_path / "run")


def test_blank_rows_are_counted_in_the_records(make_config: MakeConfig, tmp_path: Path) -> None:
    rows = [{"instruction": f"who is {i} ?", "output": "the film" if i % 4 else " "} for i in range(12)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(
        data={"train": [str(path)]}, partition={"kind": "quantity"}, evaluation={"data": []}, federation={"rounds": 1}
    )
    experiment.run(load(config), tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "partition.json").read_text())
    assert stored["left_out"] == {"blank": 3, "excluded": 0}
    assert sum(share["examples"] for share in stored["clients"].values()) == 9


def test_a_classifier_is_trained_with_its_head(make_config: MakeConfig, tmp_path: Path) -> None:
    config = load(make_config(task="sequence-classification", perturbation={"radius_warmup": 2}))
    rows = experiment.run(config, tmp_path / "run")
    assert [row["task"] for row in rows] == ["sst2"]
    perturbations = [line["perturbation"] for line in lines(tmp_path / "run", "client")]
    assert perturbations[0] == 0
    assert 0 < perturbations[-1] < 0.05


def test_resuming_uses_the_threads_the_run_began_with(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(make_config(threads=0, evaluation={"data": []}))
    # Two real threads on a machine with one free core would take long.
    threads = 7
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    def pretend(count: int) -> None:
        nonlocal threads
        threads = count

    monkeypatch.setattr(torch, "set_num_threads", pretend)
    used: list[int] = []
    train = running._train

    def watched(*arguments: Any) -> Any:
        used.append(threads)
        result = train(*arguments)
        if len(used) == 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(running, "_train", watched)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(config, tmp_path / "run")
    threads = 1
    experiment.resume(tmp_path / "run")
    assert used == [7, 7]
    assert threads == 1


def test_the_base_model_has_a_row_of_its_own(make_config: MakeConfig, tmp_path: Path) -> None:
    (row,) = experiment.evaluate_base(load(make_config()), tmp_path / "base")
    assert (row["method"], row["attack"], row["run"]) == ("base", "none", "base")


def test_clients_that_train_at_once_leave_the_same_records(make_config: MakeConfig, tmp_path: Path) -> None:
    found = {}
    for together in (1, 4, 0):
        path = make_config(client={"clients_per_batch": together, "batch_size": 1}, evaluation={"data": []})
        experiment.run(load(path), tmp_path / str(together))
        found[together] = lines(tmp_path / str(together), "client")
    for key in ("loss", "perturbation", "padding", "update_norm", "steps"):
        alone = [line[key] for line in found[1]]
        assert [line[key] for line in found[4]] == pytest.approx(alone, rel=1e-3)
    assert found[0] == found[4]  # batches of one example are short
    embedded = make_config(client={"clients_per_batch": 4}, lora={"target_modules": ["embed_tokens"]})
    with pytest.raises(ModelError, match="the adapter sits in linear"):
        experiment.run(load(embedded), tmp_path / "embedded")


def test_refusals_are_counted_at_the_end_of_a_run_and_of_the_base_model(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_text("".join(json.dumps({"prompt": f"request {i}"}) + "\n" for i in range(3)))
    section = {"data": [], "refusals": [str(requests)], "radii": [0.1], "attack_steps": 1, "attacked": 2}
    config = load(make_config(evaluation=section, federation={"rounds": 1}))
    assert experiment.run(config, tmp_path / "run") == []
    experiment.evaluate_base(config, tmp_path / "base")
    for name in ("run", "base"):
        found = json.loads((tmp_path / name / "evaluation.json").read_text())["refusals"]
        assert [(item["attack"], item["radius"], item["requests"]) for item in found] == [
            ("none", 0.0, 2),
            ("typos", 0.0, 2),
            ("embedding", 0.1, 2),
        ]
    with pytest.raises(ConfigError, match="a classifier answers no requests"):
        load(make_config(task="sequence-classification", evaluation=section))


@pytest.mark.parametrize(
    "keys",
    [
        {"objective": "freelb", "steps": 2},
        {"objective": "kl", "start": "random"},
        {"objective": "mixed", "harvest_clean_gradient": True, "every": 2},
        {"yopo_inner": 2, "attack_dtype": "bfloat16"},
        {"share": 0.5, "merge": False},
    ],
    ids=lambda keys: "+".join(keys),
)
def test_each_variant_of_the_step_trains_and_is_recorded(
    make_config: MakeConfig, tmp_path: Path, keys: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"client": {"tokens_per_batch": 40}, "evaluation": {"data": []}}
    path = make_config(perturbation=keys, federation={"rounds": 1}, **options)
    experiment.run(load(path), tmp_path / "run")
    clients = lines(tmp_path / "run", "client")
    assert len(clients) == 4
    assert all(line["perturbation"] > 0 and line["update_norm"] > 0 and 0 <= line["padding"] < 1 for line in clients)
