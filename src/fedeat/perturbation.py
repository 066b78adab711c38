"""Worst-case perturbations of token embeddings inside an L_p ball (Pang et al., 2025, Eq. 3; Alg. 1).

A perturbation is found by ascent on the loss: PGD (Madry et al., 2018), its single step FGSM (Goodfellow et al.,
2015), or drawn at random for comparison. A radius here is absolute, in the units of the embeddings;
`AdaptedModel.embedding_unit` turns the relative radius of a configuration into it.

    norm           ball                                   step direction
    l2             each token's delta, ||.||_2            gradient over its norm, per token
    l2-sequence    each sample's delta as one vector      gradient over its norm, per sample
    linf           each coordinate                        sign of the gradient
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fedeat.objective import LossOfDelta

Norm: TypeAlias = Literal["l2", "l2-sequence", "linf"]
Projection: TypeAlias = Literal["accumulated", "step"]
Start: TypeAlias = Literal["zero", "random"]

Perturb: TypeAlias = Callable[[LossOfDelta, Tensor, Tensor, torch.Generator], Tensor]
"""(loss of a perturbation, embeddings (B, T, H), mask (B, T) bool, generator) -> delta (B, T, H) float32."""


def pgd(
    loss: LossOfDelta,
    embeddings: Tensor,
    mask: Tensor,
    generator: torch.Generator,
    *,
    radius: float,
    steps: int,
    step_size: float | None = None,
    norm: Norm = "l2",
    projection: Projection = "accumulated",
    start: Start = "zero",
) -> Tensor:
    """Projected gradient ascent on the embeddings.

    Args:
        loss: sum over samples of the loss at a perturbation; differentiable in it.
        embeddings: (B, T, H), what the perturbation is added to.
        mask: (B, T) bool, True where the perturbation may be non-zero.
        generator: used by a random start alone.
        radius: >= 0, of the ball, in embedding units.
        steps: K >= 0, ascent steps, each one forward and one backward pass.
        step_size: >= 0, in embedding units; None for 2.5 radius / K, which can reach any point of the ball.
        norm: which ball.
        projection: "accumulated" projects delta after each step, standard PGD. "step" projects each *step*, as the
            paper prints Eq. 3, with the raw gradient: K steps may then leave the ball, and a step much shorter
            than the radius hardly moves. A reproduction mode.
        start: "zero", or "random", a draw of `random`.

    Returns:
        delta (B, T, H) float32, detached, zero off the mask; inside the ball unless `projection="step"`.

    Raises:
        ValueError: a number is out of its range, or the norm is unknown.
    """
    ascent = Ascent(radius, steps, step_size, norm, projection, start)
    delta = begin(ascent, embeddings, mask, generator)
    for _ in range(steps if radius > 0 else 0):
        delta.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(delta), delta)
        delta = climb(ascent, delta, gradient, mask)
    return delta.detach()


@dataclass(frozen=True)
class Ascent:
    """How an ascent moves; the same numbers as `pgd` takes, for variants that find gradients their own way.

    Raises:
        ValueError: a number is out of its range.
    """

    radius: float
    steps: int
    step_size: float | None = None
    norm: Norm = "l2"
    projection: Projection = "accumulated"
    start: Start = "zero"

    def __post_init__(self) -> None:
        size = self.step_size
        if not self.radius >= 0 or self.steps < 0 or (size is not None and not size >= 0):
            raise ValueError(
                f"expected radius >= 0, steps >= 0, step_size >= 0, got {self.radius}, {self.steps}, {size}"
            )


def begin(ascent: Ascent, embeddings: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Where an ascent starts: delta (B, T, H) float32, zero or random in the ball, zero off the mask."""
    if ascent.start == "random" and ascent.radius > 0:
        return random(_no_loss, embeddings, mask, generator, radius=ascent.radius, norm=ascent.norm)
    return torch.zeros(embeddings.shape, dtype=torch.float32, device=embeddings.device)


def climb(ascent: Ascent, delta: Tensor, gradient: Tensor, mask: Tensor) -> Tensor:
    """One step of an ascent from delta (B, T, H) along the loss's gradient there; detached."""
    size = 2.5 * ascent.radius / max(ascent.steps, 1) if ascent.step_size is None else ascent.step_size
    gradient = gradient * mask.unsqueeze(-1).to(torch.float32)
    if ascent.projection == "step":
        return delta.detach() + project(size * gradient, radius=ascent.radius, norm=ascent.norm)  # Eq. 3 as printed
    moved = delta.detach() + size * direction(gradient, norm=ascent.norm)
    return project(moved, radius=ascent.radius, norm=ascent.norm)


def fgsm(
    loss: LossOfDelta,
    embeddings: Tensor,
    mask: Tensor,
    generator: torch.Generator,
    *,
    radius: float,
    norm: Norm = "l2",
    start: Start = "zero",
) -> Tensor:
    """One step of the full radius along the gradient (the fast gradient method, in the chosen norm)."""
    return pgd(loss, embeddings, mask, generator, radius=radius, steps=1, step_size=radius, norm=norm, start=start)


def random(
    loss: LossOfDelta,
    embeddings: Tensor,
    mask: Tensor,
    generator: torch.Generator,
    *,
    radius: float,
    norm: Norm = "l2",
) -> Tensor:
    """A perturbation in a random direction: on the sphere for the L2 balls, uniform in the cube for L_inf.

    The yardstick for an attack: what is no stronger than this has not found the gradient.
    """
    shape = embeddings.shape
    noise = torch.randn(shape, generator=generator, device=generator.device).to(embeddings.device)
    if norm == "linf":
        noise = torch.erf(noise / 2**0.5)  # the normal's distribution function, mapped to (-1, 1): uniform
        return noise * radius * mask.unsqueeze(-1)
    return radius * direction(noise * mask.unsqueeze(-1), norm=norm)


def direction(gradient: Tensor, *, norm: Norm) -> Tensor:
    """Step of unit length that raises a linear loss fastest; zero where the gradient is zero.

    Args:
        gradient: (B, T, H) float32.
    """
    if norm == "linf":
        return gradient.sign()
    # Scaled by its largest entry first: the squares of a gradient of 1e-20 a coordinate underflow in float32.
    peak = gradient.abs().amax((1, 2) if norm == "l2-sequence" else 2, keepdim=True)
    scaled = gradient / torch.where(peak > 0, peak, 1.0)
    length = _length(scaled, norm)
    return scaled / torch.where(length > 0, length, 1.0)


def project(delta: Tensor, *, radius: float, norm: Norm) -> Tensor:
    """Nearest point of the ball of `radius` >= 0.

    Args:
        delta: (B, T, H) float32.
    """
    if norm == "linf":
        return delta.clamp(-radius, radius)
    length = _length(delta, norm)
    # Inside the ball the factor is exactly 1, so a point there is returned bit for bit.
    return delta * torch.where(length > radius, radius / length, 1.0)


def realised_norm(delta: Tensor, mask: Tensor, *, norm: Norm, samples: Tensor | None = None) -> Tensor:
    """Mean length of the perturbation over what one ball bounds (token, sample, or coordinate), in embedding units.

    Args:
        delta: (B, T, H).
        mask: (B, T) bool, where a perturbation may act.
        norm: which ball.
        samples: (B,) bool, whose lengths count; None for all.

    Returns:
        A scalar, left on its device: nothing here waits for the accelerator.
    """
    if norm == "l2-sequence":
        lengths, kept = delta.flatten(1).norm(dim=1), torch.ones_like(mask[:, 0])
    else:
        lengths, kept = delta.abs().amax(-1) if norm == "linf" else delta.norm(dim=-1), mask
    if samples is not None:
        kept = kept & (samples if kept.ndim == 1 else samples.unsqueeze(1))
    return torch.where(kept, lengths, 0.0).sum() / kept.sum().clamp_min(1)


def _length(tensor: Tensor, norm: Norm) -> Tensor:
    """Euclidean length per token (B, T, 1) or per sample (B, 1, 1)."""
    if norm not in ("l2", "l2-sequence"):
        raise ValueError(f'expected norm "l2", "l2-sequence" or "linf", got {norm!r}')
    length: Tensor = torch.linalg.vector_norm(tensor, dim=(1, 2) if norm == "l2-sequence" else 2, keepdim=True)
    return length


def _no_loss(delta: Tensor | None) -> Tensor:
    raise AssertionError("a random perturbation looks at no loss")
