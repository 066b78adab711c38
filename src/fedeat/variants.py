"""Other ways to a step's gradient than Algorithm 1's: each changes what is computed, and says so.

Each is a `Gradient`: with its keywords bound it takes the place of `perturb` and `objective` in `LocalTraining`. A
pass is a forward and a backward run; K is the ascent's steps. Algorithm 1 takes K + 1 passes, "mixed" K + 2.

    function    passes        what differs
    freelb      K             the step's gradient is the mean over the ascent's K points (Zhu et al., 2020)
    harvested   K + 1         "mixed", its clean pass being the ascent's first too: the same but for adapter dropout
    kl          K + 2         the ascent raises the divergence from the clean prediction, which is one forward run more
                              (TRADES: Zhang et al., 2019)
    yopo        K + 1         each pass serves several ascent steps through the first layer (Zhang et al., 2019b)
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fedeat.objective import Objective, divergence, sum_over_samples
from fedeat.passes import B, attacked, fitting, trained
from fedeat.perturbation import Ascent, Perturb, begin, climb
from fedeat.protocols import Model


def freelb(model: Model[B], batch: B, generator: torch.Generator, *, ascent: Ascent) -> tuple[Tensor, Tensor]:
    """Each ascent pass leaves a share of the adapter's gradient too: the mean loss over the ascent's K points.

    The ascent runs on the adapter as it trains, with its dropout, and its last step is not trained on.

    Args:
        ascent: K >= 1 steps, projection "accumulated": only there does the gradient's length not matter.

    Raises:
        ValueError: no step, or projection "step".
    """
    if ascent.steps < 1 or ascent.projection != "accumulated":
        raise ValueError(
            f'expected at least one step and projection "accumulated", got {ascent.steps}, {ascent.projection}'
        )
    delta = begin(ascent, model.embed(batch), batch.perturbable, generator)
    losses = []
    with model.training():
        for _ in range(ascent.steps):
            point = delta.requires_grad_(True)
            loss = trained(model, batch)(point)
            torch.autograd.backward(loss.sum() / ascent.steps)
            losses.append(loss.detach())
            delta = climb(ascent, point, _taken(point), batch.perturbable)
    return torch.stack(losses).mean(0), point.detach()


def harvested(
    model: Model[B], batch: B, generator: torch.Generator, *, ascent: Ascent, weight: float
) -> tuple[Tensor, Tensor]:
    """Clean loss plus `weight` times the adversarial loss; the clean pass gives the ascent's first gradient too.

    Args:
        ascent: K >= 1 steps from zero, projection "accumulated".
        weight: >= 0, lambda.

    Raises:
        ValueError: another start or projection, no step, or a negative weight.
    """
    if ascent.steps < 1 or ascent.projection != "accumulated" or ascent.start != "zero" or not weight >= 0:
        raise ValueError(
            f'expected at least one step from zero, projection "accumulated" and weight >= 0, got {ascent}, {weight}'
        )
    point = begin(ascent, model.embed(batch), batch.perturbable, generator).requires_grad_(True)
    with model.training():
        clean = trained(model, batch)(point)
        torch.autograd.backward(clean.sum())
    delta = climb(ascent, point, _taken(point), batch.perturbable)
    with model.attacking():
        for _ in range(ascent.steps - 1):
            point = delta.requires_grad_(True)
            (gradient,) = torch.autograd.grad(attacked(model, batch)(point), point)
            delta = climb(ascent, point, gradient, batch.perturbable)
    with model.training():
        adversarial = weight * trained(model, batch)(delta)
        torch.autograd.backward(adversarial.sum())
    return (clean + adversarial).detach(), delta


def kl(
    model: Model[B], batch: B, generator: torch.Generator, *, perturb: Perturb, weight: float
) -> tuple[Tensor, Tensor]:
    """Clean loss plus `weight` times the divergence of the perturbed from the clean prediction.

    Args:
        perturb: raises the divergence; must start at random, since the divergence's gradient at zero is zero.
        weight: >= 0, lambda.

    Raises:
        ValueError: the batch has answers that the model shall not give: this loss would teach them.
    """
    away = getattr(batch, "away", None)
    if away is not None and bool(away.any()):
        raise ValueError("expected a batch without answers to move away from: kl lowers the loss of all of them")
    with model.attacking():
        with torch.no_grad():
            goal = model.supervised_logits(batch)

        def apart(delta: Tensor | None) -> Tensor:
            return sum_over_samples(divergence(goal, model.supervised_logits(batch, delta)), batch.samples)

        delta = perturb(apart, model.embed(batch), batch.perturbable, generator)
    with model.training():
        clean, perturbed = model.supervised_logits(batch), model.supervised_logits(batch, delta)
        losses = torch.nn.functional.cross_entropy(clean.float(), batch.targets.to(clean.device), reduction="none")
        loss = batch.mean(losses + weight * divergence(clean, perturbed))
        torch.autograd.backward(loss.sum())
    return loss.detach(), delta


def yopo(
    model: Model[B], batch: B, generator: torch.Generator, *, ascent: Ascent, inner: int, objective: Objective
) -> tuple[Tensor, Tensor]:
    """K passes find the loss's gradient at the first layer's output; `inner` steps each climb through that layer alone.

    While it holds fixed how the loss depends on the first layer's output, the perturbation moves `inner` times for the
    price of one layer each.

    Args:
        ascent: K passes; where it sets no step size, K * inner steps share 2.5 radii.
        inner: >= 1, steps a pass.
        objective: what the step lowers.

    Raises:
        ValueError: inner < 1.
    """
    if inner < 1:
        raise ValueError(f"expected inner >= 1, got {inner}")
    size = 2.5 * ascent.radius / max(ascent.steps * inner, 1) if ascent.step_size is None else ascent.step_size
    step = functools.partial(climb, Ascent(ascent.radius, ascent.steps, size, ascent.norm, ascent.projection))
    start = begin(ascent, model.embed(batch), batch.perturbable, generator)
    passes = ascent.steps if ascent.radius > 0 else 0
    with model.attacking():
        moved = [_climbed(model, part, start[kept], step, passes, inner) for kept, part in fitting(model, batch)]
    delta = torch.cat(moved)
    with model.training():
        loss = objective(trained(model, batch), delta)
        torch.autograd.backward(loss.sum())
    return loss.detach(), delta


def _climbed(model: Model[B], batch: B, delta: Tensor, step: Callable[..., Tensor], passes: int, inner: int) -> Tensor:
    """YOPO's ascent from delta (B, T, H)."""
    for _ in range(passes):
        point = delta.requires_grad_(True)
        losses, hidden = model.from_first_layer(batch, point)
        slope, gradient = torch.autograd.grad(sum_over_samples(losses, batch.samples), (hidden, point))
        delta = step(point, gradient, batch.perturbable)  # the pass has given the first step's gradient already
        for _ in range(inner - 1):
            point = delta.requires_grad_(True)
            (gradient,) = torch.autograd.grad(model.first_layer(batch, point), point, slope)
            delta = step(point, gradient, batch.perturbable)
    return delta


def _taken(point: Tensor) -> Tensor:
    gradient = point.grad
    assert gradient is not None
    point.grad = None
    return gradient
