"""Configurations: every problem at once, nothing lost on the way to TOML and back, shipped files parse."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedeat.config import Config, load, override, parse, schema, to_toml, with_values
from fedeat.errors import ConfigError

MakeConfig = Callable[..., Path]

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs").rglob("*.toml"))
DATA = {"train": ["hub/data"]}


def problems_of(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(raw)
    return "\n".join(caught.value.problems)


def minimal(**changes: Any) -> dict[str, Any]:
    return {"model": {"name": "hub/model"}, "data": DATA, **changes}


def test_only_the_model_and_the_data_must_be_set() -> None:
    assert parse(minimal()).federation.rounds == 10
    assert problems_of({}) == (
        "model: required, and not set.\ndata.train is empty. Expected at least one file or data set to train on."
    )


@pytest.mark.usefixtures("accountant")
def test_what_would_let_one_record_change_more_than_its_own_gradient_is_refused_with_privacy() -> None:
    section = {"noise_multiplier": 1.0}
    half = {"share": 0.5}
    assert "samples one at a time. Set share to 1." in problems_of(minimal(privacy=section, perturbation=half))
    assert parse(minimal(privacy=section, perturbation={**half, "kind": "none"})).perturbation.share == 0.5
    assert "lora.dropout draws from the run's seed" in problems_of(minimal(privacy=section, lora={"dropout": 0.1}))


def test_every_problem_is_reported_in_one_error(tmp_path: Path) -> None:
    found = problems_of(
        {
            "tsak": "causal-lm",
            "threads": "4",
            "model": {"nam": "x", "dtype": "float8"},
            "lora": {"rank": True, "target_modules": 5},
            "data": {"train": [f"{tmp_path}/absent.json", {"path": f"{tmp_path}/b.csv", "limt": 5}, {"limit": 0}, 7]},
            "federation": {"clients_per_round": 11, "quorum": 12, "rounds": 0},
            "perturbation": {"weight": -0.5, "radius": float("nan"), "step_size": float("inf")},
            "aggregation": {"rule": "krum", "byzantine": 5},
            "attack": {"kind": "sign_flip"},
            "evaluation": {"every": 2},
            "compare": {"methods": ["fedavg", "gmm"], "seeds": [0, -1]},
        }
    )
    for expected in (
        "tsak: unknown key. Did you mean 'task'?",
        "threads: input should be a valid integer, got '4'.",
        "model.name: required, and not set.",
        "model.nam: unknown key. Did you mean 'name'?",
        "model.dtype: input should be 'float32', 'bfloat16' or 'float16', got 'float8'.",
        "lora.rank: input should be a valid integer, got true.",
        "lora.target_modules: input should be a valid string or a valid list, got 5.",
        f"data.train: file {tmp_path}/absent.json does not exist.",
        f"data.train: file {tmp_path}/b.csv does not exist.",
        "data.train[1].limt: unknown key. Did you mean 'limit'?",
        "data.train[2].path: required, and not set.",
        "data.train[2].limit: input should be greater than or equal to 1, got 0.",
        "data.train[3]: input should be a table, got 7.",
        "federation.clients_per_round is 11, more than the 10 clients.",
        "federation.quorum is 12, more than the 11 clients a round.",
        "federation.rounds: input should be greater than or equal to 1, got 0.",
        "perturbation.weight is -0.5, expected >= 0. The paper's Eq. 2 prints a minus sign",
        "perturbation.radius: input should be a finite number, got nan.",
        "perturbation.step_size: input should be a finite number, got inf.",
        "aggregation.byzantine is 5, but krum over 11 clients a round withstands at most 4",
        'attack.kind is "sign_flip" but attack.fraction is 0.',
        "evaluation.every is 2 but evaluation.data is empty.",
        "compare.methods: unknown 'gmm'.",
        "compare.seeds[1]: input should be greater than or equal to 0, got -1.",
    ):
        assert expected in found
    assert len(found.splitlines()) == 24


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": 5}, "model: input should be a table, got 5."),
        ({"model": {"name": ""}}, "model.name: string should have at least 1 character"),
        ({"model": {"name": "./nowhere"}}, "model.name: directory ./nowhere does not exist."),
        ({"data": {"train": 3}}, "data.train: input should be a valid list, got 3."),
        ({"partition": {"kind": "column"}}, "needs partition.by, the name of a column"),
        ({"aggregation": {"space": "product", "rule": "trimmed_mean"}}, 'space = "product" needs a rule on distances'),
        (
            {"secure_aggregation": {"enabled": True}, "aggregation": {"rule": "krum"}},
            "sees no single update. Set it to",
        ),
        (
            {"secure_aggregation": {"enabled": True}, "aggregation": {"before": ["norm_clipping"], "space": "product"}},
            "aggregation.before: the server of secure_aggregation sees no single update. Leave it out.",
        ),
        ({"secure_aggregation": {"enabled": True}, "communication": {"encoding": "int8"}}, "sees no single update"),
        (
            {"secure_aggregation": {"enabled": True}, "attack": {"kind": "alie", "fraction": 0.3}},
            'attack.kind = "alie" is played on single updates',
        ),
        ({"secure_aggregation": {"sketch_width": 6}}, "sketch_width: input should be a multiple of 4, got 6"),
        ({"attack": {"fraction": 0.3}}, 'attack.kind is "none"'),
        ({"attack": {"kind": "nan", "fraction": 0.04}}, "attack.fraction is 0.04, which of 10 clients is nobody."),
        ({"attack": {"scale": 4.0}}, 'attack.scale is 4 but attack.kind is "none", which has none. Remove it;'),
        (
            {"attack": {"kind": "alie", "fraction": 0.3, "scale": 4.0}},
            'attack.scale is 4 but attack.kind is "alie", which has none.',
        ),
        (
            {"task": "sequence-classification", "evaluation": {"scorer": "generation"}},
            "a classifier generates nothing",
        ),
        ({"compare": {"seeds": [1, 1]}}, "compare.seeds has 1 more than once."),
        ({"compare": {"fractions": [0.3], "attacks": ["none"]}}, "compare.attacks names no attack"),
        ({"compare": {"fractions": [0.5]}}, "compare.fractions[0]: input should be less than 0.5, got 0.5."),
        ({"compare": {"scales": {"sign_flip": 0}}}, "compare.scales.sign_flip: input should be greater than 0, got 0."),
        (
            {"compare": {"scales": {"mimic": 2}}},
            "compare.scales.mimic: input should be 'sign_flip', 'gaussian', 'ipm' or",
        ),
        ({"compare": {"variants": {"a/b": {}}}}, "compare.variants.a/b: it names a directory."),
        ({"compare": {"variants": {"base": {}}}}, "compare.variants.base: this name is taken."),
        ({"compare": {"variants": {"x": 3}}}, "compare.variants.x: input should be a table, got 3."),
    ],
)
def test_a_problem_says_what_was_expected_and_got(changes: dict[str, Any], expected: str) -> None:
    assert expected in problems_of(minimal(**changes))


def test_a_directory_is_no_data_file(tmp_path: Path) -> None:
    (tmp_path / "rows.json").mkdir()
    assert "rows.json is a directory, expected a file" in problems_of(
        minimal(data={"train": [f"{tmp_path}/rows.json"]})
    )


@pytest.mark.parametrize(
    ("rule", "most"),
    [
        ("mean", 0),
        ("geometric_median", 4),
        ("coordinate_median", 4),
        ("trimmed_mean", 4),
        ("krum", 3),
        ("multi_krum", 3),
    ],
)
def test_a_rule_is_asked_for_no_more_attackers_than_it_withstands(rule: str, most: int) -> None:
    assert parse(minimal(aggregation={"rule": rule, "byzantine": most})).aggregation.byzantine == most
    expected = f"aggregation.byzantine is {most + 1}, but {rule} over 10 clients a round withstands at most {most}"
    assert expected in problems_of(minimal(aggregation={"rule": rule, "byzantine": most + 1}))


def test_attackers_are_counted_in_the_cohort_not_among_all_clients() -> None:
    raw = minimal(federation={"clients_per_round": 5}, aggregation={"byzantine": 3})
    assert "over 5 clients a round withstands at most 2" in problems_of(raw)


def test_a_source_may_be_a_path_or_a_table_alone_or_in_a_list() -> None:
    for train in ("hub/a", ["hub/a"], {"path": "hub/a"}, [{"path": "hub/a"}]):
        assert [source.path for source in parse(minimal(data={"train": train})).data.train] == ["hub/a"]


def test_the_resolved_configuration_reads_back_as_the_same() -> None:
    raw = minimal(
        lora={"target_modules": ["q_proj", "v_proj"]},
        federation={"clients_per_round": 4},
        client={"max_grad_norm": 0},
        aggregation={"tolerance": 1e-12},
        compare={"variants": {"strong": {"perturbation.radius": 0.2}}, "methods": ["fedeat", "strong"]},
    )
    first = parse(raw)
    assert parse(tomllib.loads(to_toml(first))) == first
    assert to_toml(parse(tomllib.loads(to_toml(first)))) == to_toml(first)


@pytest.mark.parametrize(
    ("kind", "rule", "label"),
    [
        ("none", "mean", "fedavg"),
        ("pgd", "mean", "eat"),
        ("none", "geometric_median", "gm"),
        ("pgd", "geometric_median", "fedeat"),
        ("none", "krum", "krum"),
        ("fgsm", "krum", "fgsm+krum"),
    ],
)
def test_a_run_is_labelled_by_what_it_does(kind: str, rule: str, label: str) -> None:
    raw = minimal(perturbation={"kind": kind}, aggregation={"rule": rule})
    assert parse(raw).method == label
    assert parse({**raw, "method": "mine"}).method == "mine"
    with_step = {**raw, "aggregation": {"rule": rule, "before": ["norm_clipping"]}}
    parts = ["norm_clipping", rule] if kind == "none" else [kind, "norm_clipping", rule]
    assert parse(with_step).method == "+".join(parts)


def test_overrides_take_toml_values_and_bare_words() -> None:
    raw = minimal(aggregation={"rule": "krum"})
    entries = ["aggregation.rule=mean", "seed = 3", "compare.seeds=[1,2]", 'model.name="a=b"', "client.learning_rate=1"]
    found = parse(override(raw, entries))
    assert (found.aggregation.rule, found.seed, found.compare.seeds) == ("mean", 3, (1, 2))
    assert (found.model.name, found.client.learning_rate) == ("a=b", 1.0)
    assert raw["aggregation"] == {"rule": "krum"}


@pytest.mark.parametrize("text", ["[gm,fedeat]", "[0,1", "{a=1", '"x', "'x", "[qv]_proj"])
def test_a_broken_list_table_or_quoted_text_is_no_text(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override({}, [f"compare.methods={text}"])
    (problem,) = caught.value.problems
    assert problem.startswith(f"--set compare.methods={text}: what begins with [, {{ or a quote must be TOML")
    assert """--set 'compare.methods=["gm", "fedeat"]'""" in problem


def test_wrong_overrides_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        override({"seed": 1}, ["rule", "=3", "seed.x=1", "lora.rank=2"])
    assert len(caught.value.problems) == 3
    assert "expected key=value" in str(caught.value)
    assert "'seed.x' runs through a key that is not a table" in str(caught.value)


def test_changed_values_are_checked_and_none_restores_the_default() -> None:
    before = parse(minimal(aggregation={"byzantine": 3}))
    after = with_values(before, {"aggregation.rule": "mean", "aggregation.byzantine": None})
    assert after.aggregation.byzantine is None
    assert before.aggregation.byzantine == 3
    with pytest.raises(ConfigError, match=r"aggregation.ruel: unknown key. Did you mean 'rule'"):
        with_values(before, {"aggregation.ruel": "mean"})
    with pytest.raises(ConfigError, match="runs through a key that is not a table"):
        with_values(before, {"seed.x": 1})


@pytest.mark.parametrize(
    ("content", "expected"),
    [("[model\n", "not valid TOML"), (b"\xff\xfe", "not valid TOML"), (None, "does not exist. Check the path")],
)
def test_a_file_that_is_no_configuration_is_told(tmp_path: Path, content: str | bytes | None, expected: str) -> None:
    path = tmp_path / "c.toml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=expected):
        load(path)
    with pytest.raises(ConfigError, match="it is a directory"):
        load(tmp_path)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[model]\nname = "a/b"\n[data]\ntrain = "c/d"\n', encoding="utf-8-sig")
    assert load(path).model.name == "a/b"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_configuration_parses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Files that a person brings are named by shipped configurations, and need not be here.
    monkeypatch.setattr("fedeat.config.consistency._missing_files", lambda config: iter(()))
    assert isinstance(load(path), Config)


def test_there_are_configurations_of_the_papers_models() -> None:
    names = {path.stem for path in SHIPPED if path.parent.name == "paper"}
    assert names == {"gemma-1.1-2b-it", "phi-3-mini", "mistral-7b", "zephyr-7b"}


def test_the_documented_configuration_is_up_to_date() -> None:
    script = ROOT / "scripts" / "document_configuration.py"
    done = subprocess.run([sys.executable, script, "--check"], check=False)
    assert done.returncode == 0, f"run: python {script.relative_to(ROOT)}"


def test_every_key_says_what_it_means() -> None:
    sections: list[Callable[..., Any]] = [getattr(schema, name) for name in dir(schema)]
    models = [item for item in sections if isinstance(item, type) and issubclass(item, schema.Section)]
    fields = [(model.__name__, name, field) for model in models for name, field in model.model_fields.items()]
    bare = [f"{model}.{name}" for model, name, field in fields if not field.description and model != "Config"]
    assert not bare


def test_a_key_set_to_none_takes_nothing_else_along(make_config: MakeConfig) -> None:
    settings = load(make_config(aggregation={"rule": "mean", "tolerance": 1e-6}))
    assert with_values(settings, {"aggregation.byzantine": None}) == settings


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"objective": "kl"}, 'needs start = "random"'),
        ({"objective": "kl", "start": "random", "share": 0.5}, "perturbs whole batches"),
        ({"objective": "freelb", "kind": "fgsm"}, 'needs kind = "pgd"'),
        ({"objective": "freelb", "steps": 1}, "the clean input alone"),
        ({"objective": "freelb", "yopo_inner": 2}, "Choose one"),
        ({"harvest_clean_gradient": True}, 'needs objective = "mixed"'),
        ({"start": "random"}, 'clients_per_batch above 1 needs perturbation.start = "zero"'),
        ({"yopo_inner": 3, "projection": "step"}, 'projection = "accumulated"'),
    ],
)
def test_variants_of_the_step_that_do_not_fit_together_are_told(keys: dict[str, Any], expected: str) -> None:
    assert expected in problems_of(minimal(perturbation=keys, client={"clients_per_batch": 4}))
