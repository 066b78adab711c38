"""What a directory holds, and for which configuration a run may go on there."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedeat import experiment, records
from fedeat.config import load, to_toml
from fedeat.errors import RecordError


def test_another_configuration_does_not_go_on_with_a_run(stopped: Path, config_file: Path) -> None:
    with pytest.raises(RecordError, match=r"holds a run of another configuration \(seed differs\).*--resume"):
        experiment.run(load(config_file, ["seed=1"]), stopped)


def test_another_spelling_of_its_paths_or_its_own_threads_are_the_same_run(
    stopped: Path, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(config_file)
    text = to_toml(config)
    records.check(stopped, to_toml(config.model_copy(update={"threads": 0})))
    monkeypatch.chdir(Path(config.model.name).parent)
    records.check(stopped, text.replace(config.model.name, Path(config.model.name).name))
    with pytest.raises(RecordError, match=r"\(threads differs\)"):
        records.check(stopped, to_toml(config.model_copy(update={"threads": 2})))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecordError, match=r"\(model\.name differs\)"):
        records.check(stopped, text.replace(config.model.name, Path(config.model.name).name))


def test_a_configuration_that_no_run_wrote_is_not_overwritten(config_file: Path, tmp_path: Path) -> None:
    own = tmp_path / "place" / "config.toml"
    own.parent.mkdir()
    own.write_text(f"# Mine.\n{config_file.read_text()}")
    with pytest.raises(RecordError, match="holds a run of another configuration"):
        experiment.run(load(own), own.parent)
    assert own.read_text().startswith("# Mine.")


def test_a_directory_is_told_what_it_holds(tmp_path: Path) -> None:
    def made(name: str, *files: str) -> Path:
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).touch()
        return tmp_path / name

    assert records.kind_of(tmp_path / "absent") is None
    assert records.kind_of(made("new", "config.toml")) is None
    assert records.kind_of(made("trained", "config.toml", "metrics.jsonl")) == "run"
    assert records.kind_of(made("project", "config.toml", "partition.json", "runs/a/config.toml")) == "run"
    assert records.kind_of(made("project of runs", "runs/a/config.toml")) is None
    assert records.kind_of(made("begun", "config.toml", "runs/a/config.toml")) == "comparison"
    assert records.kind_of(made("finished", "config.toml", "results.json")) == "comparison"


def test_checkpoints_without_a_configuration_are_refused(stopped: Path, config_file: Path) -> None:
    (stopped / "config.toml").unlink()
    with pytest.raises(RecordError, match="holds no run"):
        experiment.resume(stopped)
    with pytest.raises(RecordError, match=r"no config.toml to say of what"):
        experiment.run(load(config_file), stopped)


def test_a_finished_run_with_a_broken_evaluation_says_so(tmp_path: Path) -> None:
    for text in ("", "[]", '{"rows": 3}'):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(RecordError, match=r"not a finished evaluation.*Remove it"):
            records.read_evaluation(tmp_path)
