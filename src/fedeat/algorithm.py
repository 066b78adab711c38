"""FedEAT's two algorithms (Pang et al., 2025): adversarial training on a client, robust aggregation on the server.

Everything a variant could change is a function passed in: how a perturbation is found (`Perturb`), what is
minimised (`Objective`), where clients run (`RunClients`) and how their updates become one (`Aggregate`). FedAvg is
this code with no perturbation and the mean; EAT-only, GM-only and FedEAT differ from it by those two functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedeat import seeding
from fedeat.errors import QuorumError
from fedeat.objective import Objective
from fedeat.passes import B, Gradient, in_memory, on_share, trained
from fedeat.perturbation import Norm, Perturb
from fedeat.protocols import Aggregated, Model
from fedeat.tally import Tally
from fedeat.updates import Adapter, ClientUpdate, Rejection, apply, difference, distance, norm, validate


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains (Alg. 1's inputs).

    Attributes:
        local_epochs: E >= 1, passes over the client's data.
        perturb: finds the perturbation; None trains on clean inputs.
        objective: what is minimised, given the perturbation.
        optimizer: parameters -> a fresh optimiser; its state does not outlive the round.
        norm: the ball's norm, for the record of realised perturbations.
        unit: > 0, length that a relative radius of 1 stands for, for the same record.
        max_grad_norm: > 0, gradients are clipped to this L2 norm; None leaves them.
        every: >= 1, each `every`-th batch is perturbed, the first among them; the others are trained on clean.
        share: 0..1, of a perturbed batch's samples that are perturbed, drawn at random; the objective takes the
            others' perturbation to be zero.
        variant: another way to a step's gradient, from `fedeat.variants`, in place of `perturb` and `objective`.
        private: what makes a step's gradient tell little of single samples, such as `fedeat.privacy.private`.
    """

    local_epochs: int
    perturb: Perturb | None
    objective: Objective
    optimizer: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]
    norm: Norm = "l2"
    unit: float = 1.0
    max_grad_norm: float | None = 1.0
    every: int = 1
    share: float = 1.0
    variant: Gradient[Any] | None = None
    private: Callable[[Gradient[Any]], Gradient[Any]] | None = None


def client_update(
    model: Model[B],
    adapter: Adapter,
    batches: Callable[[int], Iterable[B]],
    *,
    client_id: int,
    num_examples: int,
    training: LocalTraining,
    generator: torch.Generator,
) -> ClientUpdate:
    """Algorithm 1: one client trains its copy of the global adapter on worst-case embeddings.

    Args:
        model: the base model with an adapter in it; its adapter is overwritten, its base weights are not touched.
        adapter: the round's global adapter.
        batches: local epoch 0..E-1 -> its batches.
        client_id: whose update this is.
        num_examples: > 0, size of the client's data.
        training: the hyperparameters.
        generator: randomness of the perturbation.

    Returns:
        Local minus global adapter, with the mean training loss, the number of steps, the mean realised norm of the
        perturbation over `training.unit`, and the share of padding.
    """
    model.load_adapter(adapter)  # copy the global model
    parameters = list(model.adapter_parameters().values())
    optimizer = training.optimizer(parameters)
    tally = Tally(training.share)
    parts = 1
    for epoch in range(training.local_epochs):  # E local epochs
        for batch in batches(epoch):
            # Cleared before the step, so that what an interrupted step left behind does not leak into this one.
            optimizer.zero_grad(set_to_none=True)
            gradient = gradient_of(training, len(tally.losses))
            loss, delta, parts = in_memory(gradient, model, batch, generator, parts)
            if training.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
            optimizer.step()
            tally.add(batch, loss, delta, norm=training.norm)
    optimizer.zero_grad(set_to_none=True)
    delta_adapter = difference(model.adapter(), adapter)  # send the adapter, as an update
    return ClientUpdate(client_id, delta_adapter, num_examples, tally.metrics(delta_adapter, unit=training.unit))


def adversarial_gradient(
    model: Model[B],
    batch: B,
    generator: torch.Generator,
    *,
    perturb: Perturb | None,
    objective: Objective,
    share: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """One batch of Algorithm 1: raise the loss inside the ball, then take the gradient at the worst point found.

    Returns:
        The loss and the perturbation; the gradient is left at the adapter's parameters.
    """
    delta = None
    if perturb is not None:  # embed the prompt, raise the loss inside the ball
        with model.attacking():
            delta = on_share(perturb, model, batch, generator, share=share)
    with model.training():  # the loss at the perturbed embeddings
        loss = objective(trained(model, batch), delta)
        torch.autograd.backward(loss.sum())
    return loss.detach(), delta


def gradient_of(training: LocalTraining, step: int) -> Gradient[Any]:
    """How the `step`-th step, 0, 1, ..., finds its gradient."""
    if step % training.every:
        found: Gradient[Any] = functools.partial(adversarial_gradient, perturb=None, objective=training.objective)
    elif training.variant is not None:
        found = training.variant
    else:
        found = functools.partial(
            adversarial_gradient, perturb=training.perturb, objective=training.objective, share=training.share
        )
    return found if training.private is None else training.private(found)


RunClients: TypeAlias = Callable[[Adapter, Sequence[int], int], list[ClientUpdate]]
"""(global adapter, client ids, round) -> the updates that came back, fewer than asked where clients failed."""

Aggregate: TypeAlias = Callable[[Sequence[ClientUpdate], Adapter], Aggregated]
"""(accepted updates sorted by client, the global adapter they are relative to) -> their aggregate."""


@dataclass(frozen=True)
class Round:
    """One round of Algorithm 2 and why it came out so.

    Attributes:
        index: 0..T-1.
        adapter: the new global adapter.
        cohort: the clients drawn, sorted.
        updates: the accepted updates, sorted by client.
        rejected: who was rejected and why; a client that did not answer is among them.
        weights: client -> how much its update counted; sums to 1 over the accepted.
        iterations: of the aggregation rule.
        gap: certified relative gap of the rule, NaN where it certifies nothing.
        update_norm: Euclidean length of the aggregated update.
        distances: client -> Euclidean distance of its update from the aggregated one; empty where nobody knows it.
    """

    index: int
    adapter: Adapter
    cohort: tuple[int, ...]
    updates: tuple[ClientUpdate, ...]
    rejected: tuple[Rejection, ...]
    weights: Mapping[int, float]
    iterations: int
    gap: float
    update_norm: float
    distances: Mapping[int, float] = field(default_factory=dict)


PlayRound: TypeAlias = Callable[[Adapter, Sequence[int], int], Round]
"""(global adapter, cohort, round) -> the finished round; `server_round` with its functions bound is one."""


def run_rounds(
    adapter: Adapter,
    *,
    clients: Sequence[int],
    cohort_size: int,
    rounds: int,
    play: PlayRound,
    seed: int,
    first_round: int = 0,
) -> Iterator[Round]:
    """Algorithm 2: T rounds of drawing clients, training them and aggregating their updates.

    Args:
        adapter: the global adapter before `first_round`.
        clients: all n clients.
        cohort_size: m, 1..n, clients drawn each round without replacement.
        rounds: T, the round after the last.
        play: a round, whatever it is: over updates that the server sees (`server_round`), or over secure sums.
        seed: of the cohorts.
        first_round: where to begin; a resumed run passes the round after its checkpoint.

    Yields:
        Each finished round. A caller that stops iterating stops the training.

    Raises:
        QuorumError: as `play`.
    """
    for index in range(first_round, rounds):  # T rounds
        cohort = draw_cohort(clients, cohort_size, seed=seed, index=index)  # m of n clients
        finished = play(adapter, cohort, index)
        adapter = finished.adapter
        yield finished


def draw_cohort(clients: Sequence[int], size: int, *, seed: int, index: int) -> tuple[int, ...]:
    """`size` of the clients, uniformly without replacement, sorted; a function of the seed and the round alone."""
    order = torch.randperm(len(clients), generator=seeding.generator(seed, "cohort", index))
    return tuple(sorted(clients[i] for i in order[:size].tolist()))


def server_round(
    adapter: Adapter,
    cohort: Sequence[int],
    index: int,
    *,
    run_clients: RunClients,
    aggregate: Aggregate,
    quorum: int,
) -> Round:
    """One round of Algorithm 2: train the cohort, check what came back, aggregate it.

    Raises:
        QuorumError: fewer than `quorum` updates were fit for aggregation; names each client and its reason.
    """
    answers = run_clients(adapter, cohort, index)  # train them, in parallel where the engine can
    accepted, rejected = validate(answers, adapter, cohort)
    if len(accepted) < quorum:
        reasons = "".join(f"\n  - client {item.client_id}: {item.reason}" for item in rejected)
        raise QuorumError(
            f"round {index}: {len(accepted)} usable updates, expected at least {quorum} (federation.quorum) of the "
            f"{len(cohort)} clients drawn. Rejected:{reasons or ' none'}"
        )
    result = aggregate(accepted, adapter)  # the geometric median
    return Round(
        index=index,
        adapter=apply(adapter, result.value),
        cohort=tuple(cohort),
        updates=tuple(accepted),
        rejected=tuple(rejected),
        weights={update.client_id: float(w) for update, w in zip(accepted, result.weights, strict=True)},
        iterations=result.iterations,
        gap=result.gap,
        update_norm=norm(result.value),
        distances={update.client_id: distance(update.delta, result.value) for update in accepted},
    )
