"""Examples and batches.

(Reading files, prompt templates and tokenisation follow below the values.)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One training or evaluation example, before tokenisation.

    Attributes:
        prompt: what the model is shown: the whole instruction (causal-lm) or the first text (sequence-classification).
        answer: the text to be learned (causal-lm); "" for sequence-classification.
        pair: the second text of a pair (sequence-classification), else None.
        label: class index, None for free text.
        task: task name such as "sst2", or "" for free instruction data.
        group: value of the partition column ("category", "client", ...), else None.
    """

    prompt: str
    answer: str = ""
    pair: str | None = None
    label: int | None = None
    task: str = ""
    group: str | None = None


@dataclass(frozen=True)
class Batch:
    """Tokens of B samples padded to T, and what of them is supervised.

    Attributes:
        input_ids: (B, T) int64.
        attention_mask: (B, T) int64, 1 at tokens, 0 at padding.
        perturbable: (B, T) bool, True where a perturbation may act: prompt tokens, never padding, special tokens
            or the answer.
        rows: (N,) int64, flat positions `b * T + t` whose logits are supervised, sorted; for sequence
            classification `arange(B)`, one pooled row a sample.
        targets: (N,) int64, the token or class that each supervised row must predict.
        samples: (N,) int64, the sample b in 0..B-1 that each supervised row belongs to.
        token_type_ids: (B, T) int64 where the tokenizer makes them (BERT pairs), else None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    perturbable: Tensor
    rows: Tensor
    targets: Tensor
    samples: Tensor
    token_type_ids: Tensor | None = None
