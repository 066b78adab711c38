"""Losses over a large vocabulary, a few rows at a time, against all logits at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedeat.data import Batch, Example
from fedeat.model import AdaptedModel, head_losses
from fedeat.passes import InParts

Load = Callable[..., AdaptedModel]


def losses_and_slope(model: AdaptedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    delta = 0.1 * torch.randn(model.embed(batch).shape, generator=torch.Generator().manual_seed(1))
    delta.requires_grad_(True)
    losses = model.supervised_losses(batch, delta)
    weights = torch.linspace(0.5, 2.0, len(losses))  # a gradient of its own for each row
    return losses.detach(), torch.autograd.grad((losses * weights).sum(), delta)[0]


def test_chunks_have_the_losses_and_gradients_of_the_whole(
    causal: str, load: Load, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(causal)
    batch = model.collate([model.encode(example) for example in examples])
    expected, slope = losses_and_slope(model, batch)
    rows: list[int] = []
    head = model.network.get_base_model().get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[-2]))
    monkeypatch.setattr(head_losses, "CHUNK", 3 * head.weight.shape[0])
    chunked, chunked_slope = losses_and_slope(model, batch)
    with torch.no_grad():
        unneeded = model.supervised_losses(batch)
    handle.remove()
    assert max(rows) == 3
    assert sum(rows) == 2 * len(batch.rows)
    torch.testing.assert_close(chunked, expected, rtol=1e-5, atol=1e-6)
    assert float((chunked_slope - slope).norm()) < 1e-4 * float(slope.norm())
    assert not unneeded.requires_grad
    assert "forward" not in model.network.get_base_model().base_model.__dict__


def test_adapter_is_trained_through_chunks(
    load: Load, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("gemma2")  # its logits are capped behind the head
    batch = model.collate([model.encode(example) for example in examples])
    found = []
    for chunk in (head_losses.CHUNK, 5 * len(model.tokenizer)):
        monkeypatch.setattr(head_losses, "CHUNK", chunk)
        with model.training():
            torch.autograd.backward(batch.mean(model.supervised_losses(batch)))
        found.append(torch.cat([p.grad.flatten() for p in model.adapter_parameters().values() if p.grad is not None]))
        model.network.zero_grad(set_to_none=True)
    assert float((found[0] - found[1]).norm()) < 1e-5 * float(found[0].norm())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_batch_in_parts_has_the_losses_and_gradients_of_the_whole_through_chunks(
    load: Load, examples: list[Example], monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    model = load("gemma2", gradient_checkpointing=checkpointing)
    batch = model.collate([model.encode(example) for example in examples])
    monkeypatch.setattr(head_losses, "CHUNK", 2 * len(model.tokenizer))
    found = []
    for runner in (model, InParts(model, 2)):
        delta = torch.full(model.embed(batch).shape, 0.1, requires_grad=True)
        with model.training():
            loss = batch.mean(runner.supervised_losses(batch, delta))
            torch.autograd.backward(loss)
        slopes = [p.grad.flatten() for p in (delta, *model.adapter_parameters().values()) if p.grad is not None]
        found.append(torch.cat([loss.detach().reshape(1), *slopes]))
        model.network.zero_grad(set_to_none=True)
    whole, parts = found
    assert float((whole - parts).norm()) < 2e-5 * float(whole.norm())


def test_head_that_is_trained_itself_is_not_chunked(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("llama")
    base = model.network.get_base_model()
    assert head_losses.can_stand_alone(base)
    base.lm_head.weight.requires_grad_(True)
    assert not head_losses.can_stand_alone(base)
