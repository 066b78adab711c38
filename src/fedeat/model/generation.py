"""Greedy continuations of prompts of different lengths, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers


def greedy(base: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[str]:
    """Continuations without special tokens, one a prompt.

    Args:
        base: a causal language model.
        tokenizer: its tokenizer.
        prompts: token ids.
        max_new_tokens: >= 1.
    """
    if not prompts:
        return []
    device = base.get_input_embeddings().weight.device
    length = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (length - len(item)) + list(item) for item in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(item)) + [1] * len(item) for item in prompts], device=device)
    settings = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=endings(base, tokenizer) or None,
        bos_token_id=tokenizer.bos_token_id,
    )
    output = base.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    return list(tokenizer.batch_decode(output[:, length:], skip_special_tokens=True))


def endings(base: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a generation: the tokenizer's, which training teaches, and the base model's own."""
    own = getattr(base.generation_config, "eos_token_id", None)
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})
