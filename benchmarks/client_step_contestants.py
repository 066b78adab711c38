"""The steps that `client_step.py` compares: this package's, in its variants, and those of common training code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedeat import objective, perturbation, variants
from fedeat.algorithm import LocalTraining, client_update
from fedeat.data import Batch
from fedeat.model import AdaptedModel
from fedeat.perturbation import Ascent

Contestant: TypeAlias = Callable[[Sequence[Batch]], None]


@dataclass(frozen=True)
class Ours:
    """This package's client on a list of batches.

    Attributes:
        model: on which.
        training: how.
        passes: forward and backward runs a step.
    """

    model: AdaptedModel
    training: LocalTraining
    passes: float

    def __call__(self, batches: Sequence[Batch]) -> None:
        client_update(
            self.model,
            self.model.adapter(),
            lambda epoch: batches,
            client_id=0,
            num_examples=1,
            training=self.training,
            generator=torch.Generator(device=self.model.device),
        )


@dataclass(frozen=True)
class Entry:
    """A contestant.

    Attributes:
        run: takes its steps on a list of batches.
        base: its base's dtype, which tells whose plain training it is compared with.
        tasks: where it runs; elsewhere it would tell nothing new.
    """

    run: Contestant
    base: str
    tasks: tuple[str, ...] = ("alpaca", "cls")


def contestants(models: dict[str, AdaptedModel], steps: Sequence[int]) -> dict[str, Entry]:
    """Name -> how it trains.

    Args:
        models: dtype of the base -> the model; without "float32", as on an accelerator, all run in bfloat16.
        steps: K of the rows of Algorithm 1.
    """
    first = "float32" if "float32" in models else "bfloat16"
    model, half = models[first], models["bfloat16"]
    radius = 0.05 * model.embedding_unit("l2")
    plain = LocalTraining(1, None, objective.adversarial, functools.partial(torch.optim.AdamW, lr=1e-6))
    ascent = Ascent(radius, 3)

    def pgd(k: int) -> LocalTraining:
        return replace(plain, perturb=functools.partial(perturbation.pgd, radius=radius, steps=k))

    def variant(gradient: Callable[..., Any], **options: Any) -> LocalTraining:
        return replace(plain, variant=functools.partial(gradient, **options))

    runs = {
        "ordinary": Entry(functools.partial(ordinary, model), first),
        "naive K=3": Entry(functools.partial(naive, model, radius, 3), first),
        "reference manner, K=3": Entry(functools.partial(reference, model, radius, 3), first),
    }
    if first == "float32":
        small = view(model, attack_dtype="bfloat16")
        runs["plain"] = Entry(Ours(model, plain, 1), first)
        runs["K=3, unmerged"] = Entry(Ours(view(model, merge_in_ascent=False), pgd(3), 4), first)
        for k in steps:
            runs[f"K={k}"] = Entry(Ours(model, pgd(k), k + 1), first, ("alpaca", "cls") if k == 3 else ("alpaca",))
        runs["K=3, padded"] = Entry(Ours(view(model, packing=False), pgd(3), 4), first, ())
        runs["K=3, bf16 ascent"] = Entry(Ours(small, pgd(3), 4), first)
        fused = view(small, attention="sdpa")
        runs["K=3, bf16 ascent, fused attention"] = Entry(Ours(fused, pgd(3), 4), first, ("alpaca",))
    runs["FreeLB K=3"] = Entry(Ours(model, variant(variants.freelb, ascent=ascent), 3), first)
    mixed = functools.partial(objective.mixed, weight=1.0)
    runs["mixed K=3"] = Entry(Ours(model, replace(pgd(3), objective=mixed), 5), first, ("alpaca",))
    harvest = variant(variants.harvested, ascent=ascent, weight=1.0)
    runs["mixed K=3, harvested"] = Entry(Ours(model, harvest, 4), first, ("alpaca",))
    yopo = variant(variants.yopo, ascent=Ascent(radius, 2), inner=3, objective=objective.adversarial)
    runs["YOPO 2 x 3"] = Entry(Ours(model, yopo, 3), first, ("alpaca",))
    runs["plain, bf16 base"] = Entry(Ours(half, plain, 1), "bfloat16")
    runs["K=3, unmerged, bf16 base"] = Entry(
        Ours(view(half, merge_in_ascent=False), pgd(3), 4), "bfloat16", ("alpaca",)
    )
    for k in steps if first == "bfloat16" else [3]:
        runs[f"K={k}, bf16 base"] = Entry(Ours(half, pgd(k), k + 1), "bfloat16")
    return runs


def compiled(models: dict[str, AdaptedModel]) -> dict[str, Entry]:
    """The same steps with the layers compiled."""
    first = "float32" if "float32" in models else "bfloat16"
    radius = 0.05 * models[first].embedding_unit("l2")
    plain = LocalTraining(1, None, objective.adversarial, functools.partial(torch.optim.AdamW, lr=1e-6))
    attack = replace(plain, perturb=functools.partial(perturbation.pgd, radius=radius, steps=3))
    model = view(models[first], compile=True)
    runs = {
        "plain, compiled": Entry(Ours(model, plain, 1), first),
        "K=3, compiled": Entry(Ours(model, attack, 4), first),
    }
    if first == "float32":
        small = view(models[first], compile=True, attack_dtype="bfloat16")
        runs["K=3, bf16 ascent, compiled"] = Entry(Ours(small, attack, 4), first)
    return runs


def view(model: AdaptedModel, **options: Any) -> AdaptedModel:
    """The same network, run in another way: options are a `ModelSource`'s."""
    return AdaptedModel(model.network, model.tokenizer, replace(model.source, **options))


def ordinary(model: AdaptedModel, batches: Sequence[Batch]) -> None:
    """Steps as a training loop over PEFT takes them."""
    parameters = list(model.adapter_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    for batch in batches:
        loss = model.network(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels_of(batch)
        ).loss
        finish(loss, parameters, optimizer)


def naive(model: AdaptedModel, radius: float, steps: int, batches: Sequence[Batch]) -> None:
    """Adversarial steps as they are often written."""
    parameters = list(model.adapter_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    for batch in batches:
        labels = labels_of(batch)
        vectors = model.network.get_input_embeddings()(batch.input_ids).detach()
        keep = batch.perturbable.unsqueeze(-1)
        delta = torch.zeros_like(vectors)
        for _ in range(steps):
            delta.requires_grad_(True)
            loss = model.network(
                inputs_embeds=vectors + delta * keep, attention_mask=batch.attention_mask, labels=labels
            ).loss
            torch.autograd.backward(loss)
            delta = ascended(delta, radius, 2.5 * radius / steps)
        optimizer.zero_grad()
        loss = model.network(
            inputs_embeds=vectors + delta * keep, attention_mask=batch.attention_mask, labels=labels
        ).loss
        finish(loss, parameters, optimizer)


def reference(model: AdaptedModel, radius: float, steps: int, batches: Sequence[Batch]) -> None:
    """Adversarial steps in the manner of the code of "Efficient Adversarial Training in LLMs with Continuous Attacks".

    Its ascent takes no parameter gradient, but embeds by a product with one-hot rows, compares with one-hot targets,
    and looks for the likeliest token at every position in every step.
    """
    parameters = list(model.adapter_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    table = model.network.get_input_embeddings().weight
    for batch in batches:
        labels = labels_of(batch)
        vectors = (one_hot(batch.input_ids, table) @ table).detach()
        goals, supervised = one_hot(labels.clamp_min(0), table)[:, 1:], labels[:, 1:] >= 0
        keep = batch.perturbable.unsqueeze(-1)
        delta = torch.zeros_like(vectors)
        for parameter in parameters:
            parameter.requires_grad_(False)
        for _ in range(steps):
            delta.requires_grad_(True)
            logits = model.network(inputs_embeds=vectors + delta * keep, attention_mask=batch.attention_mask).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1][supervised].float(), goals[supervised].float())
            torch.autograd.backward(loss)
            logits.argmax(-1)
            delta = ascended(delta, radius, 2.5 * radius / steps)
        for parameter in parameters:
            parameter.requires_grad_(True)
        loss = model.network(
            inputs_embeds=vectors + delta * keep, attention_mask=batch.attention_mask, labels=labels
        ).loss
        finish(loss, parameters, optimizer)


def one_hot(ids: Tensor, table: Tensor) -> Tensor:
    """(B, T, V) in the dtype of the embeddings."""
    rows = torch.zeros(*ids.shape, len(table), dtype=table.dtype, device=table.device)
    return rows.scatter_(2, ids.unsqueeze(2), 1.0)


def ascended(delta: Tensor, radius: float, size: float) -> Tensor:
    """A step along the gradient that `delta` holds, of that size a token, back into the ball."""
    assert delta.grad is not None
    moved = delta.detach() + size * delta.grad / delta.grad.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return moved * (radius / moved.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp(max=1.0)


def labels_of(batch: Batch) -> Tensor:
    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.rows + 1] = batch.targets
    return labels


def finish(loss: Tensor, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
