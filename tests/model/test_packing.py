"""Samples packed into one row against the same samples one a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedeat.data import Batch, Example
from fedeat.model import AdaptedModel, packing
from fedeat.model.packing import keeps_apart, packed

Load = Callable[..., AdaptedModel]


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny models of the tests count as wide."""
    monkeypatch.setattr(packing, "WIDE", 1)


@pytest.fixture
def batch(load: Load, examples: list[Example]) -> Batch:
    model = load("llama")
    return model.collate([model.encode(example) for example in examples])


def test_a_row_holds_every_token_once_and_points_back_to_it(batch: Batch) -> None:
    row, where = packed(batch)
    assert row.input_ids.shape == (1, int(batch.attention_mask.sum()))
    assert bool(row.attention_mask.all())
    assert torch.equal(row.input_ids[0], batch.input_ids.flatten()[where])
    assert torch.equal(where[row.rows], batch.rows)
    assert torch.equal(row.perturbable[0], batch.perturbable.flatten()[where])
    lengths = batch.attention_mask.sum(1).tolist()
    assert row.position_ids is not None
    assert row.position_ids[0].tolist() == [t for length in lengths for t in range(length)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_give_a_row_the_losses_and_gradients_of_its_samples(
    causal: str, dtype: str, load: Load, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(causal, dtype=dtype)
    batch = model.collate([model.encode(example) for example in examples])
    delta = torch.randn(model.embed(batch).shape, generator=torch.Generator().manual_seed(0))
    delta = (0.1 * delta * batch.attention_mask.unsqueeze(-1)).requires_grad_()
    with model.attacking():
        found = model.supervised_losses(batch, delta)
        (gradient,) = torch.autograd.grad(found.sum(), delta)
        assert model.packs(batch) is (causal != "gemma2")  # which caps its scores: no sdpa
        monkeypatch.setattr(packing, "WASTEFUL", 1.0)
        assert not model.packs(batch)
        expected = model.supervised_losses(batch, delta)
        (slopes,) = torch.autograd.grad(expected.sum(), delta)
    near = 1e-4 if dtype == "float32" else 0.05
    assert torch.allclose(found, expected, rtol=near)
    assert float((gradient - slopes).norm()) <= near * float(slopes.norm())


def test_batches_of_like_length_and_layers_that_would_not_see_it_keep_a_row_a_sample(
    load: Load, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("llama")
    one, several = (model.collate([model.encode(example) for example in group]) for group in (examples[:1], examples))
    assert not model.packs(one)
    assert model.packs(several)
    assert not load("llama", gradient_checkpointing=True).packs(several)
    assert not load("llama", packing=False).packs(several)
    assert not load("bert-classifier").packs(several)
    monkeypatch.setattr(packing, "WIDE", 10**6)
    assert not load("llama").packs(several)


def test_models_that_take_no_positions_or_let_a_sample_see_the_one_before_are_told_apart(load: Load) -> None:
    base = load("llama")._base
    forward = base.forward
    assert keeps_apart(base)

    def deaf(input_ids: Tensor, position_ids: Tensor | None = None, **options: Any) -> Any:
        return forward(input_ids=input_ids, **options)

    def leaky(input_ids: Tensor, position_ids: Tensor | None = None, **options: Any) -> Any:
        everything = torch.ones_like(input_ids)
        return forward(input_ids=input_ids, position_ids=position_ids, **{"attention_mask": everything, **options})

    def without(input_ids: Tensor, **options: Any) -> Any:
        return forward(input_ids=input_ids, **options)

    for other in (deaf, leaky, without):
        base.forward = other
        assert not keeps_apart(base)
