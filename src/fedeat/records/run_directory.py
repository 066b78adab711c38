"""A run's directory, held by one process at a time, and its checkpoints, from which a killed run goes on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedeat.errors import RecordError
from fedeat.records.contents import checkpoints
from fedeat.records.files import append_lines, make_directory, sync, write_json, write_text
from fedeat.records.versions import ENVIRONMENT
from fedeat.updates import Adapter

_STATE = "state.json"
_TENSORS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The state after a round.

    Attributes:
        next_round: the round to go on with; 0 before any.
        adapter: the global adapter.
        metrics_bytes: length of metrics.jsonl then; what follows belongs to a round that was not finished.
        timings_bytes: the same of timings.jsonl.
    """

    next_round: int
    adapter: dict[str, Tensor]
    metrics_bytes: int
    timings_bytes: int


class RunDirectory:
    """One run's directory, held by one process at a time. A context manager: leaving it lets the directory go."""

    def __init__(self, path: Path) -> None:
        """Takes the directory.

        Args:
            path: made where it does not exist.

        Raises:
            RecordError: another process holds it, or it cannot be made or written.
        """
        self.path = path
        make_directory(path)
        self._lock = FileLock(path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RecordError(
                f"{path} is in use by another process. Wait for it, or choose another directory."
            ) from None
        except OSError as error:
            raise RecordError(
                f"{path} cannot be written: {error.strerror}. Expected a directory of yours; choose another."
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.toml"

    @property
    def adapter(self) -> Path:
        """The newest global adapter, in PEFT's format."""
        return self.path / "adapter"

    @property
    def evaluation_file(self) -> Path:
        """There once the run is finished."""
        return self.path / "evaluation.json"

    def start(self, config_toml: str, environment: Mapping[str, Any]) -> None:
        """Writes the configuration and the environment of a run that is ready to train; `check` comes before.

        Args:
            config_toml: the configuration; what another one's clients left of a first round that did not end goes.
            environment: as `environment` made it.
        """
        is_another = self.config_file.is_file() and self.config_file.read_bytes() != config_toml.encode()
        if is_another and not checkpoints(self.path):
            shutil.rmtree(self.path / "residuals", ignore_errors=True)
        write_text(self.config_file, config_toml)
        write_json(self.path / ENVIRONMENT, environment)

    def append_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Adds lines to metrics.jsonl; numbers that are not finite become null."""
        append_lines(self.path / "metrics.jsonl", lines)

    def append_timing(self, line: Mapping[str, Any]) -> None:
        """Adds a line to timings.jsonl."""
        append_lines(self.path / "timings.jsonl", [line])

    def write_checkpoint(self, finished_round: int, adapter: Adapter, *, keep: int | None) -> None:
        """Makes `finished_round` the state from which a killed run goes on.

        Args:
            finished_round: 0..T-1.
            adapter: the global adapter after it.
            keep: how many of the newest checkpoints stay, None for all.
        """
        parent = self.path / "checkpoints"
        fresh = parent / ".new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, fresh / _TENSORS)
        for name in ("adapter_config.json", "fedeat.json"):  # so that PEFT loads each checkpoint too
            if (self.adapter / name).is_file():
                shutil.copy(self.adapter / name, fresh / name)
        state = {
            "next_round": finished_round + 1,
            "metrics_bytes": _size(self.path / "metrics.jsonl"),
            "timings_bytes": _size(self.path / "timings.jsonl"),
            "sha256": _digest(fresh / _TENSORS),
        }
        write_text(fresh / _STATE, json.dumps(state))
        for file in fresh.iterdir():
            sync(file)
        sync(fresh)
        target = parent / f"round-{finished_round:04d}"
        shutil.rmtree(target, ignore_errors=True)
        fresh.replace(target)
        sync(parent)
        if keep is not None:
            for old in checkpoints(self.path)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)  # what is left of it goes after the next round

    def newest_checkpoint(self) -> Checkpoint | None:
        """The newest state, None where no round was finished yet.

        Raises:
            RecordError: a checkpoint cannot be read.
        """
        found = checkpoints(self.path)
        if not found:
            return None
        newest = found[-1]
        try:
            state = json.loads((newest / _STATE).read_text(encoding="utf-8"))
            if state["sha256"] != _digest(newest / _TENSORS):
                raise ValueError(f"{_TENSORS} is not the file that was written")
            tensors = load_file(newest / _TENSORS)
            return Checkpoint(state["next_round"], tensors, state["metrics_bytes"], state["timings_bytes"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise RecordError(
                f"checkpoint {newest} cannot be read: {type(error).__name__}: {error}. Remove that directory to go on "
                "from the one before."
            ) from None

    def rewind(self, checkpoint: Checkpoint | None) -> None:
        """Cuts the records of an unfinished round off; all of them where no round was finished.

        Raises:
            RecordError: the records are shorter than the checkpoint says.
        """
        lengths = (0, 0) if checkpoint is None else (checkpoint.metrics_bytes, checkpoint.timings_bytes)
        for name, length in zip(("metrics.jsonl", "timings.jsonl"), lengths, strict=True):
            file = self.path / name
            if _size(file) < length:
                raise RecordError(
                    f"{file} has {_size(file)} bytes, its newest checkpoint was written at {length}: lines are "
                    "missing. Put the file back, or start anew in another directory."
                )
            if file.exists():
                os.truncate(file, length)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
