"""Problems of a configuration that no single key shows: missing files, and keys that do not fit together."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import get_args

from fedeat import aggregation
from fedeat.aggregation import CoordinateRule
from fedeat.config.rules import RULES, aggregation_rule
from fedeat.config.schema import METHOD_NAMES, Config, ScaledAttack
from fedeat.data import is_local


def contradictions(config: Config) -> list[str]:
    """Every such problem, one line each."""
    return [
        *_missing_files(config),
        *_partition(config),
        *_perturbation(config),
        *_aggregation(config),
        *_secure_aggregation(config),
        *_privacy(config),
        *_attack(config),
        *_evaluation(config),
        *_comparison(config),
    ]


def training_alone(config: Config) -> list[str]:
    """What must change for clients to train at once.

    Each draw in a pass would be another than a client's own; and weights that differ by client suit no compiled layer.
    """
    section = config.perturbation
    needs = {
        "lora.dropout = 0": config.lora.dropout == 0,
        'model.dtype other than "float16"': config.model.dtype != "float16",
        "model.load_in_4bit = false": not config.model.load_in_4bit,
        "model.compile = false": not config.model.compile,
        'perturbation.kind other than "random"': section.kind != "random",
        'perturbation.start = "zero"': section.start == "zero" or section.kind == "none",
        "privacy.noise_multiplier = 0": config.privacy.noise_multiplier == 0,
        "perturbation.share = 1": section.share == 1 or section.kind == "none",
    }
    return [need for need, is_met in needs.items() if not is_met]


def cohort_problems(config: Config, clients: int) -> list[str]:
    """What cannot be done with this number of clients: a larger cohort, a larger quorum, too many attackers.

    Args:
        config: whose `partition.clients` is not looked at.
        clients: n >= 1; a partition by column finds it in the data.
    """
    section = config.federation
    cohort = clients if section.clients_per_round is None else section.clients_per_round
    problems = []
    if cohort > clients:
        problems.append(f"federation.clients_per_round is {cohort}, more than the {clients} clients. Lower it.")
    if section.quorum is not None and section.quorum > cohort:
        problems.append(f"federation.quorum is {section.quorum}, more than the {cohort} clients a round. Lower it.")
    rule = config.aggregation.rule
    asked = config.aggregation.byzantine
    # The most that the rule's theory allows, whatever its default: it is told to withstand everybody.
    most = aggregation.tolerates(aggregation_rule(rule, config.aggregation.before, byzantine=cohort), cohort)
    if asked is not None and asked > most:
        problems.append(
            f"aggregation.byzantine is {asked}, but {rule} over {cohort} clients a round withstands at most {most}; no "
            "rule withstands half or more. Lower it, draw more clients a round, or choose another rule."
        )
    # As `attacks.byzantine.choose_malicious` counts them: never half.
    if config.attack.fraction > 0 and min(round(config.attack.fraction * clients), (clients - 1) // 2) == 0:
        problems.append(
            f"attack.fraction is {config.attack.fraction}, which of {clients} clients is nobody. Raise it, or set "
            f"attack.fraction to 0."
        )
    return problems


def _missing_files(config: Config) -> Iterator[str]:
    for key, sources in (("data.train", config.data.train), ("evaluation.data", config.evaluation.data)):
        for source in sources:
            if is_local(source.path) and not Path(source.path).is_file():
                what = "is a directory, expected a file" if Path(source.path).is_dir() else "does not exist"
                yield f"{key}: file {source.path} {what}. A relative path starts at {Path.cwd()}."
    for file in config.evaluation.refusals:
        if not Path(file).is_file():
            yield f"evaluation.refusals: file {file} does not exist. A relative path starts at {Path.cwd()}."
    name = config.model.name
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        yield f"model.name: directory {name} does not exist. A relative path starts at {Path.cwd()}."


def _partition(config: Config) -> Iterator[str]:
    if config.partition.kind == "file":
        if config.data.train:
            yield from cohort_problems(config, len(config.data.train))
    elif config.partition.kind != "column":
        yield from cohort_problems(config, config.partition.clients)
    elif config.partition.by == "label":
        yield 'partition.kind = "column" needs partition.by, the name of a column, such as "client".'
    if config.partition.exclude and config.partition.by == "label":
        yield 'partition.exclude needs partition.by, the column whose values it names, such as "client".'
    # A partition by file without files is a server's: its clients hold their data on nodes of their own.
    if not config.data.train and config.partition.kind != "file":
        yield "data.train is empty. Expected at least one file or data set to train on."


def _perturbation(config: Config) -> Iterator[str]:
    if config.perturbation.weight < 0:
        yield (
            f"perturbation.weight is {config.perturbation.weight}, expected >= 0. The paper's Eq. 2 prints a minus "
            "sign, which rewards a high adversarial loss; training on it diverges."
        )
    section = config.perturbation
    variants = {
        'objective = "freelb"': section.objective == "freelb",
        "harvest_clean_gradient": section.harvest_clean_gradient,
        "yopo_inner": section.yopo_inner > 0,
    }
    chosen = [name for name, is_set in variants.items() if is_set]
    if len(chosen) > 1:
        yield f"perturbation: {' and '.join(chosen)} are ways of their own to a step. Choose one."
    for name in chosen if section.kind != "none" else ():
        if section.kind != "pgd" or section.projection != "accumulated":
            yield f'perturbation: {name} needs kind = "pgd" and projection = "accumulated".'
        if section.share < 1:
            yield f"perturbation: {name} perturbs whole batches. Set share to 1."
    if section.objective == "freelb" and section.steps == 1 and section.start == "zero":
        yield 'perturbation.objective = "freelb" with one step from zero trains on the clean input alone. Raise steps.'
    reasons = training_alone(config)
    if config.client.clients_per_batch > 1 and reasons:
        yield f"client.clients_per_batch above 1 needs {', '.join(reasons)}. Change that, or set it to 1."
    if section.harvest_clean_gradient and (section.objective != "mixed" or section.start != "zero"):
        yield 'perturbation.harvest_clean_gradient needs objective = "mixed" and start = "zero".'
    if section.yopo_inner and section.objective == "kl":
        yield 'perturbation.yopo_inner raises the loss, not a divergence. Set objective to "adversarial" or "mixed".'
    if section.objective == "kl" and section.kind != "none":
        if section.start != "random" and section.kind != "random":
            yield 'perturbation.objective = "kl" needs start = "random": at zero, the divergence has no gradient.'
        if section.share < 1:
            yield 'perturbation.objective = "kl" perturbs whole batches. Set share to 1.'


def _aggregation(config: Config) -> Iterator[str]:
    section = config.aggregation
    if isinstance(RULES[section.rule], CoordinateRule):
        by_coordinate = f"a rule on distances; {section.rule} goes coordinate by coordinate"
        if section.space == "product":
            yield f'aggregation.space = "product" needs {by_coordinate}. Set it to "factors", or choose another rule.'
        if section.before:
            yield f"aggregation.before needs {by_coordinate}. Leave the steps out, or choose another rule."


def _secure_aggregation(config: Config) -> Iterator[str]:
    if not config.secure_aggregation.enabled:
        return
    section, unseen = config.aggregation, "the server of secure_aggregation sees no single update"
    if section.rule not in ("geometric_median", "mean"):
        yield f'aggregation.rule = "{section.rule}": {unseen}. Set it to "geometric_median" or "mean".'
    needs_single = {
        "aggregation.before": bool(section.before),
        'aggregation.grouping = "layer"': section.grouping != "model",
        'aggregation.space = "product"': section.space != "factors",
        'aggregation.prior_weights = "num_examples"': section.prior_weights != "uniform",
        f'communication.encoding = "{config.communication.encoding}"': config.communication.encoding != "float32",
    }
    for key, is_set in needs_single.items():
        if is_set:
            yield f"{key}: {unseen}. Leave it out."
    if config.attack.kind not in ("none", "label_flip"):
        yield (
            f'attack.kind = "{config.attack.kind}" is played on single updates, and {unseen}. Simulate it without '
            'secure_aggregation, or choose "label_flip", which works through data.'
        )
    if importlib.util.find_spec("cryptography") is None:
        yield 'secure_aggregation needs cryptography: pip install "fedeat[flower]".'


def _privacy(config: Config) -> Iterator[str]:
    if not config.privacy.noise_multiplier:
        return
    if importlib.util.find_spec("opacus") is None:
        yield 'privacy needs opacus, for its accountant: pip install "fedeat[privacy]".'
    if config.client.tokens_per_batch is not None:
        yield "client.tokens_per_batch looks at lengths, which privacy forbids. Leave it out."
    if config.perturbation.share < 1 and config.perturbation.kind != "none":
        yield "perturbation.share is of a batch, and privacy works on samples one at a time. Set share to 1."
    if config.lora.dropout:
        yield (
            "lora.dropout draws from the run's seed, by the lengths of all records, so that one changes what others "
            "add, which privacy forbids. Set it to 0."
        )


def _attack(config: Config) -> Iterator[str]:
    if config.attack.kind != "none" and config.attack.fraction == 0:
        yield f'attack.kind is "{config.attack.kind}" but attack.fraction is 0. Set a fraction above 0.'
    if config.attack.kind == "none" and config.attack.fraction > 0:
        yield f'attack.fraction is {config.attack.fraction} but attack.kind is "none". Set what they do.'
    if config.attack.scale is not None and config.attack.kind not in get_args(ScaledAttack):
        yield (
            f'attack.scale is {config.attack.scale:g} but attack.kind is "{config.attack.kind}", which has none. '
            f"Remove it; a comparison has compare.scales, such as {{ sign_flip = {config.attack.scale:g} }}."
        )
    if not config.attack.target and "backdoor" in (config.attack.kind, *config.compare.attacks):
        yield 'a backdoor needs attack.target, the answer that its trigger calls up, such as "positive".'


def _evaluation(config: Config) -> Iterator[str]:
    if config.task == "sequence-classification" and config.evaluation.scorer != "likelihood":
        yield 'evaluation.scorer = "generation" needs task = "causal-lm"; a classifier generates nothing.'
    if config.task == "sequence-classification" and config.evaluation.refusals:
        yield 'evaluation.refusals needs task = "causal-lm"; a classifier answers no requests.'
    if config.evaluation.every and not config.evaluation.data:
        yield f"evaluation.every is {config.evaluation.every} but evaluation.data is empty. Name what to evaluate on."
    if config.evaluation.radii and not config.evaluation.data and not config.evaluation.refusals:
        yield "evaluation.radii are given but evaluation.data is empty. Name the texts to attack."
    if config.model.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        yield 'model.load_in_4bit needs bitsandbytes: pip install "fedeat[quantization]".'


def _comparison(config: Config) -> Iterator[str]:
    section = config.compare
    known = (*METHOD_NAMES, *section.variants)
    unknown = [name for name in section.methods if name not in known]
    if unknown:
        yield (
            f"compare.methods: unknown {', '.join(map(repr, unknown))}. Expected {', '.join(known)}, or the name of a "
            "table under compare.variants."
        )
    for key in ("methods", "attacks", "fractions", "seeds"):
        for value in _repeated(getattr(section, key)):
            yield f"compare.{key} has {value!r} more than once. Each cell runs once; remove the repetition."
    for name in section.variants:
        if name in (*METHOD_NAMES, "base"):
            yield f"compare.variants.{name}: this name is taken. Choose another for the variant."
    for table in ("variants", "partitions"):
        for name in getattr(section, table):
            if not re.fullmatch(r"[A-Za-z0-9_.+-]+", name) or name.startswith("."):
                yield f"compare.{table}.{name}: it names a directory. Expected letters, digits, _ . + and -."
    if any(fraction > 0 for fraction in section.fractions) and not set(section.attacks) - {"none"}:
        yield "compare.fractions has one above 0, but compare.attacks names no attack to run at it."


def _repeated(values: Sequence[Hashable]) -> list[Hashable]:
    return [value for value, count in Counter(values).items() if count > 1]
