"""Packing: samples end to end in one row, so that nothing is computed at padding.

Batches of like length have little padding where a client has many examples, and more where it has few: a fifth of the
positions with 48 examples in batches of 16 (`benchmarks/client_step.py`). Clients that train together take whatever
batch comes next in each one's own order. In one row there is no padding. A model serves it if it takes positions from
`position_ids` and lets no sample attend to another where they restart, as transformers' masks do; `keeps_apart` tries.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedeat.data import Batch

WASTEFUL = 0.05
"""Share of padding from which a batch is packed, since packing has its own cost; chosen, not measured."""
WIDE = 192
"""Width of the hidden states from which a model is packed: an epoch gains nothing yet at 192, and does at 384."""


def packed(batch: Batch) -> tuple[Batch, Tensor]:
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


def keeps_apart(base: Any) -> bool:
    """Whether a causal model gives a sample behind another one in a row the logits that it gives it alone.

    No attribute of a model tells, so it is tried: the same sample alone, behind another, and behind one that a mask of
    ones lets it see. How far that moves the logits is the measure of how far rounding may.
    """
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return False
    device = base.get_input_embeddings().weight.device
    ids = torch.arange(6, device=device).unsqueeze(0) % base.get_input_embeddings().weight.shape[0]
    positions = torch.arange(6, device=device).unsqueeze(0) % 3

    def last(ids: Tensor, **options: Tensor) -> Tensor:
        logits: Tensor = base(input_ids=ids, use_cache=False, **options).logits[:, -3:]
        return logits.float()

    with torch.no_grad():
        alone = last(ids[:, 3:])
        behind = last(ids, position_ids=positions)
        seeing = last(ids, position_ids=positions, attention_mask=torch.ones_like(ids))
    return float((behind - alone).abs().max()) <= 0.05 * float((seeing - alone).abs().max())
