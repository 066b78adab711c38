"""The perturbation for a training loop of one's own, with any Hugging Face model and none of this package's classes.

    unit = fedeat.embedding_unit(model)                                       # once
    delta = fedeat.worst_case(model, batch, radius=0.05 * unit, steps=3)
    with fedeat.perturbed(model, delta):
        loss = model(**batch).loss                                            # and on as before

`examples/` has this in a plain loop, in Hugging Face's `Trainer` and in TRL's `SFTTrainer`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fedeat import hooks
from fedeat.objective import row_losses, sum_over_samples
from fedeat.perturbation import Norm, pgd


@contextlib.contextmanager
def perturbed(model: Any, delta: Tensor | None) -> Iterator[None]:
    """Within it, a forward pass of `model` sees its token embeddings plus `delta`; exactly one pass.

    Args:
        model: a Hugging Face model, wrapped by PEFT or not.
        delta: (B, T, H); None adds nothing.

    Raises:
        ModelError: the embedding module did not fire exactly once, or returned another shape.
    """
    with hooks.added_to_embeddings(model, delta):
        yield


def worst_case(
    model: Any,
    inputs: Mapping[str, Tensor],
    *,
    radius: float,
    steps: int = 3,
    norm: Norm = "l2",
    mask: Tensor | None = None,
) -> Tensor:
    """The perturbation inside the ball that raises the model's loss most, by projected gradient ascent from zero.

    The model is in eval mode meanwhile, its parameters take no gradient, and both are put back. A sample's
    perturbation does not depend on the others of its batch.

    Args:
        model: a Hugging Face model with labels: a causal language model or a sequence classifier.
        inputs: its inputs: "input_ids" (B, T), "labels" (B, T) with -100 where nothing is learned, or (B,) classes,
            and usually "attention_mask" (B, T).
        radius: >= 0, absolute; `embedding_unit` tells what 1 stands for.
        steps: K >= 0.
        norm: which ball.
        mask: (B, T) bool, where the perturbation may act; by default at tokens that are not labels themselves.

    Returns:
        delta (B, T, H) float32.
    """
    ids, labels = inputs["input_ids"], inputs["labels"]
    tokens = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    causal = labels.ndim == 2
    if mask is None:
        mask = tokens & (labels == -100) if causal else tokens
    given = {name: value for name, value in inputs.items() if name != "labels"}
    with _still(model):
        if causal:  # row t of the logits predicts token t + 1
            targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
            rows = (targets != -100).nonzero().flatten()
            samples, goals = rows // ids.shape[1], targets[rows]
        else:
            rows, samples, goals = torch.arange(len(ids)), torch.arange(len(ids), device=ids.device), labels

        def loss(delta: Tensor | None) -> Tensor:
            with contextlib.ExitStack() as stack:
                stack.enter_context(hooks.added_to_embeddings(model, delta))
                if causal:
                    stack.enter_context(hooks.head_on_rows(model, rows))
                logits = model(**given).logits
            return sum_over_samples(row_losses(logits.reshape(-1, logits.shape[-1]), goals), samples)

        with torch.no_grad():
            embeddings = model.get_input_embeddings()(ids)
        with torch.enable_grad():
            return pgd(loss, embeddings, mask, torch.Generator(), radius=radius, steps=steps, norm=norm)


def embedding_unit(model: Any, norm: Norm = "l2") -> float:
    """Length that a relative radius of 1 stands for, in embedding units.

    The mean Euclidean norm of the vocabulary's embeddings as the embedding module returns them, with any scale in it
    (Gemma's); for "linf" that over sqrt(H), the root-mean-square coordinate, so that a radius means a like share of an
    embedding in both.
    """
    module = model.get_input_embeddings()
    rows, width = map(int, module.weight.shape)
    total = 0.0
    with torch.no_grad():
        for start in range(0, rows, 8192):
            ids = torch.arange(start, min(start + 8192, rows), device=module.weight.device)
            total += float(module(ids).double().norm(dim=-1).sum())
    mean = total / rows
    return mean / float(width**0.5) if norm == "linf" else mean


@contextlib.contextmanager
def _still(model: Any) -> Iterator[None]:
    """Within it, no dropout and no gradient for any parameter; layers that recompute their activations still do."""
    recomputing = [m for m in model.modules() if m.training and getattr(m, "gradient_checkpointing", False)]
    awake = [m for m in model.modules() if m.training and not getattr(m, "gradient_checkpointing", False)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with hooks.modes(awake, training=False), hooks.without_shares_dropped(recomputing), hooks.frozen(trained):
        yield
