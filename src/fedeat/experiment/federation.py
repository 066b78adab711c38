"""From a configuration to a federation that is ready to train: data, model, clients, and what plays a round.

Nothing below this file, but for `inputs`, `binding` and `playing` that serve it, reads a configuration.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from fedeat.algorithm import Aggregate, PlayRound, RunClients
from fedeat.attacks import byzantine
from fedeat.config import Config, cohort_problems
from fedeat.data import Encoded, Example, partition, require_targets, truncation
from fedeat.engine.encoding import Residuals, encoded_clients
from fedeat.errors import ConfigError
from fedeat.evaluation import EvaluationSet, tasks
from fedeat.experiment import binding, measuring, playing, round_records
from fedeat.experiment.inputs import answerable, evaluation_sets, split_examples, training_data
from fedeat.model import AdaptedModel, fingerprint, load_model
from fedeat.updates import ClientUpdate

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
    kept = answerable(sets, heads(model))
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


def heads(model: AdaptedModel) -> Mapping[str, range] | None:
    """The classes of each task that a classifier has a head for; None for a model that is asked in words."""
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
