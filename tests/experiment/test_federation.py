"""What a configuration makes ready to train, and what stops it before anything does."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedeat import experiment, perturbation
from fedeat.config import Source, load
from fedeat.data import Example
from fedeat.errors import ConfigError, DataError, ModelError
from fedeat.evaluation import EvaluationSet
from fedeat.experiment import binding, federation, inputs

MakeConfig = Callable[..., Path]


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


def test_names_become_functions_with_their_options(make_config: MakeConfig) -> None:
    config = load(make_config(perturbation={"kind": "fgsm", "radius": 0.5, "norm": "linf"}))
    found: Any = binding.perturb_function(config.perturbation, unit=2.0)
    assert found.func is perturbation.fgsm
    assert found.keywords == {"radius": 1.0, "norm": "linf", "start": "zero"}
    assert binding.perturb_function(config.perturbation.model_copy(update={"kind": "none"}), unit=2.0) is None
    training = binding.local_training(load(make_config(client={"max_grad_norm": 0, "optimizer": "sgd"})), 1.0, 0)
    assert training.max_grad_norm is None
    assert isinstance(training.optimizer([torch.nn.Parameter(torch.ones(1))]), torch.optim.SGD)


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


def test_secure_sums_need_three_clients_before_anything_trains(make_config: MakeConfig, tmp_path: Path) -> None:
    config = load(make_config(secure_aggregation={"enabled": True}, partition={"clients": 2}))
    with pytest.raises(ConfigError, match="at least 3 clients a round, there are 2"):
        experiment.run(config, tmp_path / "run")
