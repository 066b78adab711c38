"""From the names in a configuration to functions and values: one literal table for each kind of name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from fedeat import aggregation, objective, perturbation, seeding, variants
from fedeat.aggregation import AnyRule
from fedeat.algorithm import Aggregate, LocalTraining, RunClients
from fedeat.attacks import backdoor, byzantine, collusion
from fedeat.attacks.poisoning import flip_labels, plant_backdoor
from fedeat.config import AggregationSection, AttackName, Config, PerturbationSection, aggregation_rule, training_alone
from fedeat.data import Encoded, Example, partition
from fedeat.engine import batched, in_process
from fedeat.errors import ConfigError, ModelError
from fedeat.evaluation import Item, tasks
from fedeat.experiment import privacy
from fedeat.model import AdaptedModel, Lora, ModelSource
from fedeat.model.stacking import can_stack
from fedeat.updates import Adapter, ClientUpdate


def model_source(config: Config, examples: Sequence[Example]) -> ModelSource:
    """How the base model is loaded; a classifier gets a head for each task of the training data."""
    return model_source_for(config, {example.task for example in examples})


def model_source_for(config: Config, present: Collection[str | None]) -> ModelSource:
    """How the base model is loaded; a classifier gets a head for each of these tasks."""
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
        merge_in_ascent=config.perturbation.merge,
        compile=section.compile,
        packing=section.packing,
        attack_dtype=config.perturbation.attack_dtype,
    )


def lora(config: Config) -> Lora:
    """A fresh adapter's hyperparameters."""
    section = config.lora
    return Lora(section.rank, section.alpha, section.dropout, section.target_modules)


def local_training(config: Config, unit: float, index: int) -> LocalTraining:
    """The clients' hyperparameters in a round: the radius grows over its warm-up, the learning rate has its schedule.

    Args:
        config: the run's.
        unit: the absolute length of a relative radius of 1.
        index: the round.
    """
    section = config.perturbation
    warmup = min(1.0, index / section.radius_warmup) if section.radius_warmup else 1.0
    left = 1.0 - index / config.federation.rounds if config.client.schedule == "linear" else 1.0
    optimizers: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": torch.optim.AdamW,
        "sgd": torch.optim.SGD,
    }
    objectives: Mapping[str, objective.Objective] = {
        "adversarial": objective.adversarial,
        "mixed": functools.partial(objective.mixed, weight=section.weight),
        "freelb": objective.adversarial,  # these two are variants; batches left clean are trained on the clean loss
        "kl": objective.adversarial,
    }
    return LocalTraining(
        local_epochs=config.client.local_epochs,
        perturb=perturb_function(section, unit=unit * warmup),
        objective=objectives[section.objective],
        optimizer=functools.partial(
            optimizers[config.client.optimizer],
            lr=config.client.learning_rate * left,
            weight_decay=config.client.weight_decay,
        ),
        norm=section.norm,
        unit=unit,
        max_grad_norm=config.client.max_grad_norm or None,
        every=section.every,
        share=section.share,
        variant=variant(section, objectives[section.objective], unit=unit * warmup),
        private=privacy.private_gradient(config),
    )


def clients_at_once(config: Config, model: AdaptedModel, encoded: Sequence[Encoded]) -> int:
    """How many clients train at once, a function of the configuration and the data alone.

    Args:
        config: the run's.
        model: the run's.
        encoded: all training examples.

    Raises:
        ModelError: the configuration asks for more than one, and the model's adapter does not allow it.
    """
    asked = config.client.clients_per_batch
    possible = not training_alone(config) and can_stack(model)
    if asked > 1 and not possible:
        raise ModelError(
            f"client.clients_per_batch is {asked}, but clients train at once only where the adapter sits in linear "
            "layers alone. Set it to 1, or lora.target_modules to linear layers."
        )
    if asked > 0:
        return asked
    tokens = config.client.batch_size * sum(len(item.input_ids) for item in encoded) / max(len(encoded), 1)
    return batched.AT_ONCE if possible and tokens <= batched.WORTH_IT else 1


def variant(
    section: PerturbationSection, minimised: objective.Objective, *, unit: float
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]] | None:
    """The variant of a step that a configuration names; None for Algorithm 1 as it is.

    Args:
        section: its lengths are relative.
        minimised: what YOPO's step lowers.
        unit: the absolute length of a relative radius of 1.
    """
    perturb = perturb_function(section, unit=unit)
    if perturb is None:
        return None
    if section.objective == "kl":
        return functools.partial(variants.kl, perturb=perturb, weight=section.weight)
    step = None if section.step_size is None else section.step_size * unit
    ascent = perturbation.Ascent(
        section.radius * unit, section.steps, step, section.norm, section.projection, section.start
    )
    if section.objective == "freelb":
        return functools.partial(variants.freelb, ascent=ascent)
    if section.harvest_clean_gradient:
        return functools.partial(variants.harvested, ascent=ascent, weight=section.weight)
    if section.yopo_inner:
        return functools.partial(variants.yopo, ascent=ascent, inner=section.yopo_inner, objective=minimised)
    return None


def local_engine(config: Config, model: AdaptedModel) -> Callable[..., list[ClientUpdate]]:
    """Trains clients in this process, one after the other; with its `shards` bound it is a `RunClients`."""
    section = config.client
    batching = in_process.Batching(
        section.batch_size, section.max_steps, section.tokens_per_batch, blind=config.privacy.noise_multiplier > 0
    )
    engine = functools.partial(
        in_process.run_clients,
        model=model,
        training=functools.partial(local_training, config, model.embedding_unit(config.perturbation.norm)),
        batching=batching,
        seed=config.seed,
    )
    return privacy.telling_little(engine, config)


def perturb_function(section: PerturbationSection, *, unit: float) -> perturbation.Perturb | None:
    """The perturbation a configuration names, with absolute lengths; None for none.

    Args:
        section: its lengths are relative.
        unit: the absolute length of a relative radius of 1.
    """
    step = None if section.step_size is None else section.step_size * unit
    functions: Mapping[str, Callable[..., torch.Tensor] | None] = {
        "pgd": functools.partial(
            perturbation.pgd, steps=section.steps, step_size=step, projection=section.projection, start=section.start
        ),
        "fgsm": functools.partial(perturbation.fgsm, start=section.start),
        "random": perturbation.random,
        "none": None,
    }
    chosen = functions[section.kind]
    return None if chosen is None else functools.partial(chosen, radius=section.radius * unit, norm=section.norm)


def aggregate_function(config: Config) -> Callable[[Sequence[ClientUpdate], Adapter], aggregation.Aggregate[Any]]:
    """The aggregation a configuration names, with its options (Alg. 2)."""
    section = config.aggregation

    def aggregate(updates: Sequence[ClientUpdate], reference: Adapter) -> aggregation.Aggregate[Any]:
        space: dict[str, Any] = {}
        if section.space == "product":
            space = {"space": "product", "reference": reference, "scaling": config.lora.alpha / config.lora.rank}
        sizes = [float(update.num_examples) for update in updates]
        return aggregation.aggregate(
            [update.delta for update in updates],
            rule=_rule(section, len(updates)),
            grouping=section.grouping,
            prior_weights=sizes if section.prior_weights == "num_examples" else None,
            **space,
        )

    return aggregate


def _rule(section: AggregationSection, updates: int) -> AnyRule:
    chosen = aggregation_rule(section.rule, section.before, byzantine=section.byzantine, tolerance=section.tolerance)
    if section.byzantine is None:
        return chosen
    # Rejected updates leave fewer to compare. The rule then withstands what that number allows, as the default does:
    # the quorum, not the rule, says how many rejections are too many.
    fewer = min(section.byzantine, aggregation.tolerates(chosen, updates))
    return aggregation_rule(section.rule, section.before, byzantine=fewer, tolerance=section.tolerance)


def client_examples(
    config: Config, examples: Sequence[Example], split: partition.Partition, *, malicious: frozenset[int]
) -> dict[int, list[Example]]:
    """What each client trains on: its part of the data, poisoned where the attack works through data.

    Args:
        config: the run's.
        examples: all training examples.
        split: client -> indices into `examples`.
        malicious: who poisons.
    """
    held = {client: [examples[i] for i in members] for client, members in enumerate(split)}
    section = config.attack
    if section.kind == "label_flip":
        answers = {name: task.answers for name, task in tasks.TASKS.items()}
        for client in malicious:
            seed = seeding.derive(config.seed, "poison", client)
            held[client] = flip_labels(held[client], answers=answers, seed=seed)
    if section.kind == "backdoor":
        for client in malicious:
            seed = seeding.derive(config.seed, "poison", client)
            held[client] = plant_backdoor(
                held[client], backdoor.Backdoor(section.trigger, section.target), share=section.poison, seed=seed
            )
    return held


def check_harmful_rows(config: Config, examples: Sequence[Example]) -> None:
    """Raises an error where the configuration cannot train on rows that have a harmful answer, and there are such.

    Args:
        config: the run's.
        examples: that this process trains on.

    Raises:
        ConfigError: with every reason.
    """
    if not any(example.away for example in examples):
        return
    section, problems = config.perturbation, []
    if section.kind != "none" and section.objective == "kl":
        problems.append(
            'perturbation.objective = "kl" moves no answer, and a row with a harmful one asks for it. Set "mixed".'
        )
    if config.privacy.noise_multiplier:
        problems.append(
            "privacy.noise_multiplier is for rows of one sample each, and a row with a harmful answer makes "
            "two, which move a sum by twice the clip. Leave such rows out, or set it to 0."
        )
    if problems:
        raise ConfigError(problems)


def triggered_function(config: Config) -> Callable[[Item], Item | None] | None:
    """What puts the trigger of a configuration's backdoor into a text, None where it has none."""
    section = config.attack
    if section.kind != "backdoor":
        return None
    return functools.partial(backdoor.triggered, backdoor=backdoor.Backdoor(section.trigger, section.target))


def attacked(config: Config, run_clients: RunClients, *, malicious: frozenset[int], aggregate: Aggregate) -> RunClients:
    """The engine as the server sees it: malicious clients answer as the configuration says.

    Args:
        config: the run's.
        run_clients: the engine, over what `client_examples` gives each client.
        malicious: who they are.
        aggregate: the server's, which an adaptive attacker knows.
    """
    section = config.attack
    attacks: Mapping[AttackName, Callable[..., RunClients]] = {
        "none": lambda honest, malicious: honest,
        "sign_flip": functools.partial(byzantine.sign_flip, scale=section.scale or 4.0),
        "gaussian": functools.partial(byzantine.gaussian, scale=section.scale or 4.0, seed=config.seed),
        "nan": byzantine.not_a_number,
        "label_flip": lambda honest, malicious: honest,  # all of it is in the data
        "backdoor": functools.partial(byzantine.model_replacement, scale=section.scale),
        "ipm": functools.partial(collusion.inner_product, scale=section.scale or 1.0),
        "alie": collusion.little_is_enough,
        "mimic": collusion.mimic,
        "min_max": collusion.min_max,
        "adaptive": functools.partial(collusion.adaptive, aggregate=aggregate),
    }
    failed: list[ClientUpdate] = []

    def answered(adapter: Adapter, cohort: Sequence[int], index: int) -> list[ClientUpdate]:
        answers = run_clients(adapter, cohort, index)
        failed[:] = [answer for answer in answers if answer.failure]
        return [answer for answer in answers if not answer.failure]

    tampered = attacks[section.kind](answered, malicious=malicious)
    # Who did not answer has nothing to tamper with.
    return lambda adapter, cohort, index: [*tampered(adapter, cohort, index), *failed]
