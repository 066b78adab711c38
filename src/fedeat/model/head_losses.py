"""Cross-entropy of the supervised rows without the logits of all of them at once.

Over a vocabulary of 256 thousand, the float32 logits of 8 thousand rows take 8.4 GB, and as much again for their
gradient. A row's loss depends on its own hidden state alone, so the head is run on a few rows at a time and each
chunk's gradient with respect to its hidden states is kept in place of its logits: the same losses and gradients, no
pass twice. What a model does behind its head (soft-capping, scaling) is done by the model's own forward.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedeat.objective import row_losses

CHUNK = 2**25
"""Logits held at once: 128 MiB in float32."""

Head = Callable[[Tensor], Tensor]
"""Hidden states (N, H) -> logits (N, V)."""


def chunked_losses(hidden: Tensor, targets: Tensor, head: Head, *, rows: int) -> Tensor:
    """Cross-entropy (N,) float32 of hidden states (N, H), `rows` >= 1 at a time.

    Args:
        hidden: (N, H).
        targets: (N,) int64.
        head: what makes logits; it must hold no parameter to be trained.
        rows: >= 1, rows at once.
    """
    losses: Tensor = _ChunkedLosses.apply(hidden, targets, head, rows)  # type: ignore[no-untyped-call]
    return losses


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, rows: int) -> Tensor:
        """Losses; where the hidden states need a gradient, that of each row's loss is kept."""
        losses, slopes = [], []
        # A batch in parts is checkpointed, and a checkpoint's hooks would run the forward again for each gradient here.
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            for start in range(0, len(hidden), rows):
                states, goals = hidden[start : start + rows], targets[start : start + rows]
                with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                    states = states.detach().requires_grad_(ctx.needs_input_grad[0])
                    found = row_losses(head(states), goals)
                    if found.requires_grad:
                        slopes.append(torch.autograd.grad(found.sum(), states)[0])
                losses.append(found.detach())
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """(N,) gradient of the losses -> (N, H) gradient of the hidden states."""
        (slopes,) = ctx.saved_tensors
        return (slopes * gradient.unsqueeze(1)).to(slopes.dtype), None, None, None


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@contextlib.contextmanager
def head_alone(base: Any, output: Any) -> Iterator[Head]:
    """The head of a causal language model, with all that its forward does behind it.

    Within it the model's backbone returns what it is handed: the head then runs as the model's authors wrote it.

    Args:
        base: the model.
        output: what its backbone returned; a dataclass with `last_hidden_state`.
    """
    backbone = base.base_model
    given: list[Tensor] = []

    def hand_over(*args: Any, **options: Any) -> Any:
        return dataclasses.replace(output, last_hidden_state=given[0])

    def head(hidden: Tensor) -> Tensor:
        given[:] = [hidden.unsqueeze(0)]
        ids = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
        logits: Tensor = base(input_ids=ids, use_cache=False).logits
        return logits.squeeze(0)

    before = backbone.__dict__.get("forward")
    backbone.__dict__["forward"] = hand_over
    try:
        yield head
    finally:
        backbone.__dict__.pop("forward")
        if before is not None:
            backbone.__dict__["forward"] = before


def can_stand_alone(base: Any) -> bool:
    """Whether a causal model is a backbone and a frozen head behind it, whose size is known."""
    head = base.get_output_embeddings()
    frozen = not any(parameter.requires_grad for parameter in head.parameters())
    return frozen and base.base_model is not base and getattr(head, "weight", None) is not None
