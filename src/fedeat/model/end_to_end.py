"""Samples end to end in one row, so that nothing is computed at padding.

Clients that train together take whatever batch comes next in each one's own order, so their samples are not of like
length: of eight samples of 22 to 44 tokens, a quarter of the positions is padding. In one row there is none. A model
serves it if it takes positions from `position_ids` and lets no sample attend to another where they restart, as
transformers' masks do; `kept_apart` tries.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from fedeat.data import Batch


def laid(batch: Batch) -> tuple[Batch, Tensor]:
    """All samples of a batch in one row, and where each of its N tokens was: (N,) int64, flat positions `b * T + t`.

    The supervised rows keep their order, their targets and their samples; one row a sample, for classification, is not
    served.
    """
    where = batch.attention_mask.flatten().nonzero().flatten()
    position_ids = (where % batch.input_ids.shape[1]).unsqueeze(0)

    def along(tensor: Tensor) -> Tensor:
        return tensor.flatten()[where].unsqueeze(0)

    row = replace(
        batch,
        input_ids=along(batch.input_ids),
        attention_mask=along(batch.attention_mask),
        perturbable=along(batch.perturbable),
        rows=torch.searchsorted(where, batch.rows),
        token_type_ids=None if batch.token_type_ids is None else along(batch.token_type_ids),
        position_ids=position_ids,
    )
    return row, where


class AttentionWithin(TorchFunctionMode):
    """Within it, attention over a row of samples is computed sample by sample, under the mask's blocks on its diagonal.

    The blocks beside the diagonal let nothing through; formed as well, they cost N^2 instead of the sum of squares.
    Attention that a model computes in another way than by torch's function is left as it is.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        """Of samples that have these many tokens, in the order of the row."""
        super().__init__()
        self._lengths = list(lengths)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every other function is called as it is."""
        if func is scaled_dot_product_attention:
            return self._each(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _each(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
    ) -> Tensor:
        total = sum(self._lengths)
        if attn_mask is None or {query.shape[-2], *attn_mask.shape[-2:]} != {total}:
            return scaled_dot_product_attention(query, key, value, attn_mask, *rest, **options)
        parts, start = [], 0
        for q, k, v in zip(*(torch.split(t, self._lengths, -2) for t in (query, key, value)), strict=True):
            block = attn_mask.narrow(-2, start, q.shape[-2]).narrow(-1, start, q.shape[-2])
            parts.append(scaled_dot_product_attention(q, k, v, block, *rest, **options))
            start += q.shape[-2]
        return torch.cat(parts, -2)


def kept_apart(base: Any, logits: Callable[[Batch], Tensor]) -> bool:
    """Whether a model gives a sample behind another one in a row the logits it gives it alone.

    No attribute of a model tells; so the same sample is run alone, behind another one, and once more there with
    positions that run on, which lets it see the other. Rounding is told from seeing by that third run.

    Args:
        base: the transformers model.
        logits: a batch -> logits of its supervised rows.
    """
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return False
    device = base.get_input_embeddings().weight.device
    ids = (torch.arange(6, device=device) % base.get_input_embeddings().weight.shape[0]).unsqueeze(0)
    last = torch.arange(3, 6, device=device)

    def run(ids: Tensor, rows: Tensor, position_ids: Tensor | None = None) -> Tensor:
        everywhere = torch.ones_like(ids)
        return logits(
            Batch(ids, everywhere, everywhere.bool(), rows, rows * 0, rows * 0, position_ids=position_ids)
        ).float()

    with torch.no_grad():
        alone = run(ids[:, 3:], last - 3)
        behind = run(ids, last, torch.arange(6, device=device).remainder(3).unsqueeze(0))
        seeing = run(ids, last)
    return float((behind - alone).abs().max()) <= 0.05 * float((seeing - alone).abs().max())
