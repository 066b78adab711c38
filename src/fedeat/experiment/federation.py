"""From a configuration to a finished run: data, model, clients, rounds, evaluation, records.

Nothing below this file, but for `inputs`, `binding` and `playing` that serve it, reads a configuration.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from fedeat import evaluation, records
from fedeat.algorithm import Aggregate, PlayRound, RunClients, run_rounds
from fedeat.attacks import byzantine
from fedeat.config import Config, cohort_problems, load, to_toml
from fedeat.data import Encoded, Example, partition, require_targets, truncation
from fedeat.engine.encoding import Residuals, encoded_clients
from fedeat.errors import ConfigError, RecordError
from fedeat.evaluation import EvaluationSet, tasks
from fedeat.experiment import binding, measuring, playing, privacy, round_records
from fedeat.experiment.binding import model_source
from fedeat.experiment.inputs import (
    answerable,
    evaluation_sets,
    partition_name,
    split_examples,
    training_data,
    training_examples,
)
from fedeat.model import AdaptedModel, fingerprint, load_model
from fedeat.updates import Adapter, ClientUpdate

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
        examples: all training examples; none where clients keep theirs elsewhere.
        left_out: why and how many rows of the data are not among them.
        partition: client -> indices into `examples`.
        shards: client -> its examples as tokens; none where clients keep theirs elsewhere.
        shares: client -> what partition.json says of its data.
        malicious: the malicious clients.
        run_clients: the engine, wrapped by the attack.
        aggregate: the rule, with its options.
        play: a round, over these two or over secure sums.
        evaluation_sets: what is evaluated.
    """

    model: AdaptedModel
    examples: Sequence[Example]
    left_out: Mapping[str, int]
    partition: partition.Partition
    shards: Mapping[int, Sequence[Encoded]]
    shares: Mapping[int, Mapping[str, Any]]
    malicious: frozenset[int]
    run_clients: RunClients
    aggregate: Aggregate
    play: PlayRound
    evaluation_sets: Sequence[EvaluationSet]


@dataclass(frozen=True)
class Elsewhere:
    """Clients that hold their data and train in other processes, or on other machines.

    Attributes:
        run_clients: reaches them; takes `on_client` as `engine.in_process.run_clients` does, and as `base` the
            fingerprint of the server's base model, which who is not in `bases` is still held to.
        shares: client -> what partition.json says of its data; its keys are all clients, 0..n-1.
        tasks: of the clients' examples, None among them where some are free text.
        left_out: why and how many rows of their data they do not train on.
        ask: (round, requests) -> answers of a secure sum's clients; None where they cannot be asked.
        bases: client -> the fingerprint of the base model that it has loaded; who is not in it has not said.
    """

    run_clients: Callable[..., list[ClientUpdate]]
    shares: Mapping[int, Mapping[str, Any]]
    tasks: frozenset[str | None]
    left_out: Mapping[str, int]
    ask: playing.AskClients | None = None
    bases: Mapping[int, str] = field(default_factory=dict)


ANOTHER_BASE = (
    "its base model is another than the server's: weights or tokenizer differ, so its adapter means something else. "
    "Give both the same files, and the same model.dtype."
)
"""Why a client's updates are not asked for."""

Connect: TypeAlias = Callable[[Config], Elsewhere]
"""Finds a run's clients, waiting for them where need be."""


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
        sets = answerable(evaluation_sets(config.evaluation.data), _heads(model))
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


def prepare(
    config: Config, *, progress: Progress = silent, connect: Connect | None = None, residuals: Path | None = None
) -> Federation:
    """Loads the data and the model of a run and binds its functions.

    Args:
        config: the run's.
        progress: told about clients trained.
        connect: finds clients elsewhere; by default their data is loaded and they train in this process.
        residuals: where the clients of this process keep what rounding took from their updates; None for nowhere.

    Raises:
        FedeatError: the data, the model or the configuration does not allow the run.
    """
    if connect is not None:
        return _prepare_server(config, connect(config), progress)
    data = training_data(config)
    examples = data.examples
    sets = evaluation_sets(config.evaluation.data)
    split = split_examples(config, examples, data.sizes)
    problems = cohort_problems(config, len(split))
    if problems:  # here for a partition by column, whose clients the data tells
        raise ConfigError(problems)
    _check_target(config, {example.task for example in examples})
    model = load_trained_model(config, {example.task for example in examples})
    sets = _evaluated(config, model, sets)
    malicious = byzantine.choose_malicious(range(len(split)), config.attack.fraction, seed=config.seed)
    binding.check_harmful_rows(config, examples)
    encoded = _encode(model, examples)
    require_targets(encoded, source="data.train")
    _tell_cuts(encoded, config.data.max_length)
    tokens = dict(zip(examples, encoded, strict=True))
    held = binding.client_examples(config, examples, split, malicious=malicious)
    shards = {
        client: [tokens[example] if example in tokens else model.encode(example) for example in part]
        for client, part in held.items()
    }
    engine = functools.partial(
        binding.local_engine(config, model),
        shards=shards,
        clients_per_batch=binding.clients_at_once(config, model, encoded),
        on_client=_count_clients(config, len(split), progress),
    )
    section = config.communication
    store = Residuals(residuals) if residuals is not None and section.error_feedback else None
    run_clients = encoded_clients(engine, encoding=section.encoding, residuals=store, seed=config.seed)
    run_clients, ask = playing.sealed(config, run_clients)
    aggregate = binding.aggregate_function(config)
    run_clients = binding.attacked(config, run_clients, malicious=malicious, aggregate=aggregate)
    return Federation(
        model=model,
        examples=examples,
        left_out=data.left_out,
        partition=split,
        shards=shards,
        shares=round_records.client_shares(examples, split, shards),
        malicious=malicious,
        run_clients=run_clients,
        aggregate=aggregate,
        play=playing.play_function(config, len(split), run_clients, aggregate, ask),
        evaluation_sets=sets,
    )


def load_trained_model(config: Config, present: Collection[str | None]) -> AdaptedModel:
    """The base model with the run's fresh adapter, the same on every machine.

    Args:
        config: the run's.
        present: the tasks of the clients' examples; a classifier gets a head for each.

    Raises:
        ModelError: it cannot be loaded, or not be perturbed where the run perturbs.
    """
    model = load_model(binding.model_source_for(config, present), lora=binding.lora(config), seed=config.seed)
    if config.perturbation.kind != "none":
        model.check_embeddings()
    return model


def _check_target(config: Config, trained: Collection[str | None]) -> None:
    """Checks that a backdoor's target is an answer that its clients can be taught.

    Args:
        config: the run's.
        trained: the tasks of the clients' examples; free text, which has none, may be answered by anything.

    Raises:
        ConfigError: it is none, so that the attackers would train on clean data.
    """
    if config.attack.kind != "backdoor" or not all(name in tasks.TASKS for name in trained):
        return
    answers = [answer for name, task in tasks.TASKS.items() if name in trained for answer in task.answers]
    if config.attack.target not in answers:
        raise ConfigError(
            [
                f'attack.target is "{config.attack.target}", and nobody trains on a task with that answer. Expected '
                f"one of {', '.join(dict.fromkeys(answers))}."
            ]
        )


def _evaluated(config: Config, model: AdaptedModel, sets: Sequence[EvaluationSet]) -> list[EvaluationSet]:
    """What of the evaluation the model can answer; what it cannot be shown is said before any training."""
    kept = answerable(sets, _heads(model))
    measuring.tell_cuts(model, kept, config.evaluation.scorer)
    return kept


def _prepare_server(config: Config, elsewhere: Elsewhere, progress: Progress) -> Federation:
    """A run whose clients hold their data elsewhere: the server has the model and what it evaluates on."""
    count = len(elsewhere.shares)
    problems = cohort_problems(config, count)
    if problems:
        raise ConfigError(problems)
    sets = evaluation_sets(config.evaluation.data)
    _check_target(config, elsewhere.tasks)
    model = load_trained_model(config, elsewhere.tasks)
    sets = _evaluated(config, model, sets)
    malicious = byzantine.choose_malicious(range(count), config.attack.fraction, seed=config.seed)
    own = fingerprint(model)
    reached = functools.partial(elsewhere.run_clients, base=own, on_client=_count_clients(config, count, progress))
    others = sorted(client for client, base in elsewhere.bases.items() if base != own)
    run_clients = playing.without(reached, dict.fromkeys(others, ANOTHER_BASE))
    aggregate = binding.aggregate_function(config)
    run_clients = binding.attacked(config, run_clients, malicious=malicious, aggregate=aggregate)
    return Federation(
        model=model,
        examples=(),
        left_out=elsewhere.left_out,
        partition=((),) * count,
        shards={},
        shares=elsewhere.shares,
        malicious=malicious,
        run_clients=run_clients,
        aggregate=aggregate,
        play=playing.play_function(config, count, run_clients, aggregate, elsewhere.ask),
        evaluation_sets=sets,
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
