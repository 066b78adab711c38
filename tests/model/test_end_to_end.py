"""Samples end to end in one row against the same samples one a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fedeat.data import Batch, Example
from fedeat.model import AdaptedModel
from fedeat.model.end_to_end import AttentionWithin, kept_apart, laid

Load = Callable[..., AdaptedModel]


@pytest.fixture
def batch(load: Load, examples: list[Example]) -> Batch:
    model = load("llama")
    return model.collate([model.encode(example) for example in examples])


def test_a_row_holds_every_token_once_and_points_back_to_it(batch: Batch) -> None:
    row, where = laid(batch)
    assert row.input_ids.shape == (1, int(batch.attention_mask.sum()))
    assert bool(row.attention_mask.all())
    assert torch.equal(row.input_ids[0], batch.input_ids.flatten()[where])
    assert torch.equal(where[row.rows], batch.rows)
    assert torch.equal(row.perturbable[0], batch.perturbable.flatten()[where])
    lengths = batch.attention_mask.sum(1).tolist()
    assert row.position_ids is not None
    assert row.position_ids[0].tolist() == [t for length in lengths for t in range(length)]


def test_models_give_a_row_the_losses_and_gradients_of_its_samples(
    causal: str, load: Load, examples: list[Example]
) -> None:
    model = load(causal)
    batch = model.collate([model.encode(example) for example in examples])
    row, where = laid(batch)
    delta = torch.randn(model.embed(batch).shape, generator=torch.Generator().manual_seed(0))
    delta = (0.1 * delta * batch.attention_mask.unsqueeze(-1)).requires_grad_()
    with model.attacking():
        expected = model.supervised_losses(batch, delta)
        (slopes,) = torch.autograd.grad(expected.sum(), delta)
        with AttentionWithin(batch.attention_mask.sum(1).tolist()):
            found = model.supervised_losses(row, delta.flatten(0, 1)[where].unsqueeze(0))
        (gradient,) = torch.autograd.grad(found.sum(), delta)
    assert model.keeps_apart
    assert torch.allclose(found, expected, rtol=1e-4)
    assert torch.allclose(gradient, slopes, atol=1e-4)


def test_a_model_that_lets_a_sample_see_the_one_before_is_told_apart(load: Load) -> None:
    model = load("llama")
    forward = model._base.forward

    def deaf(input_ids: Tensor, position_ids: Tensor | None = None, **options: Any) -> Any:
        return forward(input_ids=input_ids, **options)

    model._base.forward = deaf
    assert not kept_apart(model._base, model.supervised_logits)
    assert not load("bert-classifier").keeps_apart


@pytest.mark.parametrize("lengths", [[3, 1, 5], [9]])
def test_attention_sample_by_sample_is_attention_under_the_mask(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 9, 4, generator=generator, requires_grad=True) for _ in range(3))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (owner[:, None] == owner) & torch.ones(9, 9, dtype=torch.bool).tril()
    expected = scaled_dot_product_attention(query, key, value, mask, scale=0.7)
    with AttentionWithin(lengths):
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.7)
        other = scaled_dot_product_attention(query[..., :4, :], key, value, mask[:4])  # not of the whole row
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.equal(other, scaled_dot_product_attention(query[..., :4, :], key, value, mask[:4]))
    for one, two in zip(*(torch.autograd.grad(y.sum(), (query, key, value)) for y in (found, expected)), strict=True):
        assert torch.allclose(one, two, atol=1e-5)
