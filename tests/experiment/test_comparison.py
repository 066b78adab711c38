"""Grids of runs: what is in them, that cells fail alone, and that a comparison goes on where it stopped."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import pytest

from fedeat import experiment, records
from fedeat.config import Config, load, to_toml
from fedeat.errors import ConfigError, RecordError
from fedeat.experiment import comparison
from fedeat.experiment.side_by_side import Outcome, run_jobs

MakeConfig = Callable[..., Path]
SMALL = {"methods": ["fedavg", "fedeat"], "fractions": [0.25], "attacks": ["sign_flip"]}


def test_the_grid_holds_each_cell_once(make_config: MakeConfig) -> None:
    config = load(
        make_config(
            compare={
                "methods": ["fedavg", "eat", "gm", "fedeat", "strong"],
                "attacks": ["none", "sign_flip", "nan"],
                "fractions": [0.0, 0.25],
                "seeds": [0, 1],
                "variants": {"strong": {"perturbation.radius": 0.5, "aggregation.rule": "krum"}},
            },
            aggregation={"byzantine": 1},
            partition={"clients": 5},
        )
    )
    grid = {cell.name: cell.config for cell in comparison.cells(config)}
    assert len(grid) == 5 * 3 * 2
    fedavg, strong = grid["fedavg-none-0-seed0"], grid["strong-nan-0.25-seed1"]
    assert (fedavg.perturbation.kind, fedavg.aggregation.rule, fedavg.aggregation.byzantine) == ("none", "mean", None)
    assert (strong.perturbation.radius, strong.aggregation.rule, strong.seed) == (0.5, "krum", 1)
    assert (strong.attack.kind, strong.attack.fraction, strong.method) == ("nan", 0.25, "strong")
    assert grid["gm-none-0-seed0"].aggregation.rule == grid["fedeat-none-0-seed0"].aggregation.rule
    assert grid["gm-none-0-seed0"].perturbation.kind == "none"
    assert all(cell.compare == type(cell.compare)() for cell in grid.values())


def test_a_scale_is_an_attacks_own(make_config: MakeConfig) -> None:
    section = {
        "methods": ["gm"],
        "attacks": ["sign_flip", "ipm", "alie", "backdoor"],
        "scales": {"ipm": 0.5},
        "fractions": [0.0, 0.25],
    }
    attack = {"kind": "sign_flip", "fraction": 0.25, "scale": 10.0, "target": "positive"}
    grid = comparison.cells(load(make_config(compare=section, attack=attack)))
    scales = {cell.config.attack.kind: cell.config.attack.scale for cell in grid}
    assert scales == {"none": None, "sign_flip": 10.0, "ipm": 0.5, "alie": None, "backdoor": None}


def test_each_partition_named_is_a_dimension_of_the_grid(make_config: MakeConfig) -> None:
    partitions = {"even": {}, "label": {"kind": "dirichlet", "alpha": 0.1}, "amount": {"kind": "quantity"}}
    section = {"methods": ["gm", "fedeat"], "seeds": [0, 1], "fractions": [0.0, 0.25], "partitions": partitions}
    grid = {cell.name: cell.config for cell in comparison.cells(load(make_config(compare=section)))}
    assert len(grid) == 2 * 2 * 2 * 3
    skewed = grid["fedeat-label-sign_flip-0.25-seed1"]
    assert (skewed.partition.kind, skewed.partition.alpha, skewed.attack.kind) == ("dirichlet", 0.1, "sign_flip")
    assert grid["gm-amount-none-0-seed0"].partition.kind == "quantity"
    wrong = {"compare": {"partitions": {"odd": {"kind": "random"}}}}
    with pytest.raises(ConfigError, match=r"fedavg, odd: partition\.kind: "):
        comparison.cells(load(make_config(**wrong)))


def test_cells_and_partitions_that_would_share_a_name_are_refused(make_config: MakeConfig) -> None:
    def problems(**section: Any) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            comparison.cells(load(make_config(compare={"fractions": [0.0], **section})))
        return list(caught.value.problems)

    variants = {"gm-x": {"perturbation.kind": "none", "aggregation.rule": "krum", "aggregation.byzantine": 0}}
    split = {"y": {"kind": "quantity"}, "x-y": {"kind": "iid"}}
    assert problems(methods=["gm", "gm-x"], variants=variants, partitions=split) == [
        "more than one cell would be named gm-x-y-none-0-seed0. Rename a variant or a partition."
    ]
    (problem,) = problems(methods=["gm"], partitions={"few": {"clients": 2}, "more": {"clients": 3}})
    assert problem.startswith('more than one partition would be "even" in the tables')


@pytest.mark.parametrize("aggregation", [{}, {"byzantine": 1}, {"before": ["norm_clipping"]}])
def test_methods_are_the_four_corners_of_two_choices(make_config: MakeConfig, aggregation: dict[str, int]) -> None:
    config = load(make_config(compare={"attacks": []}, aggregation=aggregation, partition={"clients": 5}))
    grid = {cell.config.method: cell.config for cell in comparison.cells(config)}
    chosen = {name: (cell.perturbation.kind, cell.aggregation.rule) for name, cell in grid.items()}
    assert chosen == {
        "fedavg": ("none", "mean"),
        "eat": ("pgd", "mean"),
        "gm": ("none", "geometric_median"),
        "fedeat": ("pgd", "geometric_median"),
    }
    assert grid["fedavg"].aggregation.before == grid["eat"].aggregation.before == ()  # a mean of steps is no FedAvg
    assert grid["gm"].aggregation.before == grid["fedeat"].aggregation.before == config.aggregation.before


def test_a_variant_with_wrong_keys_is_refused_before_anything_runs(make_config: MakeConfig) -> None:
    section = {"methods": ["x", "y"], "variants": {"x": {"agregation.rule": "mean"}, "y": {"seed": "one"}}}
    with pytest.raises(ConfigError) as caught:
        comparison.cells(load(make_config(compare=section)))
    assert caught.value.problems == (
        "x: agregation: unknown key. Did you mean 'aggregation'?",
        "y: seed: input should be a valid integer, got 'one'.",
    )


def test_a_configuration_that_is_not_fedeat_is_not_compared_under_its_name(make_config: MakeConfig) -> None:
    config = load(make_config(perturbation={"kind": "none"}, aggregation={"rule": "mean"}))
    with pytest.raises(ConfigError) as caught:
        comparison.cells(config)
    assert len(caught.value.problems) == 4
    assert 'fedeat trains on perturbations, but perturbation.kind is "none"' in str(caught.value)
    assert 'gm needs a robust rule, but aggregation.rule is "mean"' in str(caught.value)


def test_results_do_not_depend_on_processes_and_finished_cells_are_not_run_again(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    told: list[tuple[str, str, int, int]] = []
    one, two = (load(make_config(compare={**SMALL, "base": True, "processes": n})) for n in (1, 2))
    rows = comparison.compare(one, tmp_path / "one", progress=lambda *what: told.append(what))
    assert told[0] == ("", "planned", 0, 3)
    assert sum(stage == "finished" for _, stage, _, _ in told) == 3
    names = ["base", "fedavg-sign_flip-0.25-seed0", "fedeat-sign_flip-0.25-seed0"]
    assert [row["run"] for row in rows] == [f"runs/{name}" for name in names]
    comparison.compare(two, tmp_path / "two")
    assert (tmp_path / "two" / "results.json").read_text() == (tmp_path / "one" / "results.json").read_text()
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        cell = Path("runs") / "fedeat-sign_flip-0.25-seed0" / name
        assert (tmp_path / "two" / cell).read_bytes() == (tmp_path / "one" / cell).read_bytes()

    # Another number of processes is the same comparison, and what is finished is not run again.
    told.clear()
    assert comparison.compare(two, tmp_path / "one", progress=lambda *what: told.append(what)) == rows
    assert {stage for _, stage, _, _ in told} == {"planned", "finished"}
    with pytest.raises(RecordError, match=r"holds another comparison, or a run \(perturbation\.radius differs\)"):
        comparison.compare(load(make_config(compare=SMALL, perturbation={"radius": 0.3})), tmp_path / "one")

    # A larger grid of the same comparison runs what is new.
    told.clear()
    more = comparison.compare(
        load(make_config(compare={**SMALL, "methods": ["fedavg", "gm", "fedeat"]})),
        tmp_path / "one",
        progress=lambda *what: told.append(what),
    )
    assert [row["method"] for row in more] == ["fedavg", "gm", "fedeat"]
    assert {cell for cell, stage, _, _ in told if stage == "train"} == {"gm-sign_flip-0.25-seed0"}

    # A smaller one returns its own rows, and results.json keeps the others behind them.
    assert comparison.compare(two, tmp_path / "one") == rows
    written = json.loads((tmp_path / "one" / "results.json").read_text())
    assert written == [*rows, more[1]]


def test_a_grid_may_gain_variants_but_not_change_them(make_config: MakeConfig, tmp_path: Path) -> None:
    def grid(**variants: dict[str, str]) -> Config:
        section = {"methods": ["x"], "attacks": [], "fractions": [0.0], "seeds": [0]}
        return load(make_config(federation={"rounds": 1}, compare={**section, "variants": variants}))

    krum, clipping = {"aggregation.rule": "krum"}, {"aggregation.rule": "centred_clipping"}
    (first,) = comparison.compare(grid(x=krum), tmp_path)
    assert comparison.compare(grid(x=krum, y=clipping), tmp_path) == [first]
    with pytest.raises(RecordError, match=r"\(compare\.variants\.x\.aggregation\.rule differs\)"):
        comparison.compare(grid(x=clipping), tmp_path)
    with pytest.raises(RecordError, match=r"\(compare\.variants\.y\.aggregation\.rule differs\)"):
        comparison.compare(grid(x=krum, y=krum), tmp_path)  # y was named before, if not run


def test_a_finished_cell_from_elsewhere_is_taken_over_where_its_configuration_is_the_same(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    section = {"methods": ["gm"], "fractions": [0.0], "seeds": [0]}
    config = load(make_config(federation={"rounds": 1}, compare=section))
    rows = comparison.compare(config, tmp_path / "first")
    for name in ("same", "other"):
        shutil.copytree(tmp_path / "first" / "runs", tmp_path / name / "runs")
    told: list[tuple[str, str, int, int]] = []
    assert comparison.compare(config, tmp_path / "same", progress=lambda *what: told.append(what)) == rows
    assert {stage for _, stage, _, _ in told} == {"planned", "finished"}
    other = load(make_config(federation={"rounds": 1}, client={"learning_rate": 0.5}, compare=section))
    with pytest.raises(RecordError, match=r"holds a run of another configuration \(client\.learning_rate differs\)"):
        comparison.compare(other, tmp_path / "other")
    assert not (tmp_path / "other" / "config.toml").exists()  # a refused command leaves nothing behind
    assert comparison.compare(config, tmp_path / "other") == rows


def test_another_spelling_of_its_paths_is_the_same_comparison(
    make_config: MakeConfig, language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"federation": {"rounds": 1}, "compare": {"methods": ["gm"], "fractions": [0.0], "seeds": [0]}}
    rows = comparison.compare(load(make_config(**given)), tmp_path / "out")
    monkeypatch.chdir(language_model.parent)
    told: list[tuple[str, str, int, int]] = []
    again = load(make_config(model={"name": language_model.name}, **given))
    assert comparison.compare(again, tmp_path / "out", progress=lambda *what: told.append(what)) == rows
    assert {stage for _, stage, _, _ in told} == {"planned", "finished"}
    monkeypatch.chdir(tmp_path)  # where that spelling names another place
    with pytest.raises(RecordError, match=r"\(model\.name differs\)"):
        comparison.compare(again, tmp_path / "out")


def test_a_directory_whose_configuration_was_spoilt_by_hand_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("compare = 3\n")
    with pytest.raises(RecordError, match="holds another comparison, or a run"):
        comparison.compare(load(make_config(compare=SMALL)), tmp_path)
    assert (tmp_path / "config.toml").read_text() == "compare = 3\n"


def test_a_run_and_a_comparison_do_not_share_a_directory(make_config: MakeConfig, tmp_path: Path) -> None:
    config = load(make_config(federation={"rounds": 1}, evaluation={"data": []}, compare={"methods": ["gm"]}))
    experiment.run(config, tmp_path / "run")
    before = {path.name for path in (tmp_path / "run").iterdir()}
    with pytest.raises(RecordError, match="holds a run, and a comparison needs a directory of its own"):
        comparison.compare(config, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == before
    comparison.compare(config, tmp_path / "grid")
    for attempt in (lambda: experiment.run(config, tmp_path / "grid"), lambda: experiment.resume(tmp_path / "grid")):
        with pytest.raises(RecordError, match="holds a comparison"):
            attempt()
    (tmp_path / "grid" / "results.json").unlink()  # as where it was killed before its end
    with pytest.raises(RecordError, match="holds a comparison"):
        experiment.run(config, tmp_path / "grid")


def test_a_comparison_that_failed_on_a_mistake_is_corrected_in_its_directory(
    make_config: MakeConfig, tmp_path: Path, sentiment_files: dict[str, Path]
) -> None:
    section = {"methods": ["gm"], "fractions": [0.0], "seeds": [0]}
    changes: dict[str, Any] = {"federation": {"rounds": 1}, "evaluation": {"data": []}, "compare": section}
    free = {"train": [str(sentiment_files["alpaca"])]}
    wrong, right, other = (
        load(make_config(data=free, partition={"kind": kind}, **changes)) for kind in ("dirichlet", "iid", "quantity")
    )
    with pytest.raises(comparison.CellsFailed, match="has no labels to skew by"):
        comparison.compare(wrong, tmp_path / "out")
    comparison.compare(right, tmp_path / "out")
    assert (tmp_path / "out" / "config.toml").read_text() == to_toml(right)
    assert (tmp_path / "out" / "runs" / "gm-none-0-seed0" / "adapter").is_dir()
    with pytest.raises(RecordError, match=r"holds another comparison, or a run \(partition\.kind differs\)"):
        comparison.compare(other, tmp_path / "out")


def test_a_comparison_that_was_killed_goes_on(make_config: MakeConfig, tmp_path: Path) -> None:
    path, out = make_config(compare=SMALL), tmp_path / "out"
    code = (
        "from pathlib import Path\nfrom fedeat.config import Config, load\nfrom fedeat.experiment import comparison\n"
        f"if __name__ == '__main__': comparison.compare(load(Path({str(path)!r})), Path({str(out)!r}))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, script], env={**os.environ, "OMP_NUM_THREADS": "1"})
    first = out / "runs" / "fedavg-sign_flip-0.25-seed0" / "evaluation.json"
    deadline = time.monotonic() + 300  # a machine may be busy
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(random.uniform(0, 1))
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    written = first.stat().st_mtime_ns
    told: list[tuple[str, str, int, int]] = []
    time.sleep(1)  # the cell's own process sees that its parent is gone
    rows = comparison.compare(load(path), out, progress=lambda *what: told.append(what))
    assert len(rows) == 2
    assert first.stat().st_mtime_ns == written
    assert told[1] == ("fedavg-sign_flip-0.25-seed0", "finished", 1, 1)
    comparison.compare(load(path), tmp_path / "whole")
    for name in ("results.json", "runs/fedeat-sign_flip-0.25-seed0/metrics.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_cell_that_fails_is_named_and_the_others_finish(
    make_config: MakeConfig, tmp_path: Path, sentiment_files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    section = {
        "methods": ["fedavg", "greedy", "gm"],
        "variants": {"greedy": {"model.name": str(sentiment_files["train"].parent)}},
    }
    with pytest.raises(comparison.CellsFailed) as caught:
        comparison.compare(load(make_config(compare=section)), tmp_path / "out")
    message = str(caught.value)
    assert message.startswith("1 of 3 cells failed; the others are in")
    assert "\n  - greedy-none-0-seed0: " in message
    assert "holds no config.json" in message
    (told,) = [record.getMessage() for record in caplog.records if "failed" in record.getMessage()]
    assert told.startswith("greedy-none-0-seed0 failed: ")  # as it happens, hours before the others may end
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["method"] for row in rows] == ["fedavg", "gm"]


def test_one_process_at_a_time_compares_in_a_directory(make_config: MakeConfig, tmp_path: Path) -> None:
    config = load(make_config(compare=SMALL))
    with records.RunDirectory(tmp_path), pytest.raises(RecordError, match="in use by another process"):
        comparison.compare(config, tmp_path)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Jobs that a fresh process can import by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    return importlib.import_module("killable")


def test_ctrl_c_while_a_process_starts_is_not_lost(jobs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start = SpawnProcess.start

    def interrupted(process: SpawnProcess) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        start(process)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(SpawnProcess, "start", interrupted)
    # A shell lets its background jobs ignore Ctrl-C; this process listens.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(run_jobs({"works": jobs.job_that_works}, processes=1, threads=1, tell=lambda *what: None))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    for child in multiprocessing.active_children():
        child.terminate()
        child.join()


def test_a_process_that_dies_takes_no_other_job_along(jobs: Any, caplog: pytest.LogCaptureFixture) -> None:
    told: list[tuple[str, str, int, int]] = []
    work = {"dies": jobs.job_that_dies, "fails": jobs.job_with_a_defect, "works": jobs.job_that_works}
    work["again"] = jobs.job_that_works
    found = dict(run_jobs(work, processes=1, threads=1, tell=lambda *what: told.append(what)))
    assert found["works"] == found["again"] == Outcome(3)
    assert found["dies"].failure == "its process was ended by signal 9 (SIGKILL), often for lack of memory"
    assert found["fails"].failure.startswith("ZeroDivisionError: division by zero (killable.py, line ")
    assert told == [("works", "work", 1, 2), ("again", "work", 1, 2)]
    assert caplog.text.count("said once") == 1
