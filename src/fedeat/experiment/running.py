"""A run: a federation trained round by round, evaluated, recorded, and gone on with where it was killed."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedeat import evaluation, records
from fedeat.algorithm import run_rounds
from fedeat.config import Config, load, to_toml
from fedeat.errors import RecordError
from fedeat.experiment import measuring, privacy, round_records
from fedeat.experiment.binding import model_source
from fedeat.experiment.federation import Connect, Federation, Progress, heads, prepare, silent
from fedeat.experiment.inputs import answerable, evaluation_sets, partition_name, training_examples
from fedeat.model import load_model
from fedeat.updates import Adapter

_log = logging.getLogger(__name__)


def run(
    config: Config, directory: Path, *, progress: Progress = silent, connect: Connect | None = None
) -> list[evaluation.Row]:
    """Runs a federation to its end, from its newest checkpoint where the directory has one.

    Args:
        config: what to run.
        directory: the run's; made where it does not exist.
        progress: told about clients trained and texts evaluated.
        connect: finds clients elsewhere; by default they take turns in this process.

    Returns:
        The rows of the results table, one a task; none where the configuration names nothing to evaluate on.

    Raises:
        FedeatError: the data, the model or the configuration does not allow the run, or a round misses its quorum.
    """
    with records.RunDirectory(directory) as home:
        records.check(directory, to_toml(config))
        finished = records.read_evaluation(directory)
        if finished is not None:
            _log.info("%s was finished before; nothing is run again.", directory)
            return list(finished["rows"])
        checkpoint = home.newest_checkpoint()
        with _threads(config.threads or (records.threads_before(directory) if checkpoint is not None else 0)):
            requests = measuring.requests(config)  # a broken file is told before anything trains
            federation = prepare(config, progress=progress, connect=connect, residuals=directory / "residuals")
            # Not before it is known that the run can train: a mistake is corrected and the same command given again.
            home.start(to_toml(config), records.environment(torch.get_num_threads()))
            shares = {str(client): share for client, share in federation.shares.items()}
            record = {"clients": shares, "left_out": dict(federation.left_out)}
            records.write_json(directory / "partition.json", record)
            adapter = _train(config, federation, home, checkpoint)
            federation.model.load_adapter(adapter)
            federation.model.save_adapter(home.adapter, adapter)
            found = measuring.measure(config, federation.model, federation.evaluation_sets, requests, progress)
        rows = [{**labels(config), **row, "run": directory.name} for row in found["rows"]]
        records.write_json(home.evaluation_file, {**found, "rows": rows})
        return rows


def resume(directory: Path, *, progress: Progress = silent) -> list[evaluation.Row]:
    """Goes on with the run a directory holds, as if it had never stopped.

    Raises:
        RecordError: the directory holds no run.
        FedeatError: as `run`.
    """
    file = directory / "config.toml"
    if not file.is_file():
        why = "it has no config.toml" if directory.is_dir() else "there is no such directory"
        why = "it is a file" if directory.is_file() else why
        raise RecordError(f"{directory} holds no run: {why}. Expected the directory of an earlier run.")
    if records.kind_of(directory) == "comparison":
        raise RecordError(f"{directory} holds a comparison. It goes on with the command that began it: fedeat compare.")
    finished = records.read_evaluation(directory)
    if finished is None:
        return run(load(file), directory, progress=progress)
    # Before the configuration is checked: its data may no longer be there, and is not needed.
    _log.info("%s was finished before; nothing is run again.", directory)
    return list(finished["rows"])


def evaluate_base(config: Config, directory: Path, *, progress: Progress = silent) -> list[evaluation.Row]:
    """Evaluates the base model as it came, without an adapter, as the row "base" of a comparison.

    A classifier's head is then the fresh one, so its row shows chance.

    Raises:
        FedeatError: the model or the evaluation data cannot be used.
    """
    with records.RunDirectory(directory) as home, _threads(config.threads):
        model = load_model(model_source(config, training_examples(config)), lora=None, seed=config.seed)
        sets = answerable(evaluation_sets(config.evaluation.data), heads(model))
        found = measuring.measure(config, model, sets, measuring.requests(config), progress)
        named = {"method": "base", "attack": "none", "byzantine_fraction": 0.0, "seed": config.seed}
        rows = [{**named, **row, "run": directory.name} for row in found["rows"]]
        records.write_json(home.evaluation_file, {**found, "rows": rows})
        return rows


def labels(config: Config) -> dict[str, Any]:
    """What a row says of the run it comes from."""
    return {
        "method": config.method,
        "attack": config.attack.kind,
        "byzantine_fraction": config.attack.fraction,
        "partition": partition_name(config.partition),
        "seed": config.seed,
    }


def _train(
    config: Config, federation: Federation, home: records.RunDirectory, checkpoint: records.Checkpoint | None
) -> Adapter:
    """The rounds that are left, each recorded and made the state to go on from; the adapter after the last."""
    model = federation.model
    home.rewind(checkpoint)
    adapter: Adapter = model.adapter() if checkpoint is None else checkpoint.adapter
    clients = range(len(federation.partition))
    cohort = config.federation.clients_per_round or len(clients)
    began = time.monotonic()
    for result in run_rounds(
        adapter,
        clients=clients,
        cohort_size=cohort,
        rounds=config.federation.rounds,
        play=federation.play,
        seed=config.seed,
        first_round=0 if checkpoint is None else checkpoint.next_round,
    ):
        adapter = result.adapter
        spent = privacy.spent(config, result.index)
        home.append_metrics(round_records.round_lines(result, malicious=federation.malicious, epsilon=spent))
        if config.evaluation.every and (result.index + 1) % config.evaluation.every == 0:
            home.append_metrics(round_records.evaluation_lines(result.index, _benign_rows(config, federation, adapter)))
        home.append_timing(round_records.timing_line(result.index, time.monotonic() - began))
        model.save_adapter(home.adapter, adapter)
        home.write_checkpoint(result.index, adapter, keep=config.federation.keep_checkpoints)
        began = time.monotonic()
    return adapter


def _benign_rows(config: Config, federation: Federation, adapter: Adapter) -> list[evaluation.Row]:
    federation.model.load_adapter(adapter)
    benign = [replace(entry, pairs=()) for entry in federation.evaluation_sets if entry.benign]
    return measuring.evaluate(config, federation.model, benign, silent)[0]


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
