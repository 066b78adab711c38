"""Perturbations against linear losses, whose worst case is known in closed form, and on models of the zoo."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedeat.data import Batch, Encoded, Example
from fedeat.model import AdaptedModel
from fedeat.objective import LossOfDelta, sample_sum
from fedeat.perturbation import Norm, Perturb, direction, fgsm, pgd, project, random, realised_norm

NORMS: tuple[Norm, ...] = ("l2", "l2-sequence", "linf")
SHAPE = (3, 5, 8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, LossOfDelta]:
    """A gradient (B, T, H) that is the same everywhere, a mask, and the linear loss with that gradient."""
    gradient = scale * torch.randn(SHAPE, generator=seeded(seed))
    mask = torch.rand(SHAPE[:2], generator=seeded(seed + 1)) < 0.7
    mask[:, 0] = True

    def loss(delta: Tensor | None) -> Tensor:
        return torch.zeros(()) if delta is None else (gradient * delta).sum()

    return gradient, mask, loss


def size(delta: Tensor, norm: Norm) -> Tensor:
    """Length of what each ball bounds."""
    if norm == "linf":
        return delta.abs()
    return delta.norm(dim=-1) if norm == "l2" else delta.flatten(1).norm(dim=1)


def optimum(gradient: Tensor, mask: Tensor, radius: float, norm: Norm) -> Tensor:
    masked = gradient * mask.unsqueeze(-1)
    if norm == "linf":
        return radius * masked.sign()
    if norm == "l2":
        return radius * masked / masked.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return radius * masked / masked.flatten(1).norm(dim=1)[:, None, None]


@pytest.mark.parametrize("start", ["zero", "random"])
@pytest.mark.parametrize("norm", NORMS)
def test_pgd_finds_the_worst_case_of_a_linear_loss(norm: Norm, start: str) -> None:
    gradient, mask, loss = problem()
    delta = pgd(loss, torch.zeros(SHAPE), mask, seeded(), radius=0.3, steps=60, step_size=0.1, norm=norm, start=start)  # type: ignore[arg-type]
    torch.testing.assert_close(delta, optimum(gradient, mask, 0.3, norm), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1.0, 1e-22, 1e22])
def test_one_step_of_fgsm_is_the_worst_case_whatever_the_gradients_scale(norm: Norm, scale: float) -> None:
    gradient, mask, _ = problem(scale=scale)

    def loss(delta: Tensor | None) -> Tensor:
        assert delta is not None
        return (gradient * delta).sum()

    delta = fgsm(loss, torch.zeros(SHAPE), mask, seeded(), radius=0.3, norm=norm)
    exact = optimum(gradient.double(), mask, 0.3, norm).float()
    torch.testing.assert_close(delta, exact, rtol=1e-5, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    norm=st.sampled_from(NORMS),
    radius=st.floats(1e-4, 1e3),
    steps=st.integers(0, 4),
    start=st.sampled_from(["zero", "random"]),
    seed=st.integers(0, 20),
)
def test_perturbation_stays_in_the_ball_and_off_the_mask_is_zero(
    norm: Norm, radius: float, steps: int, start: str, seed: int
) -> None:
    gradient, mask, _ = problem(seed)

    def loss(delta: Tensor | None) -> Tensor:
        assert delta is not None
        return (gradient * delta).sin().sum()  # turns the ascent around, step after step

    delta = pgd(loss, torch.zeros(SHAPE), mask, seeded(seed), radius=radius, steps=steps, norm=norm, start=start)  # type: ignore[arg-type]
    assert delta.dtype == torch.float32
    assert not delta.requires_grad
    assert float(size(delta, norm).max()) <= radius * (1 + 1e-5)
    assert torch.equal(delta[~mask], torch.zeros_like(delta[~mask]))


@pytest.mark.parametrize("norm", NORMS)
def test_projected_step_leaves_the_ball_as_the_paper_prints_it(norm: Norm) -> None:
    _, mask, loss = problem()
    embeddings = torch.zeros(SHAPE)
    attack = functools.partial(pgd, loss, embeddings, mask, seeded(), radius=0.3, norm=norm, projection="step")
    # Steps far longer than the radius are cut to it, and K of them add up; short ones hardly move.
    assert float(size(attack(steps=5, step_size=1e4), norm).max()) == pytest.approx(1.5, rel=1e-4)
    assert float(size(attack(steps=5, step_size=1e-5), norm).max()) < 1e-3


@pytest.mark.parametrize("norm", NORMS)
def test_zero_radius_and_zero_steps_perturb_nothing(norm: Norm) -> None:
    _, mask, loss = problem()
    for radius, steps in ((0.0, 3), (0.3, 0)):
        delta = pgd(loss, torch.zeros(SHAPE), mask, seeded(), radius=radius, steps=steps, norm=norm)
        assert torch.equal(delta, torch.zeros(SHAPE))


@pytest.mark.parametrize("norm", NORMS)
def test_random_perturbation_has_the_radius_and_comes_from_the_generator_alone(norm: Norm) -> None:
    _, mask, loss = problem()
    before = torch.get_rng_state()
    first, again, other = (
        random(loss, torch.zeros(SHAPE), mask, seeded(seed), radius=0.3, norm=norm) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first[~mask], torch.zeros_like(first[~mask]))
    if norm == "linf":
        assert float(first.abs().max()) <= 0.3
        assert float(first[mask].abs().mean()) == pytest.approx(0.15, rel=0.2)  # uniform in the cube
    else:
        lengths = size(first, norm)[mask] if norm == "l2" else size(first, norm)
        torch.testing.assert_close(lengths, torch.full_like(lengths, 0.3))


@pytest.mark.parametrize("norm", NORMS)
def test_projection_keeps_points_of_the_ball_bit_for_bit_and_takes_the_nearest(norm: Norm) -> None:
    inside = project(torch.randn(SHAPE, generator=seeded()), radius=0.5, norm=norm) * 0.9
    assert torch.equal(project(inside, radius=0.5, norm=norm), inside)
    far = torch.randn(SHAPE, generator=seeded(1)) * 3
    nearest = project(far, radius=0.5, norm=norm)
    for seed in range(20):
        other = project(torch.randn(SHAPE, generator=seeded(seed)), radius=0.5, norm=norm)
        assert float((far - nearest).norm()) <= float((far - other).norm()) + 1e-5


@pytest.mark.parametrize("norm", NORMS)
def test_zero_gradient_has_no_direction(norm: Norm) -> None:
    assert torch.equal(direction(torch.zeros(SHAPE), norm=norm), torch.zeros(SHAPE))


def test_realised_norm_is_the_mean_over_what_the_ball_bounds() -> None:
    delta = torch.zeros(1, 3, 2)
    delta[0, 0], delta[0, 1] = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0])
    mask = torch.tensor([[True, True, False]])
    assert realised_norm(delta, mask, norm="l2") == pytest.approx(3.0)
    assert realised_norm(delta, mask, norm="l2-sequence") == pytest.approx(26**0.5)
    assert realised_norm(delta, mask, norm="linf") == pytest.approx(2.5)
    assert realised_norm(delta, mask & False, norm="l2") == 0.0


@pytest.mark.parametrize("norm", NORMS)
def test_realised_norm_of_some_samples_is_that_of_these_alone(norm: Norm) -> None:
    delta, mask, _ = problem()
    delta = delta * mask.unsqueeze(-1)
    some = torch.tensor([True, False, True])
    found = realised_norm(delta * some.view(3, 1, 1), mask, norm=norm, samples=some)
    torch.testing.assert_close(found, realised_norm(delta[some], mask[some], norm=norm))


def test_arguments_out_of_range_are_refused() -> None:
    _, mask, loss = problem()
    for wrong in ({"radius": -1.0}, {"radius": float("nan")}, {"steps": -1}, {"step_size": -1.0}):
        with pytest.raises(ValueError, match="expected radius >= 0"):
            pgd(loss, torch.zeros(SHAPE), mask, seeded(), **{"radius": 1.0, "steps": 1, **wrong})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='expected norm "l2"'):
        pgd(loss, torch.zeros(SHAPE), mask, seeded(), radius=1.0, steps=1, norm="l1")  # type: ignore[arg-type]


class TestOnModels:
    @pytest.fixture(params=["gemma2", "phi3", "gpt2", "bert-classifier"])
    def model(self, request: pytest.FixtureRequest, load: Callable[..., AdaptedModel]) -> Iterator[AdaptedModel]:
        model = load(request.param)
        with model.attacking():
            yield model

    @pytest.fixture
    def encoded(self, model: AdaptedModel, examples: list[Example]) -> list[Encoded]:
        return [model.encode(example) for example in examples]

    def attack(self, model: AdaptedModel, batch: Batch, norm: Norm = "l2", *, steps: int | None = 3) -> Tensor:
        kind: Perturb = random if steps is None else functools.partial(pgd, steps=steps)
        kind = functools.partial(kind, radius=0.3 * model.embedding_unit(norm), norm=norm)
        return kind(self.loss(model, batch), model.embed(batch), batch.perturbable, seeded())

    def loss(self, model: AdaptedModel, batch: Batch) -> LossOfDelta:
        return lambda delta: sample_sum(model.supervised_logits(batch, delta), batch.targets, batch.samples)

    @pytest.mark.parametrize("norm", NORMS)
    def test_samples_perturbation_does_not_depend_on_its_batch(
        self, model: AdaptedModel, encoded: list[Encoded], norm: Norm
    ) -> None:
        together = self.attack(model, model.collate(encoded), norm, steps=2)
        for b, item in enumerate(encoded):
            alone = self.attack(model, model.collate([item]), norm, steps=2)
            apart = float((together[b, : len(item.input_ids)] - alone[0]).norm())
            assert apart <= 2e-3 * float(alone.norm())

    def test_pgd_raises_the_loss_more_than_chance_and_more_steps_raise_it_more(
        self, model: AdaptedModel, encoded: list[Encoded]
    ) -> None:
        batch = model.collate(encoded)
        loss = self.loss(model, batch)
        with torch.no_grad():
            clean, noisy = float(loss(None)), float(loss(self.attack(model, batch, steps=None)))
        weak, strong = self.attack(model, batch, steps=1), self.attack(model, batch, steps=10)
        with torch.no_grad():
            assert float(loss(strong)) > float(loss(weak)) > clean
            assert float(loss(strong)) - clean > 2 * abs(noisy - clean)

    def test_answer_and_structure_are_not_touched(self, model: AdaptedModel, encoded: list[Encoded]) -> None:
        batch = model.collate(encoded)
        delta = self.attack(model, batch)
        assert bool((delta.norm(dim=-1)[batch.perturbable] > 0).all())
        assert not bool(delta[~batch.perturbable].any())
