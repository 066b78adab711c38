"""A run that is killed at any instant and resumed ends in the bits of one that never was."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

from fedeat import experiment, records
from fedeat.config import load, to_toml
from fedeat.errors import DataError, RecordError

Order: TypeAlias = Callable[..., int]
KILLED = -9
ROUNDS = 4


def results(directory: Path) -> dict[str, bytes]:
    """What must be equal, bit for bit."""
    found = {name: (directory / name).read_bytes() for name in ("adapter/adapter_model.safetensors", "metrics.jsonl")}
    evaluation = (directory / "evaluation.json").read_text().replace(f'"{directory.name}"', '""')
    return {**found, "evaluation": evaluation.encode()}


def test_a_run_killed_at_any_instant_resumes_to_the_same_bits(order: Order, config_file: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert order(config=config_file, directory=whole) == 0
    expected = results(whole)
    instants = [
        ("before the records of a round", 1),
        ("within a line", 1),
        ("within a line", 3),  # the lines of an evaluation between rounds
        ("after the records of a round", 2),
        ("after the adapter", 3),
        ("within a checkpoint", 1),
        ("within a checkpoint", 3),
        ("before the renaming", 2),
        ("after the renaming", 1),
        ("after the pruning", ROUNDS),
        ("before the evaluation", 1),
        ("before the evaluation", 3),  # the last, after two between rounds
        ("after the evaluation", 3),
    ]
    for number, (instant, count) in enumerate(instants):
        killed = tmp_path / f"killed-{number}"
        assert order(config=config_file, directory=killed, kill=instant, count=count) == KILLED, instant
        assert order(directory=killed, resume=True) == 0, instant
        assert results(killed) == expected, instant


def test_a_run_killed_again_and_again_resumes_to_the_same_bits(order: Order, config_file: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert order(config=config_file, directory=whole) == 0
    times = random.Random(0)
    status = order(config=config_file, directory=killed, kill=times.uniform(0.05, 0.6))
    for _ in range(12):
        if status == 0 and (killed / "evaluation.json").exists():
            break
        status = order(config=config_file, directory=killed, kill=times.uniform(0.2, 0.9))
    assert order(config=config_file, directory=killed) == 0
    assert results(killed) == results(whole)


def test_a_corrupt_checkpoint_is_named_and_the_one_before_it_serves(
    order: Order, config_file: Path, stopped: Path, tmp_path: Path
) -> None:
    newest = stopped / "checkpoints" / "round-0001"
    tensors = newest / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        tensors.write_bytes(broken)
        with pytest.raises(RecordError, match=r"round-0001 cannot be read.*Remove that directory to go on"):
            experiment.resume(stopped)
    shutil.rmtree(newest)
    assert order(directory=stopped, resume=True) == 0
    assert order(config=config_file, directory=tmp_path / "whole") == 0
    assert results(stopped) == results(tmp_path / "whole")


@pytest.mark.parametrize("state", ["", "{}", "[]", '{"next_round": 1', '{"sha256": "0"}'])
def test_a_checkpoint_with_a_broken_state_is_named(stopped: Path, state: str) -> None:
    (stopped / "checkpoints" / "round-0001" / "state.json").write_text(state)
    with pytest.raises(RecordError, match="round-0001 cannot be read"):
        experiment.resume(stopped)


def test_lines_missing_before_the_checkpoint_are_told(stopped: Path) -> None:
    file = stopped / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(RecordError, match=r"metrics.jsonl has 10 bytes, its newest checkpoint was written at \d+"):
        experiment.resume(stopped)


def test_a_run_that_failed_on_a_mistake_is_corrected_in_its_directory(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    wrong, right = (load(config_file, [f"partition.clients={n}", "federation.rounds=1"]) for n in (60, 4))
    with pytest.raises(DataError, match="60 clients"):
        experiment.run(wrong, directory)
    assert not (directory / "config.toml").exists()

    def fail(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:  # in the first round, such as for too large a batch
        patched.setattr("fedeat.records.RunDirectory.write_checkpoint", fail)
        with pytest.raises(MemoryError):
            experiment.run(load(config_file, ["client.batch_size=8"]), directory)
    assert "batch_size = 8" in (directory / "config.toml").read_text()
    residual = directory / "residuals" / "client-0000" / "round-0000.safetensors"
    residual.parent.mkdir(parents=True)
    residual.touch()
    experiment.run(right, directory)
    assert not residual.exists()
    assert (directory / "config.toml").read_text() == to_toml(right)
    experiment.run(right, tmp_path / "fresh")
    assert results(directory) == {**results(tmp_path / "fresh"), "evaluation": results(directory)["evaluation"]}
    with pytest.raises(RecordError, match="holds a run of another configuration"):
        experiment.run(wrong, directory)


def test_a_directory_serves_one_process_at_a_time(tmp_path: Path, config_file: Path) -> None:
    with records.RunDirectory(tmp_path / "run"), pytest.raises(RecordError, match="in use by another process"):
        experiment.run(load(config_file), tmp_path / "run")


def test_a_finished_run_is_not_run_again_even_where_its_data_is_gone(
    order: Order, config_file: Path, sentiment_files: dict[str, Path], tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    assert order(config=config_file, directory=directory) == 0
    before = results(directory)
    text = (directory / "config.toml").read_text().replace(str(sentiment_files["train"]), "/nowhere.jsonl")
    (directory / "config.toml").write_text(text)
    rows = experiment.resume(directory)
    assert [row["task"] for row in rows] == ["sst2"]
    assert results(directory) == before


def test_a_directory_that_cannot_be_made_or_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RecordError, match="in, a file"):
            records.RunDirectory(place)

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", "run")

    with monkeypatch.context() as patched:
        patched.setattr("fedeat.records.run_directory.FileLock.acquire", refuse)
        with pytest.raises(RecordError, match="cannot be written: Permission denied"):
            records.RunDirectory(tmp_path / "run")
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RecordError, match="cannot be made: Permission denied"):
        records.RunDirectory(tmp_path / "other")


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    with records.RunDirectory(tmp_path) as home:
        for index in range(5):
            home.write_checkpoint(index, {"w": torch.full((2,), float(index))}, keep=2)
        (tmp_path / "checkpoints" / "round-0009.bak").mkdir()
        newest = home.newest_checkpoint()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["round-0003", "round-0004", "round-0009.bak"]
    assert newest is not None
    assert newest.next_round == 5
    assert torch.equal(newest.adapter["w"], torch.full((2,), 4.0))
