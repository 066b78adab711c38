"""Each way through the adapted layers against PEFT's own, for each architecture, and what it leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedeat.data import Batch, Example
from fedeat.model import AdaptedModel, Lora, lora_paths
from fedeat.model.lora_paths import fused, plain_layers, routed
from fedeat.passes import attacked, trained

Load = Callable[..., AdaptedModel]


def batch_of(model: AdaptedModel, examples: list[Example]) -> Batch:
    return model.collate([model.encode(example) for example in examples])


def slope(model: AdaptedModel, batch: Batch) -> tuple[float, Tensor]:
    """The attacked loss and its gradient at a small perturbation, in attack mode."""
    delta = 0.1 * torch.randn(model.embed(batch).shape, generator=torch.Generator().manual_seed(1))
    with model.attacking():
        delta.requires_grad_(True)
        loss = attacked(model, batch)(delta)
        return float(loss.detach()), torch.autograd.grad(loss, delta)[0]


def apart(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def snapshot(model: AdaptedModel) -> dict[str, tuple[int, Tensor]]:
    """Each weight's address and bits."""
    return {name: (p.data_ptr(), p.detach().clone()) for name, p in model.network.named_parameters()}


def assert_untouched(model: AdaptedModel, before: dict[str, tuple[int, Tensor]]) -> None:
    after = dict(model.network.named_parameters())
    assert list(after) == list(before)
    for name, (address, bits) in before.items():
        assert after[name].data_ptr() == address, name
        assert torch.equal(after[name], bits), name
    assert not [m for m in model.network.modules() if "forward" in m.__dict__]


def test_ascent_on_merged_weights_is_the_ascent(anyone: str, load: Load, examples: list[Example]) -> None:
    merged, unmerged = load(anyone), load(anyone, merge_in_ascent=False)
    batch = batch_of(merged, examples)
    before = snapshot(merged)
    (loss, gradient), (expected_loss, expected) = slope(merged, batch), slope(unmerged, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert apart(gradient, expected) < 1e-4
    assert_untouched(merged, before)


@pytest.mark.parametrize("options", [{}, {"attack_dtype": "bfloat16"}])
def test_interrupted_ascent_leaves_base_and_adapter_as_they_were(
    load: Load, examples: list[Example], options: dict[str, str]
) -> None:
    model = load("gemma", **options)  # its head is tied to its embeddings
    before = snapshot(model)
    for place in ("inside", "while merging"):
        with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
            if place == "while merging":
                last = model.network.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
                stack.callback(setattr, last, "scaling", last.scaling)
                last.scaling = None
                stack.enter_context(contextlib.suppress(TypeError))
            stack.enter_context(model.attacking())
            raise KeyboardInterrupt
        assert_untouched(model, before)
        assert all(parameter.requires_grad for parameter in model.adapter_parameters().values())


@pytest.mark.parametrize(("base", "ascent"), [("bfloat16", None), ("float32", "bfloat16")])
def test_weights_merged_in_parts_are_rounded_once_and_the_base_stays(
    load: Load, monkeypatch: pytest.MonkeyPatch, base: str, ascent: str | None
) -> None:
    monkeypatch.setattr(lora_paths, "_MERGED_AT_ONCE", {"cpu": 100})  # a few rows, which do not divide all
    model = load("mistral", dtype=base, attack_dtype=ascent)
    layers = plain_layers(model.network)
    before = snapshot(model)
    expected = [layer.base_layer.weight.float() + layer.get_delta_weight("default").float() for layer in layers]
    with model.attacking():
        for layer, whole in zip(layers, expected, strict=True):
            assert_close(layer.base_layer.weight.float(), whole, rtol=2**-8, atol=0)
    assert_untouched(model, before)


def test_merged_weights_follow_the_adapter(load: Load, examples: list[Example]) -> None:
    model, other = load("llama"), load("llama", merge_in_ascent=False)
    batch = batch_of(model, examples)
    slope(model, batch)
    doubled = {name: 2 * tensor for name, tensor in model.adapter().items()}
    model.load_adapter(doubled)
    other.load_adapter(doubled)
    assert apart(slope(model, batch)[1], slope(other, batch)[1]) < 1e-4


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(("name", "target"), [("llama", "embed_tokens"), ("gemma", "embed_tokens"), ("gpt2", "wte")])
def test_adapted_embeddings_are_merged_and_a_tied_head_is_not(
    name: str, target: str, load: Load, examples: list[Example]
) -> None:
    lora = Lora(rank=2, target_modules=(target,))
    merged, unmerged = load(name, lora=lora), load(name, lora=lora, merge_in_ascent=False)
    batch = batch_of(merged, examples)
    assert len(plain_layers(merged.network)) == 1
    assert slope(merged, batch)[0] == pytest.approx(slope(unmerged, batch)[0], rel=1e-5)
    assert apart(slope(merged, batch)[1], slope(unmerged, batch)[1]) < 1e-4


def test_layers_that_cannot_be_merged_ascend_as_they_are(load: Load, examples: list[Example]) -> None:
    model = load("llama")
    weights = plain_layers(model.network)
    for layer in weights[::2]:
        layer.lora_variant["default"] = object()  # as DoRA and quantised layers are not merged
    assert plain_layers(model.network) == weights[1::2]
    for layer in weights[::2]:
        layer.lora_variant.clear()
    partly = AdaptedModel(model.network, model.tokenizer, model.source)
    partly._ascent.layers = weights[1::2]
    batch = batch_of(model, examples)
    assert apart(slope(partly, batch)[1], slope(model, batch)[1]) < 1e-4


def test_fused_forward_has_pefts_loss_and_gradients(anyone: str, load: Load, examples: list[Example]) -> None:
    model = load(anyone)
    batch = batch_of(model, examples)
    assert plain_layers(model.network)
    found = []
    fast = routed({layer: fused(layer) for layer in plain_layers(model.network)})
    for route in (contextlib.nullcontext(), fast):
        with route:
            loss = trained(model, batch)(None)
            torch.autograd.backward(loss)
        gradients = torch.cat([p.grad.flatten() for p in model.adapter_parameters().values() if p.grad is not None])
        found.append((float(loss.detach()), gradients))
        model.network.zero_grad(set_to_none=True)
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert apart(found[1][1], found[0][1]) < 1e-4


def test_fused_forward_of_a_bfloat16_base_is_pefts_to_its_precision(load: Load, examples: list[Example]) -> None:
    exact, model = load("mistral"), load("mistral", dtype="bfloat16")
    batch = batch_of(model, examples)
    with torch.no_grad():
        expected = exact.supervised_logits(batch)
        peft = model.supervised_logits(batch)
        with model.training():
            ours = model.supervised_logits(batch)
    assert apart(ours.float(), expected) < 1.5 * apart(peft.float(), expected)


def test_bfloat16_ascent_finds_nearly_the_same_direction_and_touches_nothing(
    anyone: str, load: Load, examples: list[Example]
) -> None:
    model, small = load(anyone), load(anyone, attack_dtype="bfloat16")
    for either in (model, small):
        for parameter in either.network.parameters():
            parameter.data.mul_(0.25 if parameter.ndim > 1 else 1.0)  # the zoo's weights are made to amplify
    batch = batch_of(small, examples)
    before = snapshot(small)
    with small.attacking():
        dtypes = {p.dtype for p in small.network.parameters() if id(p) not in adapter_ids(small)}
        assert dtypes <= {torch.bfloat16}
    (loss, gradient), (expected_loss, expected) = slope(small, batch), slope(model, batch)
    assert gradient.dtype == torch.float32
    assert loss == pytest.approx(expected_loss, rel=0.02)
    assert float(torch.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0)) > 0.98
    assert_untouched(small, before)


def adapter_ids(model: AdaptedModel) -> set[int]:
    return {id(parameter) for parameter in model.adapter_parameters().values()}


def test_float16_base_keeps_pefts_forward_and_its_gradients_do_not_vanish(load: Load, examples: list[Example]) -> None:
    found = []
    for model in (load("mistral", dtype="float16"), load("mistral")):
        for parameter in model.network.parameters():
            parameter.data.mul_(0.25 if parameter.ndim > 1 else 1.0)
        batch = batch_of(model, examples)
        with model.training():
            assert bool([m for m in model.network.modules() if "forward" in m.__dict__]) == (len(found) == 1)
            torch.autograd.backward(trained(model, batch)(None))
        gradients = [p.grad.flatten() for p in model.adapter_parameters().values() if p.grad is not None]
        found.append((torch.cat(gradients), slope(model, batch)[1].flatten()))
    for got, expected in zip(*found, strict=True):
        assert got.dtype == torch.float32
        assert float(torch.cosine_similarity(got, expected, dim=0)) > 0.99
