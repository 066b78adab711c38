"""Objectives and losses against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedeat import objective
from fedeat.objective import adversarial, away, mixed, sample_sum, token_mean


def loss(delta: Tensor | None) -> Tensor:
    return torch.tensor(2.0) if delta is None else 3.0 + delta.sum()


def test_adversarial_is_the_loss_at_the_perturbation_or_clean_without_one() -> None:
    assert float(adversarial(loss, torch.ones(2))) == 5.0
    assert float(adversarial(loss, None)) == 2.0


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_mixed_adds_the_weighted_adversarial_loss(weight: float) -> None:
    assert float(mixed(loss, torch.ones(2), weight=weight)) == 2.0 + weight * 5.0
    assert float(mixed(loss, None, weight=weight)) == 2.0


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_sign_as_printed_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="expected weight >= 0"):
        mixed(loss, torch.ones(2), weight=weight)


def test_losses_are_means_of_negative_log_probabilities() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    targets, samples = torch.tensor([1, 2, 3, 4, 0]), torch.tensor([0, 0, 0, 2, 2])
    rows = -logits.double().log_softmax(-1)[range(5), targets]
    assert float(token_mean(logits, targets)) == pytest.approx(float(rows.mean()))
    by_sample = rows[:3].mean() + rows[3:].mean()  # sample 1 has no supervised row
    assert float(sample_sum(logits, targets, samples)) == pytest.approx(float(by_sample))


def test_moving_away_is_the_unlikelihood_bounded_below_and_finite_where_the_answer_is_certain() -> None:
    p = torch.tensor([0.1, 0.5, 0.99], dtype=torch.float64)
    assert torch.allclose(away(-p.log()), -(1 - p).log(), atol=1e-4)
    assert float(away(torch.tensor([60.0]))) == pytest.approx(0.0, abs=1e-6)
    logits = torch.tensor([[30.0, 0.0], [2.0, 0.0]], requires_grad=True)
    losses = away(-logits.log_softmax(-1)[:, 0])
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert bool(losses.isfinite().all() and gradient.isfinite().all())
    assert float(gradient[1, 0]) == pytest.approx(float(logits[1].detach().softmax(-1)[0]), rel=1e-3)


def test_losses_of_half_precision_logits_are_float32() -> None:
    logits, targets = torch.randn(4, 9).bfloat16(), torch.zeros(4, dtype=torch.long)
    assert token_mean(logits, targets).dtype == torch.float32
    assert sample_sum(logits, targets, torch.arange(4)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("held", [1, 50, 1 << 17], ids=["a row at a time", "rows left over", "torch's own"])
def test_losses_a_few_rows_at_a_time_are_cross_entropies_and_so_are_their_gradients(
    held: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "_IN_CACHE", held)
    generator = torch.Generator().manual_seed(0)
    logits = (20 * torch.randn(11, 9, generator=generator)).to(dtype).index_fill(1, torch.tensor([8]), float("-inf"))
    targets, factors = torch.arange(11) % 8, torch.rand(11, generator=generator)
    exact = logits.double().requires_grad_()
    expected = -exact.log_softmax(-1)[range(11), targets]
    (slopes,) = torch.autograd.grad(expected, exact, factors.double())
    logits.requires_grad_()
    found = objective.row_losses(logits, targets)
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-6)
    for _ in range(2):  # nothing that the gradient needs is used up
        (gradient,) = torch.autograd.grad(found, logits, factors, retain_graph=True)
        assert gradient.dtype == dtype
        assert torch.allclose(gradient.double(), slopes, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_masked_classes_give_no_gradient_and_no_nan() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    masked = logits.masked_fill(torch.tensor([[False, False, True]] * 2), float("-inf"))
    (gradient,) = torch.autograd.grad(token_mean(masked, torch.tensor([0, 1])), logits)
    assert bool(gradient.isfinite().all())
    assert not bool(gradient[:, 2].any())
