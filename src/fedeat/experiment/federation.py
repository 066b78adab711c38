"""From a configuration to a finished run: data, model, clients, rounds, evaluation, records.

Nothing below this file, but for `inputs` and `binding` that serve it, reads a configuration.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from fedeat import evaluation, records
from fedeat.algorithm import Aggregate, RunClients, run_rounds
from fedeat.attacks import byzantine
from fedeat.config import Config, cohort_problems, load, to_toml
from fedeat.data import Encoded, Example, partition, require_targets, truncation
from fedeat.engine import in_process
from fedeat.errors import ConfigError, RecordError
from fedeat.evaluation import EvaluationSet
from fedeat.experiment import binding, round_records
from fedeat.experiment.binding import local_training, model_source
from fedeat.experiment.inputs import (
    answerable,
    evaluation_sets,
    partition_name,
    split_examples,
    training_data,
    training_examples,
)
from fedeat.model import AdaptedModel, load_model
from fedeat.updates import Adapter

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much."""

_log = logging.getLogger(__name__)


def silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


@dataclass(frozen=True)
class Federation:
    """Everything a run trains with, ready to go.

    Attributes:
        model: the base model with the fresh adapter in it.
        examples: all training examples.
        left_out: why and how many rows of the data are not among them.
        partition: client -> indices into `examples`.
        shards: client -> its examples as tokens.
        malicious: the malicious clients.
        run_clients: the engine, wrapped by the attack.
        aggregate: the rule, with its options.
        evaluation_sets: what is evaluated.
    """

    model: AdaptedModel
    examples: Sequence[Example]
    left_out: Mapping[str, int]
    partition: partition.Partition
    shards: Mapping[int, Sequence[Encoded]]
    malicious: frozenset[int]
    run_clients: RunClients
    aggregate: Aggregate
    evaluation_sets: Sequence[EvaluationSet]


def run(config: Config, directory: Path, *, progress: Progress = silent) -> list[evaluation.Row]:
    """Runs a federation to its end, from its newest checkpoint where the directory has one.

    Args:
        config: what to run.
        directory: the run's; made where it does not exist.
        progress: told about clients trained and texts evaluated.

    Returns:
        The rows of the results table, one a task; none where the configuration names nothing to evaluate on.

    Raises:
        FedeatError: the data, the model or the configuration does not allow the run, or a round misses its quorum.
    """
    with records.RunDirectory(directory) as home:
        home.start(to_toml(config))
        finished = records.read_evaluation(directory)
        if finished is not None:
            _log.info("%s was finished before; nothing is run again.", directory)
            return list(finished["rows"])
        checkpoint = home.newest_checkpoint()
        with _threads(config.threads or (home.threads_before() if checkpoint is not None else 0)):
            federation = prepare(config, progress=progress)
            records.write_json(directory / "environment.json", records.environment(torch.get_num_threads()))
            record = round_records.partition_record(
                federation.examples, federation.partition, federation.shards, federation.left_out
            )
            records.write_json(directory / "partition.json", record)
            adapter = _train(config, federation, home, checkpoint)
            federation.model.load_adapter(adapter)
            federation.model.save_adapter(home.adapter, adapter)
            rows, predictions = _evaluate(config, federation.model, federation.evaluation_sets, progress)
        rows = [{**labels(config), **row, "run": directory.name} for row in rows]
        records.write_json(home.evaluation_file, {"rows": rows, "predictions": predictions})
        return rows


def resume(directory: Path, *, progress: Progress = silent) -> list[evaluation.Row]:
    """Goes on with the run a directory holds, as if it had never stopped.

    Raises:
        RecordError: the directory holds no run.
        FedeatError: as `run`.
    """
    file = directory / "config.toml"
    if not file.is_file():
        raise RecordError(f"{directory} holds no run: it has no config.toml. Expected the directory of an earlier run.")
    if (directory / "results.json").exists():
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
        sets = answerable(evaluation_sets(config.evaluation.data), _heads(model))
        rows, predictions = _evaluate(config, model, sets, progress)
        named = {"method": "base", "attack": "none", "byzantine_fraction": 0.0, "seed": config.seed}
        rows = [{**named, **row, "run": directory.name} for row in rows]
        records.write_json(home.evaluation_file, {"rows": rows, "predictions": predictions})
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


def prepare(config: Config, *, progress: Progress = silent) -> Federation:
    """Loads the data and the model of a run and binds its functions.

    Raises:
        FedeatError: the data, the model or the configuration does not allow the run.
    """
    data = training_data(config)
    examples = data.examples
    sets = evaluation_sets(config.evaluation.data)
    split = split_examples(config, examples)
    problems = cohort_problems(config, len(split))
    if problems:  # here for a partition by column, whose clients the data tells
        raise ConfigError(problems)
    model = load_model(model_source(config, examples), lora=binding.lora(config), seed=config.seed)
    if config.perturbation.kind != "none":
        model.check_embeddings()
    malicious = byzantine.choose_malicious(range(len(split)), config.attack.fraction, seed=config.seed)
    engine = functools.partial(
        in_process.run_clients,
        model=model,
        training=functools.partial(local_training, config, model.embedding_unit(config.perturbation.norm)),
        batching=in_process.Batching(config.client.batch_size, config.client.max_steps, config.client.tokens_per_batch),
        seed=config.seed,
        on_client=_count_clients(config, len(split), progress),
    )
    encoded = _encode(model, examples)
    require_targets(encoded, source="data.train")
    _tell_cuts(encoded, config.data.max_length)
    tokens = dict(zip(examples, encoded, strict=True))
    held = binding.client_examples(config, examples, split, malicious=malicious)
    shards = {
        client: [tokens[example] if example in tokens else model.encode(example) for example in part]
        for client, part in held.items()
    }
    aggregate = binding.aggregate_function(config)
    run_clients = binding.attacked(
        config, functools.partial(engine, shards=shards), malicious=malicious, aggregate=aggregate
    )
    return Federation(
        model=model,
        examples=examples,
        left_out=data.left_out,
        partition=split,
        shards=shards,
        malicious=malicious,
        run_clients=run_clients,
        aggregate=aggregate,
        evaluation_sets=answerable(sets, _heads(model)),
    )


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
        run_clients=federation.run_clients,
        aggregate=federation.aggregate,
        quorum=config.federation.quorum or cohort // 2 + 1,
        seed=config.seed,
        first_round=0 if checkpoint is None else checkpoint.next_round,
    ):
        adapter = result.adapter
        home.append_metrics(round_records.round_lines(result, malicious=federation.malicious))
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
    return _evaluate(config, federation.model, benign, silent)[0]


def _evaluate(
    config: Config, model: AdaptedModel, sets: Sequence[EvaluationSet], progress: Progress
) -> tuple[list[evaluation.Row], dict[str, evaluation.TaskPredictions]]:
    if not sets:
        return [], {}
    return evaluation.evaluate(
        model,
        sets,
        scorer=config.evaluation.scorer,
        batch_size=config.evaluation.batch_size,
        triggered=binding.triggered_function(config),
        progress=functools.partial(progress, "evaluate"),
    )


def _heads(model: AdaptedModel) -> Mapping[str, range] | None:
    return model.heads if model.kind == "sequence-classification" else None


def _encode(model: AdaptedModel, examples: Sequence[Example]) -> list[Encoded]:
    return [model.encode(example) for example in examples]


def _tell_cuts(encoded: Sequence[Encoded], max_length: int) -> None:
    count = truncation(encoded)
    of = f"of {count['examples']} training examples do not fit into data.max_length = {max_length}"
    if count["cut_answers"]:
        _log.warning("%d %s even without their prompts: their answers lose their ends.", count["cut_answers"], of)
    if count["cut_prompts"]:
        _log.info("%d %s: their prompts lose their middles, their answers nothing.", count["cut_prompts"], of)


def _count_clients(config: Config, clients: int, progress: Progress) -> Callable[[int, int], None]:
    cohort = config.federation.clients_per_round or clients
    total = config.federation.rounds * cohort

    def count(index: int, done: int) -> None:
        progress("train", index * cohort + done, total)

    return count


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
