"""What a client minimises, on supervised positions only (Pang et al., 2025, Eq. 2 and Alg. 1).

An objective maps a loss-of-the-perturbation and a perturbation to one number. The paper prints
`min L(clean) - lambda * max L(adversarial)` in Eq. 2, which rewards a *high* adversarial loss and diverges when
trained; its Alg. 1 trains on the adversarial loss alone. Both readings that learn are here; the printed sign is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LossOfDelta: TypeAlias = Callable[[Tensor | None], Tensor]
"""Perturbation (B, T, H), or None for the clean input -> loss, a scalar."""

Objective: TypeAlias = Callable[[LossOfDelta, Tensor | None], Tensor]
"""(loss of a perturbation, the perturbation found) -> what the optimiser minimises, a scalar."""

_IN_CACHE = 1 << 17
"""Logits, in float32, that a processor's second cache holds beside what is made of them."""


def adversarial(loss: LossOfDelta, delta: Tensor | None) -> Tensor:
    """Loss at the perturbed input alone (Alg. 1); the clean loss where there is no perturbation."""
    return loss(delta)


def mixed(loss: LossOfDelta, delta: Tensor | None, *, weight: float) -> Tensor:
    """Clean loss plus `weight` >= 0 times the adversarial loss: Eq. 2 with the sign that learns.

    Raises:
        ValueError: the weight is negative, as Eq. 2 prints it.
    """
    if not weight >= 0:
        raise ValueError(f"expected weight >= 0, got {weight}; the sign that Eq. 2 prints rewards a high loss")
    clean = loss(None)
    return clean if delta is None else clean + weight * loss(delta)


def row_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each supervised row, (N,) float32.

    Args:
        logits: (N, V), any float dtype; the loss is computed in float32.
        targets: (N,) int64.
    """
    targets = targets.to(logits.device)
    if logits.device.type != "cpu" or logits.numel() <= _IN_CACHE:
        return F.cross_entropy(logits.float(), targets, reduction="none")
    losses: Tensor = _RowLosses.apply(logits, targets, max(_IN_CACHE // logits.shape[1], 1))  # type: ignore[no-untyped-call]
    return losses


class _RowLosses(torch.autograd.Function):
    """Cross-entropy a few rows at a time: a row's softmax is formed, twice, where it stays in a processor's cache.

    torch's own goes through memory several times, over arrays as large as the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, rows: int) -> Tensor:
        """(N,) float32, of logits (N, V) and targets (N,)."""
        totals, chosen = [], []
        for raw, goals in zip(torch.split(logits, rows), torch.split(targets.unsqueeze(1), rows), strict=True):
            part = raw.float()
            peak = part.amax(1, keepdim=True)
            totals.append((part - peak).exp_().sum(1, keepdim=True).log_().add_(peak))
            chosen.append(part.gather(1, goals))
        total = torch.cat(totals)
        ctx.save_for_backward(logits, targets, total)
        ctx.rows = rows
        return (total - torch.cat(chosen)).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """(N,) gradient of the losses -> (N, V) of the logits, in their dtype: softmax less one at the target."""
        logits, targets, total = ctx.saved_tensors
        slopes = torch.empty_like(logits)
        columns = (logits, targets.unsqueeze(1), total, gradient.unsqueeze(1), slopes)
        parts = (torch.split(column, ctx.rows) for column in columns)
        for part, goals, sums, factors, out in zip(*parts, strict=True):
            found = (part.float() - sums).exp_()
            found.scatter_add_(1, goals, torch.full_like(sums, -1.0))
            out.copy_(found.mul_(factors))
        return slopes, None, None


def away(losses: Tensor) -> Tensor:
    """What moves a model away from an answer: -log(1 - p) of each of its tokens, of which `losses` are the -log p.

    Xhonneux et al. (2024) raise the cross-entropy of a harmful answer itself, which has no bound and is cut off at a
    threshold. The unlikelihood (Welleck et al., 2020) has zero for its bound and little gradient near it.

    Args:
        losses: (N,) >= 0, cross-entropies.
    """
    # The least shift keeps the logarithm and its gradient finite where p is one.
    return -torch.log(-torch.expm1(-losses.clamp_min(0) - 1e-6))


def token_mean(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over all supervised rows of a batch: the training loss."""
    return row_losses(logits, targets).mean()


def sample_sum(logits: Tensor, targets: Tensor, samples: Tensor) -> Tensor:
    """Sum over samples of each sample's mean cross-entropy: the loss that an attack raises."""
    return sum_over_samples(row_losses(logits, targets), samples)


def sum_over_samples(losses: Tensor, samples: Tensor) -> Tensor:
    """Sum over samples of each sample's mean loss.

    A sum over samples, so that a sample's gradient, and with it its perturbation, does not depend on its batch.

    Args:
        losses: (N,) float32, one a supervised row.
        samples: (N,) int64, the sample each row belongs to.
    """
    samples = samples.to(losses.device)
    return (losses / torch.bincount(samples)[samples]).sum()


def divergence(clean: Tensor, perturbed: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the perturbed prediction from the clean one, for each supervised row, (N,).

    Args:
        clean: (N, V) logits of the clean input; -inf where a class cannot be answered.
        perturbed: (N, V), the same of the perturbed input.
    """
    # A class that cannot be answered has probability 0 in both; its infinities would make 0 * (inf - inf).
    lowest = torch.finfo(torch.float32).min / 2
    p, q = (logits.float().clamp_min(lowest).log_softmax(-1) for logits in (clean, perturbed))
    return (p.exp() * (p - q)).sum(-1)
