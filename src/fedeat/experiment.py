"""From a configuration to a finished run: data, model, clients, rounds, evaluation, records.

This is where names in a configuration become functions; nothing below this file reads a configuration.
"""

from __future__ import annotations

import contextlib
import functools
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from fedeat import aggregation, evaluation, objective, partition, perturbation, records, seeding
from fedeat.algorithm import Aggregate, LocalTraining, Round, RunClients, run_rounds
from fedeat.attacks import byzantine
from fedeat.attacks.poisoning import flip_labels
from fedeat.config import RULES, Config, PerturbationSection, Source, load, to_toml
from fedeat.data import OUTPUT_FIELDS, Encoded, Example, instruction_examples, is_local, read_hub, read_rows
from fedeat.engine import in_process
from fedeat.errors import ConfigError, DataError, RecordError
from fedeat.evaluation import EvaluationSet, tasks
from fedeat.model import AdaptedModel, Lora, ModelSource, load_model
from fedeat.updates import Adapter, ClientUpdate, norm

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much."""


def silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


@dataclass(frozen=True)
class Federation:
    """Everything a run trains with, ready to go.

    Attributes:
        model: the base model with the fresh adapter in it.
        examples: all training examples.
        partition: client -> indices into `examples`.
        malicious: the malicious clients.
        run_clients: the engine, wrapped by the attack.
        aggregate: the rule, with its options.
        evaluation_sets: what is evaluated.
    """

    model: AdaptedModel
    examples: Sequence[Example]
    partition: partition.Partition
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
        The rows of the results table, one a task.

    Raises:
        FedeatError: the data, the model or the configuration does not allow the run, or a round misses its quorum.
    """
    with records.RunDirectory(directory) as home, _threads(config.threads):
        home.start(to_toml(config))
        finished = records.read_evaluation(directory)
        if finished is not None:
            return list(finished["rows"])
        federation = prepare(config, progress=progress)
        model = federation.model
        records.write_json(directory / "environment.json", records.environment(torch.get_num_threads()))
        records.write_json(directory / "partition.json", partition_record(federation))
        checkpoint = home.newest_checkpoint()
        home.rewind(checkpoint)
        adapter = model.adapter() if checkpoint is None else checkpoint.adapter
        first = 0 if checkpoint is None else checkpoint.next_round
        clients = range(len(federation.partition))
        cohort = min(config.federation.clients_per_round or len(clients), len(clients))
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
            first_round=first,
        ):
            adapter = result.adapter
            home.append_metrics(_metrics(result, federation.malicious))
            if config.evaluation.every and (result.index + 1) % config.evaluation.every == 0:
                home.append_metrics(_benign_accuracy(config, federation, adapter, result.index))
            home.append_timing({"round": result.index, "seconds": time.monotonic() - began, **_peak_memory()})
            model.save_adapter(home.adapter, adapter)
            home.write_checkpoint(result.index, adapter, keep=config.federation.keep_checkpoints)
            began = time.monotonic()
        model.load_adapter(adapter)
        model.save_adapter(home.adapter, adapter)
        rows, predictions = _evaluate(config, model, federation.evaluation_sets, progress)
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
    return run(load(file), directory, progress=progress)


def evaluate_base(config: Config, directory: Path, *, progress: Progress = silent) -> list[evaluation.Row]:
    """Evaluates the base model as it came, without an adapter, as the row "base" of a comparison.

    A classifier's head is then the fresh one, so its row shows chance.

    Raises:
        FedeatError: the model or the evaluation data cannot be used.
    """
    with _threads(config.threads):
        model = load_model(model_source(config, training_examples(config)), lora=None, seed=config.seed)
        sets = evaluation_sets(config.evaluation.data)
        if config.task == "sequence-classification":
            sets = [evaluation.only(entry, model.heads) for entry in sets]
        rows, predictions = _evaluate(config, model, sets, progress)
    named = {"method": "base", "attack": "none", "byzantine_fraction": 0.0, "seed": config.seed, "run": directory.name}
    rows = [{**named, **row} for row in rows]
    directory.mkdir(parents=True, exist_ok=True)
    records.write_json(directory / "evaluation.json", {"rows": rows, "predictions": predictions})
    return rows


def labels(config: Config) -> dict[str, Any]:
    """What a row says of the run it comes from."""
    return {
        "method": config.method,
        "attack": config.attack.kind,
        "byzantine_fraction": config.attack.fraction,
        "seed": config.seed,
    }


def prepare(config: Config, *, progress: Progress = silent) -> Federation:
    """Loads the data and the model of a run and binds its functions.

    Raises:
        FedeatError: the data, the model or the configuration does not allow the run.
    """
    examples = training_examples(config)
    sets = evaluation_sets(config.evaluation.data)
    model = load_model(
        model_source(config, examples),
        lora=Lora(config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.target_modules),
        seed=config.seed,
    )
    if config.perturbation.kind != "none":
        model.check_embeddings()
    split = split_examples(config, examples)
    if not 1 <= (config.federation.clients_per_round or 1) <= len(split):
        raise ConfigError(
            [
                f"federation.clients_per_round is {config.federation.clients_per_round}, but the data has {len(split)} clients."
            ]
        )
    malicious = byzantine.choose_malicious(range(len(split)), config.attack.fraction, seed=config.seed)
    engine = functools.partial(
        in_process.run_clients,
        model=model,
        training=functools.partial(local_training, config, model.embedding_unit(config.perturbation.norm)),
        batching=in_process.Batching(config.client.batch_size, config.client.max_steps),
        seed=config.seed,
        on_client=_count_clients(config, len(split), progress),
    )
    shards = {client: _encode(model, [examples[i] for i in members]) for client, members in enumerate(split)}
    if config.task == "sequence-classification":
        sets = [evaluation.only(entry, model.heads) for entry in sets]
    return Federation(
        model=model,
        examples=examples,
        partition=split,
        malicious=malicious,
        run_clients=_attacked(
            config, functools.partial(engine, shards=shards), engine, model, examples, split, malicious
        ),
        aggregate=functools.partial(_aggregate, config),
        evaluation_sets=sets,
    )


# Data ---------------------------------------------------------------------------------------------------------------


def training_examples(config: Config) -> list[Example]:
    """All training examples of a configuration: classification tasks by their columns, else instructions.

    Raises:
        DataError: there are none, a file is broken, or a classifier is given free text.
    """
    if not config.data.train:
        raise ConfigError(["data.train is empty. Expected at least one file or data set to train on."])
    column = None if config.partition.by == "label" else config.partition.by
    examples: list[Example] = []
    for source in config.data.train:
        rows = source_rows(source)
        is_task = source.task is not None or _has_labels(rows[0])
        if is_task:
            examples += tasks.examples(rows, source.task, config.task, source=source.path, group_column=column)
        elif config.task == "sequence-classification":
            raise DataError(
                f"{source.path} has no labels to classify: its columns are {', '.join(sorted(rows[0]))}. Expected GLUE "
                'columns (sentence, label; question1, question2, label; ...), or set task = "causal-lm".'
            )
        else:
            examples += instruction_examples(rows, source=source.path, column=column)
    return examples


def _has_labels(row: Mapping[str, Any]) -> bool:
    return "label" in row and not any(name in row for name in OUTPUT_FIELDS)


def source_rows(source: Source) -> list[dict[str, Any]]:
    """Rows of one source, at most its limit: a random part that is the same in every run.

    Raises:
        DataError: it cannot be read.
    """
    rows = read_rows(Path(source.path)) if is_local(source.path) else read_hub(source.path, split=source.split)
    return [rows[i] for i in _limited(len(rows), source.limit)]


def evaluation_sets(sources: Sequence[Source]) -> list[EvaluationSet]:
    """What the sources hold to evaluate on; a limit applies to benign rows, pairs are always whole.

    Raises:
        DataError: a file is broken or holds nothing to evaluate on.
    """
    found = []
    for source in sources:
        entry = evaluation.read_evaluation(source.path, source.task)
        kept = _limited(len(entry.benign), source.limit)
        found.append(replace(entry, benign=tuple(entry.benign[i] for i in kept)))
    return found


def _limited(count: int, limit: int | None) -> list[int]:
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(torch.randperm(count, generator=seeding.generator(0, "limit"))[:limit].tolist())


def split_examples(config: Config, examples: Sequence[Example]) -> partition.Partition:
    """The examples of each client.

    Raises:
        DataError: there are fewer examples than clients, or free text is to be skewed by label.
    """
    section = config.partition
    if section.kind == "iid":
        return partition.iid(len(examples), section.clients, seed=config.seed)
    if section.kind == "column":
        return partition.by_column([example.group or "" for example in examples])
    if section.by == "label" and any(example.label is None for example in examples):
        raise DataError(
            'free instruction data has no labels to skew by. Set partition.by to a column such as "category", or '
            'partition.kind = "iid".'
        )
    groups = [group_name(example, section.by) for example in examples]
    return partition.dirichlet(groups, section.clients, alpha=section.alpha, seed=config.seed)


def group_name(example: Example, by: str) -> str:
    """What a Dirichlet partition counts an example as: its task and answer, or the value of its column."""
    if by != "label" and example.group is not None:
        return example.group
    return f"{example.task}:{tasks.TASKS[example.task].answers[example.label]}" if example.label is not None else "text"


def partition_record(federation: Federation) -> dict[str, Any]:
    """Client -> number of examples, and how many of each label or category."""
    counts = [
        Counter(
            group_name(federation.examples[i], "label" if federation.examples[i].group is None else "group")
            for i in part
        )
        for part in federation.partition
    ]
    return {
        "clients": {
            str(client): {"examples": count.total(), "counts": dict(sorted(count.items()))}
            for client, count in enumerate(counts)
        }
    }


def _encode(model: AdaptedModel, examples: Sequence[Example]) -> list[Encoded]:
    return [model.encode(example) for example in examples]


# Names to functions --------------------------------------------------------------------------------------------------


def model_source(config: Config, examples: Sequence[Example]) -> ModelSource:
    """How the base model is loaded; a classifier gets a head for each task of the training data."""
    present = {example.task for example in examples}
    heads = {name: len(task.answers) for name, task in tasks.TASKS.items() if name in present}
    section = config.model
    return ModelSource(
        name=section.name,
        kind=config.task,
        heads=heads if config.task == "sequence-classification" else None,
        dtype=section.dtype,
        revision=section.revision,
        attention=section.attention,
        gradient_checkpointing=section.gradient_checkpointing,
        load_in_4bit=section.load_in_4bit,
        trust_remote_code=section.trust_remote_code,
        device=section.device,
        template=config.data.template,
        max_length=config.data.max_length,
    )


def local_training(config: Config, unit: float, index: int) -> LocalTraining:
    """The clients' hyperparameters in a round; the radius grows over the first `radius_warmup` rounds.

    Args:
        unit: the absolute length of a relative radius of 1.
        index: the round.
    """
    section = config.perturbation
    warmup = min(1.0, index / section.radius_warmup) if section.radius_warmup else 1.0
    optimizers = {
        "adamw": functools.partial(
            torch.optim.AdamW, lr=config.client.learning_rate, weight_decay=config.client.weight_decay
        ),
        "sgd": functools.partial(
            torch.optim.SGD, lr=config.client.learning_rate, weight_decay=config.client.weight_decay
        ),
    }
    objectives: dict[str, objective.Objective] = {
        "adversarial": objective.adversarial,
        "mixed": functools.partial(objective.mixed, weight=section.weight),
    }
    return LocalTraining(
        local_epochs=config.client.local_epochs,
        perturb=perturb_function(section, unit=unit * warmup),
        objective=objectives[section.objective],
        optimizer=optimizers[config.client.optimizer],
        norm=section.norm,
        unit=unit,
        max_grad_norm=config.client.max_grad_norm,
    )


def perturb_function(section: PerturbationSection, *, unit: float) -> perturbation.Perturb | None:
    """The perturbation a configuration names, with absolute lengths; None for none.

    Args:
        unit: the absolute length of a relative radius of 1.
    """
    radius = section.radius * unit
    step = None if section.step_size is None else section.step_size * unit
    pgd = functools.partial(
        perturbation.pgd, steps=section.steps, step_size=step, projection=section.projection, start=section.start
    )
    functions: dict[str, Any] = {
        "pgd": pgd,
        "fgsm": functools.partial(perturbation.fgsm, start=section.start),
        "random": perturbation.random,
        "none": None,
    }
    chosen = functions[section.kind]
    return None if chosen is None else functools.partial(chosen, radius=radius, norm=section.norm)


def _aggregate(config: Config, updates: Sequence[ClientUpdate], reference: Adapter) -> aggregation.Aggregate[Any]:
    section = config.aggregation
    options: dict[str, Any] = {} if section.byzantine is None else {"byzantine": section.byzantine}
    if section.rule == "geometric_median":
        options = {"tolerance": section.tolerance}
    elif section.rule in ("mean", "coordinate_median"):
        options = {}
    space: dict[str, Any] = {}
    if section.space == "product":
        space = {"space": "product", "reference": reference, "scaling": config.lora.alpha / config.lora.rank}
    sizes = [float(update.num_examples) for update in updates]
    return aggregation.aggregate(
        [update.delta for update in updates],
        rule=functools.partial(RULES[section.rule], **options),
        prior_weights=sizes if section.prior_weights == "num_examples" else None,
        **space,
    )


def _attacked(
    config: Config,
    honest: RunClients,
    engine: Callable[..., list[ClientUpdate]],
    model: AdaptedModel,
    examples: Sequence[Example],
    split: partition.Partition,
    malicious: frozenset[int],
) -> RunClients:
    section = config.attack
    if section.kind == "sign_flip":
        return byzantine.sign_flip(honest, malicious=malicious, scale=section.scale)
    if section.kind == "gaussian":
        return byzantine.gaussian(honest, malicious=malicious, scale=section.scale, seed=config.seed)
    if section.kind == "nan":
        return byzantine.not_a_number(honest, malicious=malicious)
    if section.kind == "label_flip":
        answers = {name: task.answers for name, task in tasks.TASKS.items()}
        wrong = {
            client: flip_labels(
                [examples[i] for i in split[client]],
                answers=answers,
                seed=seeding.derive(config.seed, "poison", client),
            )
            for client in malicious
        }
        shards = {client: _encode(model, poisoned) for client, poisoned in wrong.items()}
        return byzantine.label_flip(honest, malicious=malicious, poisoned=functools.partial(engine, shards=shards))
    return honest


# Records -------------------------------------------------------------------------------------------------------------


def _metrics(result: Round, malicious: frozenset[int]) -> list[dict[str, Any]]:
    losses = [update.metrics["loss"] for update in result.updates]
    summary = {
        "kind": "round",
        "round": result.index,
        "cohort": list(result.cohort),
        "accepted": [update.client_id for update in result.updates],
        "malicious": [client for client in result.cohort if client in malicious],
        "weights": {str(client): weight for client, weight in result.weights.items()},
        "iterations": result.iterations,
        "gap": result.gap,
        "loss": sum(losses) / len(losses),
        "update_norm": result.update_norm,
        "rejected": [{"client": item.client_id, "reason": item.reason} for item in result.rejected],
    }
    clients = [
        {
            "kind": "client",
            "round": result.index,
            "client": update.client_id,
            "malicious": update.client_id in malicious,
            "num_examples": update.num_examples,
            **update.metrics,
            # As received, not as claimed.
            "update_norm": norm(update.delta),
        }
        for update in result.updates
    ]
    return [summary, *clients]


def _benign_accuracy(config: Config, federation: Federation, adapter: Adapter, index: int) -> list[dict[str, Any]]:
    federation.model.load_adapter(adapter)
    benign = [replace(entry, pairs=()) for entry in federation.evaluation_sets if entry.benign]
    rows, _ = _evaluate(config, federation.model, benign, silent) if benign else ([], {})
    return [
        {"kind": "evaluation", "round": index, "task": row["task"], "accuracy": row["accuracy"], "n": row["benign"]}
        for row in rows
    ]


def _evaluate(
    config: Config, model: AdaptedModel, sets: Sequence[EvaluationSet], progress: Progress
) -> tuple[list[evaluation.Row], dict[str, evaluation.TaskPredictions]]:
    return evaluation.evaluate(
        model,
        sets,
        scorer=config.evaluation.scorer,
        batch_size=config.evaluation.batch_size,
        progress=functools.partial(progress, "evaluate"),
    )


def _count_clients(config: Config, clients: int, progress: Progress) -> Callable[[int, int], None]:
    cohort = config.federation.clients_per_round or clients
    total = config.federation.rounds * cohort

    def count(index: int, done: int) -> None:
        progress("train", index * cohort + done, total)

    return count


def _peak_memory() -> dict[str, int]:
    memory = {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        memory["peak_accelerator_bytes"] = torch.cuda.max_memory_allocated()
    return memory


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
