"""A run's directory: what was asked, what happened, and the state from which a killed run goes on.

    config.toml          the resolved configuration
    environment.json     versions, processor, threads, command
    partition.json       which client holds how much of what
    metrics.jsonl        a line a round and a client; finite JSON; no clock, so that a resumed run writes the same bytes
    timings.jsonl        seconds and peak memory a round
    adapter/             the newest global adapter, in PEFT's format
    checkpoints/         round-0000/, ...: the adapter after that round and how long metrics.jsonl was then
    evaluation.json      the table's rows and the predictions they were computed from

Whatever state a run goes on from is written beside its place and renamed, so that a kill at any instant leaves the old
state or the new one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedeat import __version__
from fedeat.errors import RecordError
from fedeat.updates import Adapter

ENVIRONMENT = "environment.json"
_STATE = "state.json"
_TENSORS = "adapter_model.safetensors"
_ROUND = re.compile(r"round-(\d+)")


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
        if is_another and not _checkpoints(self.path):
            shutil.rmtree(self.path / "residuals", ignore_errors=True)
        write_text(self.config_file, config_toml)
        write_json(self.path / ENVIRONMENT, environment)

    def append_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Adds lines to metrics.jsonl; numbers that are not finite become null."""
        _append(self.path / "metrics.jsonl", lines)

    def append_timing(self, line: Mapping[str, Any]) -> None:
        """Adds a line to timings.jsonl."""
        _append(self.path / "timings.jsonl", [line])

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
            _sync(file)
        _sync(fresh)
        target = parent / f"round-{finished_round:04d}"
        shutil.rmtree(target, ignore_errors=True)
        fresh.replace(target)
        _sync(parent)
        if keep is not None:
            for old in _checkpoints(self.path)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)  # what is left of it goes after the next round

    def newest_checkpoint(self) -> Checkpoint | None:
        """The newest state, None where no round was finished yet.

        Raises:
            RecordError: a checkpoint cannot be read.
        """
        found = _checkpoints(self.path)
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


def check(path: Path, config_toml: str) -> None:
    """Checks that what a directory holds of a run, be it nothing, begun or finished, is of this configuration.

    Raises:
        RecordError: the directory holds a comparison, a run of another configuration, or checkpoints of an unknown
            one. A run that has finished no round may be corrected, and another spelling of the same paths, or the
            number of threads that the run began with, is no other configuration.
    """
    file = path / "config.toml"
    if kind_of(path) == "comparison":
        raise RecordError(
            f"{path} holds a comparison, and a run needs a directory of its own. Choose another directory, or go on "
            "with the comparison by the command that began it: fedeat compare."
        )
    if not file.is_file() and _checkpoints(path):
        raise RecordError(
            f"{path} holds checkpoints but no config.toml to say of what. Choose another directory, or put the file "
            "back."
        )
    if not file.is_file() or not is_settled(path):
        return
    before, after = read_config(file), tomllib.loads(config_toml)
    began = threads_before(path)  # where a configuration leaves the threads to torch
    changes = changed_keys(*({**config, "threads": config.get("threads") or began} for config in (before, after)))
    if changes or not before:
        raise RecordError(
            f"{path} holds a run of another configuration{differing(changes)}. Choose another directory, remove this "
            f"one, or go on with the run it holds: fedeat run --resume {path}"
        )


def threads_before(path: Path) -> int:
    """Threads that a run was started with, 0 where that is not known: other sums, in another order, differ."""
    try:
        threads = json.loads((path / ENVIRONMENT).read_text(encoding="utf-8"))["threads"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return threads if isinstance(threads, int) else 0


def kind_of(path: Path) -> Literal["run", "comparison"] | None:
    """What a directory holds records of; None where it has none, or none that says."""
    if (path / "results.json").exists():
        return "comparison"
    if any((path / name).exists() for name in ("metrics.jsonl", "partition.json", "evaluation.json", "checkpoints")):
        return "run"
    return "comparison" if (path / "config.toml").is_file() and (path / "runs").is_dir() else None


def is_settled(path: Path) -> bool:
    """Whether the config.toml of a run's directory must stay: a round was finished with it, or no run wrote it."""
    return not (path / ENVIRONMENT).is_file() or has_results(path)


def has_results(path: Path) -> bool:
    """Whether a run's directory holds a finished round or an evaluation."""
    return bool(_checkpoints(path)) or (path / "evaluation.json").is_file()


def _checkpoints(path: Path) -> list[Path]:
    """Whole checkpoints of a run's directory, oldest first."""
    parent = path / "checkpoints"
    rounds = {} if not parent.is_dir() else {path: _ROUND.fullmatch(path.name) for path in parent.iterdir()}
    found = [(int(match[1]), path) for path, match in rounds.items() if match is not None]
    return [path for _, path in sorted(found)]


def read_evaluation(path: Path) -> dict[str, Any] | None:
    """The finished evaluation of a run directory, None while there is none.

    Raises:
        RecordError: the file is there and holds something else.
    """
    file = path / "evaluation.json"
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found["rows"], list):
            return dict(found)
        problem = '"rows" is not a list'
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise RecordError(f"{file} is not a finished evaluation: {problem}. Remove it to evaluate once more.")


def read_config(path: Path) -> dict[str, Any]:
    """A directory's config.toml; nothing where it is damaged."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return {}


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two configurations, sorted; two spellings of one path do not differ."""
    found = []
    for key in sorted({*before, *after}):
        one, other = before.get(key), after.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += [f"{key}.{name}" for name in changed_keys(one, other)]
        elif _resolved(one) != _resolved(other):
            found.append(key)
    return found


def differing(changes: Sequence[str]) -> str:
    """Of changed keys, what an error says in brackets after what they are the keys of; the first few."""
    if not changes:
        return ""
    return f" ({', '.join(changes[:5])}{', ...' if len(changes) > 5 else ''} differ{'s' * (len(changes) == 1)})"


def environment(threads: int) -> dict[str, Any]:
    """Versions, processor, threads and command of this process."""
    packages = ("torch", "transformers", "peft", "numpy")
    return {
        "fedeat": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "platform": platform.platform(),
        "cpu": _processor(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": threads,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def make_directory(path: Path) -> None:
    """Makes a directory and those above it, where they do not exist.

    Raises:
        RecordError: something else has its name, or it may not be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise RecordError(f"{path} is, or lies in, a file. Expected a directory; choose another place.") from None
    except OSError as error:
        raise RecordError(f"directory {path} cannot be made: {error.strerror}. Choose another place.") from None


def write_json(path: Path, value: Any) -> None:
    """Writes finite JSON in one step; numbers that are not finite become null."""
    write_text(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file beside its place and renames it, so that a reader sees the old text or the new."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    _sync(fresh)
    fresh.replace(path)


def finite(value: Any) -> Any:
    """The same nested value with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def _resolved(value: Any) -> Any:
    """The same nested value with texts that name a file or a directory as absolute paths."""
    if isinstance(value, str):
        # Not Path.exists(), which raises for a text that is too long to be a path.
        return str(Path(value).resolve()) if os.path.exists(value) else value
    if isinstance(value, Mapping):
        return {key: _resolved(item) for key, item in value.items()}
    return [_resolved(item) for item in value] if isinstance(value, list) else value


def _append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(finite(line), allow_nan=False) + "\n" for line in lines)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
