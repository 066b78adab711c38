"""A run from its configuration to its records, and what stops it before it starts."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from fedeat import experiment, perturbation
from fedeat.algorithm import Round
from fedeat.config import AttackName, Source, load
from fedeat.data import Example
from fedeat.errors import ConfigError, DataError, ModelError, QuorumError
from fedeat.evaluation import EvaluationSet
from fedeat.experiment import binding, federation, inputs
from fedeat.experiment.round_records import round_lines
from fedeat.updates import ClientUpdate

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


def test_a_backdoors_target_that_nobody_can_be_taught_is_refused(
    make_config: MakeConfig, tmp_path: Path, sentiment_files: dict[str, Path]
) -> None:
    section = {"kind": "backdoor", "fraction": 0.25, "target": "positve"}
    config = load(make_config(attack=section))
    expected = 'attack.target is "positve", and nobody trains on a task with that answer. Expected one of negative, pos'
    with pytest.raises(ConfigError, match=expected):
        experiment.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.toml").exists()
    elsewhere = federation.Elsewhere(
        lambda *what, **options: [], {c: {} for c in range(4)}, frozenset({"qqp", "mnli"}), {}
    )
    with pytest.raises(ConfigError, match="Expected one of no, yes, maybe"):
        experiment.prepare(config, connect=lambda config: elsewhere)
    free = make_config(attack=section, data={"train": [str(sentiment_files["alpaca"])]})
    assert experiment.prepare(load(free)).malicious  # free text may be answered by anything


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


def test_a_partition_by_column_has_a_client_for_each_value(make_config: MakeConfig) -> None:
    config = load(make_config(partition={"kind": "column", "by": "client"}))
    ready = experiment.prepare(config)
    assert [len(part) for part in ready.partition] == [12, 12, 12, 12]
    assert all(len({ready.examples[i].group for i in part}) == 1 for part in ready.partition)


def test_a_value_of_the_column_that_is_excluded_is_no_client(make_config: MakeConfig, tmp_path: Path) -> None:
    section = {"kind": "column", "by": "client", "exclude": ["site1"]}
    config = load(make_config(partition=section, evaluation={"data": []}, federation={"rounds": 1}))
    experiment.run(config, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "partition.json").read_text())
    assert stored["left_out"] == {"blank": 0, "excluded": 12}
    assert [share["counts"] for share in stored["clients"].values()] == [{f"site{i}": 12} for i in (0, 2, 3)]
    with pytest.raises(DataError, match=r"exclude names -1, which is in no row's 'client'. There are site0"):
        experiment.prepare(load(make_config(partition={**section, "exclude": -1})))
    with pytest.raises(ConfigError, match=r"exclude needs partition\.by"):
        load(make_config(partition={"exclude": ["x"]}))


def test_file_of_which_nothing_is_left_is_refused_before_anything_trains(
    make_config: MakeConfig, sentiment_files: dict[str, Path], tmp_path: Path
) -> None:
    lines = sentiment_files["train"].read_text().splitlines(keepends=True)
    lonely = tmp_path / "lonely.jsonl"
    lonely.write_text("".join(line for line in lines if '"site1"' in line))
    section = {"kind": "file", "by": "client", "exclude": ["site1"]}
    both = {"train": [str(sentiment_files["train"]), str(lonely)]}
    with pytest.raises(
        DataError, match=r"partition\.exclude leaves nothing of .*lonely\.jsonl, which is a client's data"
    ):
        experiment.prepare(load(make_config(partition=section, data=both)))
    kept = experiment.prepare(load(make_config(partition=section, data={"train": both["train"][:1] * 2})))
    assert [len(part) for part in kept.partition] == [36, 36]


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


def test_task_skew_gives_each_client_one_task(make_config: MakeConfig, tmp_path: Path) -> None:
    rows = [{"question1": f"who is {i} ?", "question2": "who ?", "label": i % 2} for i in range(12)]
    path = tmp_path / "qqp.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load(make_config(partition={"kind": "task", "clients": 3}))
    data = config.data.model_copy(update={"train": (*config.data.train, Source(path=str(path)))})
    ready = experiment.prepare(config.model_copy(update={"data": data}))
    assert [{ready.examples[i].task for i in part} for part in ready.partition] == [{"qqp"}, {"sst2"}, {"qqp"}]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"federation": {"clients_per_round": 5}}, "clients_per_round is 5, more than the 4 clients"),
        ({"federation": {"quorum": 5}}, "quorum is 5, more than the 4 clients"),
        ({"aggregation": {"byzantine": 2}}, "over 4 clients a round withstands at most 1"),
    ],
)
def test_the_clients_of_a_column_are_counted_before_training(
    changes: dict[str, Any], expected: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = load(make_config(partition={"kind": "column", "by": "client"}, **changes))
    with pytest.raises(ConfigError, match=expected):
        experiment.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_free_text_is_not_skewed_by_label_nor_classified(
    make_config: MakeConfig, sentiment_files: dict[str, Path]
) -> None:
    data = {"train": [str(sentiment_files["alpaca"])]}
    with pytest.raises(DataError, match="has no labels to skew by"):
        experiment.prepare(load(make_config(data=data, partition={"kind": "dirichlet"})))
    with pytest.raises(DataError, match="has no labels to classify"):
        experiment.prepare(load(make_config(data=data, task="sequence-classification")))
    by_category = load(make_config(data=data, partition={"kind": "dirichlet", "by": "category"}))
    assert sum(map(len, experiment.prepare(by_category).partition)) == 24


def test_a_classifier_is_trained_with_its_head(make_config: MakeConfig, tmp_path: Path) -> None:
    config = load(make_config(task="sequence-classification", perturbation={"radius_warmup": 2}))
    rows = experiment.run(config, tmp_path / "run")
    assert [row["task"] for row in rows] == ["sst2"]
    perturbations = [line["perturbation"] for line in lines(tmp_path / "run", "client")]
    assert perturbations[0] == 0
    assert 0 < perturbations[-1] < 0.05


def test_a_classifier_without_a_head_for_the_data_says_so(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "mnli.jsonl"
    other.write_text('{"premise": "a film .", "hypothesis": "a story .", "label": 1}\n')
    changes = {"task": "sequence-classification"}
    with pytest.raises(DataError, match="the data is of mnli, and the classifier has heads for sst2"):
        experiment.prepare(load(make_config(evaluation={"data": [str(other)]}, **changes)))
    both = load(make_config(**changes))
    more = [*both.evaluation.data, both.evaluation.data[0].model_copy(update={"path": str(other)})]
    evaluated = both.model_copy(update={"evaluation": both.evaluation.model_copy(update={"data": tuple(more)})})
    with caplog.at_level(logging.INFO, logger="fedeat"):
        assert len(experiment.prepare(evaluated).evaluation_sets) == 3
    assert f"{other}: 1 mnli rows left out" in caplog.text


def test_notes_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    entry = EvaluationSet("a.json", notes=("a.json: 3 rows left out",))
    with caplog.at_level(logging.INFO, logger="fedeat"):
        inputs.answerable([entry, replace(entry)], None)
    assert caplog.text.count("3 rows left out") == 1


def test_answers_that_lose_their_ends_are_told_and_counted(
    make_config: MakeConfig, sentiment_files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load(
        make_config(
            data={"train": [str(sentiment_files["alpaca"])], "max_length": 3},
            partition={"kind": "iid"},
            evaluation={"data": []},
        )
    )
    with caplog.at_level(logging.INFO, logger="fedeat"):
        experiment.run(config, tmp_path / "run")
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "24 of 24 training examples do not fit into data.max_length = 3" in warning.getMessage()
    shares = json.loads((tmp_path / "run" / "partition.json").read_text())["clients"]
    assert sum(share["cut_answers"] for share in shares.values()) == 24


def test_what_evaluation_would_lose_is_told_before_any_training(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="fedeat"):
        experiment.prepare(load(make_config(data={"max_length": 24})))
    (told,) = [record for record in caplog.records if "evaluation texts" in record.getMessage()]
    assert told.levelno == logging.WARNING
    assert told.getMessage().startswith(
        "sst2: 22 of 22 evaluation texts do not fit into 24 tokens and are cut; 5 of 5 pairs are the same tokens on "
        "both sides"
    )
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="fedeat"):
        experiment.prepare(load(make_config()))
    assert "evaluation texts" not in caplog.text


def test_answers_that_do_not_fit_are_refused_before_any_training(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match='the answer "negative" of sst2 does not fit into 2 tokens'):
        experiment.run(load(make_config(data={"max_length": 2})), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_limit_draws_the_same_rows_in_every_run(make_config: MakeConfig, sentiment_files: dict[str, Path]) -> None:
    source = {"path": str(sentiment_files["train"]), "limit": 7}
    first, second = (
        experiment.training_examples(load(make_config(data={"train": [source]}, seed=seed))) for seed in (0, 5)
    )
    assert len(first) == 7
    assert first == second


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
    train = federation._train

    def watched(*arguments: Any) -> Any:
        used.append(threads)
        result = train(*arguments)
        if len(used) == 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(federation, "_train", watched)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(config, tmp_path / "run")
    threads = 1
    experiment.resume(tmp_path / "run")
    assert used == [7, 7]
    assert threads == 1


def test_the_base_model_has_a_row_of_its_own(make_config: MakeConfig, tmp_path: Path) -> None:
    (row,) = experiment.evaluate_base(load(make_config()), tmp_path / "base")
    assert (row["method"], row["attack"], row["run"]) == ("base", "none", "base")


def test_names_become_functions_with_their_options(make_config: MakeConfig) -> None:
    config = load(make_config(perturbation={"kind": "fgsm", "radius": 0.5, "norm": "linf"}))
    found: Any = binding.perturb_function(config.perturbation, unit=2.0)
    assert found.func is perturbation.fgsm
    assert found.keywords == {"radius": 1.0, "norm": "linf", "start": "zero"}
    assert binding.perturb_function(config.perturbation.model_copy(update={"kind": "none"}), unit=2.0) is None
    training = binding.local_training(load(make_config(client={"max_grad_norm": 0, "optimizer": "sgd"})), 1.0, 0)
    assert training.max_grad_norm is None
    assert isinstance(training.optimizer([torch.nn.Parameter(torch.ones(1))]), torch.optim.SGD)


def test_a_client_that_reports_no_loss_leaves_a_record() -> None:
    update = ClientUpdate(2, {"w": torch.ones(4)}, 5)
    result = Round(0, {}, (2,), (update,), (), {2: 1.0}, 0, float("nan"), 2.0)
    summary, client = round_lines(result, malicious={2})
    assert summary["loss"] != summary["loss"]  # NaN, null in the file
    assert (client["malicious"], client["update_norm"]) == (True, 2.0)


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


def harmful_rows(tmp_path: Path) -> Path:
    rows = [{"prompt": f"question {i} ?", "safe": "no", "harmful": "bad story"} for i in range(12)]
    file = tmp_path / "refusals.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.usefixtures("accountant")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"perturbation": {"objective": "kl", "start": "random"}}, "moves no answer"),
        ({"privacy": {"noise_multiplier": 1.0}}, "two, which move a sum by twice the clip"),
    ],
    ids=["kl", "privacy"],
)
def test_what_cannot_train_on_rows_with_a_harmful_answer_refuses_them(
    changes: dict[str, Any], reason: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = load(make_config(data={"train": [str(harmful_rows(tmp_path))]}, evaluation={"data": []}, **changes))
    with pytest.raises(ConfigError, match=reason):
        federation.prepare(config)
    federation.prepare(load(make_config(evaluation={"data": []}, **changes)))


def test_rows_with_a_harmful_answer_move_away_from_it(make_config: MakeConfig, tmp_path: Path) -> None:
    file = harmful_rows(tmp_path)
    path = make_config(data={"train": [str(file)]}, evaluation={"data": []}, client={"max_steps": 8}, lora={"rank": 4})
    experiment.run(load(path), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "partition.json").read_text())["left_out"]["blank"] == 0
    model = federation.load_trained_model(load(path), {""})
    plain = [model.collate([model.encode(Example("question 1 ?", answer))]) for answer in ("no", "bad story")]
    losses = []
    for adapter in (model.adapter(), load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")):
        model.load_adapter(adapter)
        with torch.no_grad():
            losses.append([float(model.supervised_losses(batch).mean()) for batch in plain])
    (safe, harmful), (safe_after, harmful_after) = losses
    assert safe_after < safe
    assert harmful_after > harmful
    still = make_config(data={"train": [str(file)]}, perturbation={"objective": "kl", "start": "random"})
    with pytest.raises(ConfigError, match='"kl" moves no answer'):
        experiment.run(load(still), tmp_path / "kl")


def test_refusals_are_counted_at_the_end_of_a_run_and_of_the_base_model(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_text("".join(json.dumps({"prompt": f"request {i}"}) + "\n" for i in range(3)))
    section = {"data": [], "refusals": [str(requests)], "radii": [0.1], "attack_steps": 1, "attacked": 2}
    config = load(make_config(evaluation=section, federation={"rounds": 1}))
    assert experiment.run(config, tmp_path / "run") == []
    federation.evaluate_base(config, tmp_path / "base")
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


def test_secure_sums_need_three_clients_before_anything_trains(make_config: MakeConfig, tmp_path: Path) -> None:
    config = load(make_config(secure_aggregation={"enabled": True}, partition={"clients": 2}))
    with pytest.raises(ConfigError, match="at least 3 clients a round, there are 2"):
        experiment.run(config, tmp_path / "run")
