"""The attention that is chosen for speed against the model's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fedeat.data import Example
from fedeat.model import AdaptedModel
from fedeat.model.attention import SHORT, AttentionWithin

Load = Callable[..., AdaptedModel]


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "bert-classifier"])
def test_bfloat16_ascent_runs_plain_products_and_puts_the_models_own_back(
    name: str, load: Load, examples: list[Example]
) -> None:
    free, chosen = (load(name, attack_dtype="bfloat16", attention=choice) for choice in (None, "sdpa"))
    assert free._base.config._attn_implementation == chosen._base.config._attn_implementation == "sdpa"
    seen: list[str] = []
    losses = []
    for model in (free, chosen):
        for parameter in model.network.parameters():
            parameter.data.mul_(0.25 if parameter.ndim > 1 else 1.0)
        model._first().register_forward_hook(lambda *_, m=model: seen.append(m._base.config._attn_implementation))
        batch = model.collate([model.encode(example) for example in examples])
        with model.attacking():
            losses.append(model.supervised_losses(batch).detach())
        with model.training():
            model.supervised_losses(batch)
    assert seen == ["eager", "sdpa", "sdpa", "sdpa"]
    assert torch.allclose(losses[0], losses[1], rtol=0.05, atol=0.02)
    assert free._base.config._attn_implementation == "sdpa"


def test_attention_stays_where_there_is_no_choice(load: Load) -> None:
    assert not load("gemma2")._attention.free  # its caps are eager attention's alone
    assert not load("llama", gradient_checkpointing=True)._attention.free  # layers run again outside of the pass
    model = load("llama", dtype="bfloat16")
    with model._attention.faster(SHORT + 1):
        assert model._base.config._attn_implementation == "sdpa"
    with torch.no_grad(), model._attention.faster(4):
        assert model._base.config._attn_implementation == "sdpa"
    with contextlib.suppress(KeyboardInterrupt), model._attention.faster(4):
        assert model._base.config._attn_implementation == "eager"
        raise KeyboardInterrupt
    assert model._base.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[3, 1, 5], [9]])
def test_attention_sample_by_sample_is_attention_under_the_mask(
    lengths: list[int], dtype: torch.dtype, free: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 9, 4), (1, 2, 9, 4), (1, 2, 9, 4))  # two queries share a key
    raw = [torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) for shape in shapes]
    query, key, value = (tensor.requires_grad_() for tensor in raw)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (owner[:, None] == owner) & torch.ones(9, 9, dtype=torch.bool).tril()
    additive = torch.zeros(9, 9).masked_fill(~mask, float("-inf")).to(dtype)
    options = {"scale": 0.7, "enable_gqa": True}
    expected = scaled_dot_product_attention(query, key, value, mask, **options)
    slopes = torch.autograd.grad(expected.float().sum(), (query, key, value))
    near = 1e-5 if dtype == torch.float32 else 0.05
    for form in (mask, additive):
        with AttentionWithin(lengths, free=free):
            found = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=form, **options)
        assert torch.allclose(found, expected, atol=near)
        gradients = torch.autograd.grad(found.float().sum(), (query, key, value))
        assert all(torch.allclose(one, two, atol=4 * near) for one, two in zip(gradients, slopes, strict=True))


def test_attention_that_is_not_over_the_row_is_left_alone() -> None:
    query, key = torch.randn(1, 1, 4, 2), torch.randn(1, 1, 9, 2)
    expected = scaled_dot_product_attention(query, key, key)
    with AttentionWithin([4], free=True):
        assert torch.equal(scaled_dot_product_attention(query, key, key), expected)
        assert torch.equal(scaled_dot_product_attention(query, key, key, torch.ones(4, 9).bool()), expected)
