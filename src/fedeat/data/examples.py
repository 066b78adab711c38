"""Examples and batches as values, and instruction rows as examples.

Instruction rows become (prompt, answer) pairs (Sec. 6.1); `evaluation.tasks` makes examples of GLUE rows. Where rows
come from is in `files`, how an example becomes tokens in `encoding`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedeat.errors import DataError

Row: TypeAlias = Mapping[str, Any]


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
        away: the answer is one that the model shall not give.
    """

    prompt: str
    answer: str = ""
    pair: str | None = None
    label: int | None = None
    task: str = ""
    group: str | None = None
    away: bool = False


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example.

    Attributes:
        input_ids: at most `max_length` ids.
        perturbable: one flag a token, True where a perturbation may act.
        answer_start: index of the first supervised token; `len(input_ids)` where none is supervised.
        label: class index for sequence classification, -1 where unknown, else None.
        classes: `(start, stop)` of the classes this example may get; a head a task is a block of one head's rows.
        token_type_ids: segment ids where the tokenizer makes them, else None.
        cut: "" or what truncation took: "prompt", "answer".
        away: the supervised tokens are ones that the model shall not give.
    """

    input_ids: tuple[int, ...]
    perturbable: tuple[bool, ...]
    answer_start: int
    label: int | None = None
    classes: tuple[int, int] | None = None
    token_type_ids: tuple[int, ...] | None = None
    cut: str = ""
    away: bool = False


@dataclass(frozen=True)
class Batch:
    """Tokens of B samples padded on the right to T, and what of them is supervised.

    Attributes:
        input_ids: (B, T) int64.
        attention_mask: (B, T) int64, 1 at tokens, 0 at padding.
        perturbable: (B, T) bool, True where a perturbation may act: prompt tokens, never padding, special tokens
            or the answer.
        rows: (N,) int64, flat positions `b * T + t` whose logits are supervised, sorted; for sequence
            classification `arange(B)`, one pooled row a sample.
        targets: (N,) int64, the token or class that each supervised row must predict.
        samples: (N,) int64, the sample b in 0..B-1 that each supervised row belongs to.
        classes: (B, 2) int64 `start, stop` of the classes a sample may get (sequence classification), else None.
        token_type_ids: (B, T) int64 where the tokenizer makes them (BERT pairs), else None.
        away: (B,) bool, True at samples whose targets the model shall not give; None where there is none.
        position_ids: (1, T) int64 where all samples are packed into one row, each counted from 0; None where each is
            a row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    perturbable: Tensor
    rows: Tensor
    targets: Tensor
    samples: Tensor
    classes: Tensor | None = None
    token_type_ids: Tensor | None = None
    away: Tensor | None = None
    position_ids: Tensor | None = None

    def mean(self, losses: Tensor) -> Tensor:
        """Mean of the supervised rows' losses (N,), a scalar."""
        return losses.mean()

    def select(self, samples: Sequence[int]) -> Batch:
        """Some of the samples, in the order given, padded to the same T."""
        length = self.input_ids.shape[1] if self.classes is None else 1
        kept = [(self.samples == sample).nonzero().flatten() for sample in samples]
        at = torch.cat(kept) if kept else self.samples[:0]
        new = torch.cat([torch.full_like(found, b) for b, found in enumerate(kept)]) if kept else self.samples[:0]
        index = torch.tensor(samples, dtype=torch.long, device=self.input_ids.device)
        return Batch(
            self.input_ids[index],
            self.attention_mask[index],
            self.perturbable[index],
            self.rows[at] + (new - self.samples[at]) * length,
            self.targets[at],
            new,
            None if self.classes is None else self.classes[index],
            None if self.token_type_ids is None else self.token_type_ids[index],
            None if self.away is None else self.away[index],
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})


# The names that public instruction sets use: Alpaca, Dolly, and plain pairs. The first that is present counts.
INSTRUCTION_FIELDS = ("instruction", "prompt", "question", "query")
INPUT_FIELDS = ("input", "context")
OUTPUT_FIELDS = ("output", "response", "answer", "completion", "safe")
AWAY_FIELD = "harmful"
"""An answer beside the one to give, which the model shall not give (Xhonneux et al., 2024)."""


def instruction_examples(rows: Sequence[Row], *, source: str, column: str | None = None) -> list[Example]:
    """Instruction rows as examples: Alpaca's, Dolly's, or any with a prompt-like and an answer-like field.

    A row whose prompt or answer is blank teaches nothing and is left out; `len(rows)` less the number of results that
    are not `away` says how many were. A row with a harmful answer beside its safe one makes two examples.

    Args:
        rows: objects with one of `INSTRUCTION_FIELDS`, one of `OUTPUT_FIELDS` and perhaps one of `INPUT_FIELDS`.
        source: where the rows come from, for messages.
        column: field to keep as `Example.group`, None for none.

    Raises:
        DataError: a row lacks a field it must have, or a field is not text; names the row. Or all rows are blank.
    """
    examples = []
    for number, row in enumerate(rows, start=1):
        instruction = _text(row, INSTRUCTION_FIELDS, source, number)
        answer = _text(row, OUTPUT_FIELDS, source, number)
        inputs = [name for name in INPUT_FIELDS if given(row, name) not in (None, "")]
        extra = _text(row, inputs, source, number) if inputs else ""
        group = None if column is None else _group(row, column, source, number)
        prompt = "\n\n".join(part for part in (instruction, extra) if part.strip())
        if prompt and answer.strip():
            examples.append(Example(prompt, answer, group=group))
            harmful = _text(row, (AWAY_FIELD,), source, number) if given(row, AWAY_FIELD) is not None else ""
            if harmful.strip():
                examples.append(Example(prompt, harmful, group=group, away=True))
    if rows and not examples:
        raise DataError(f"{source}: every row has a blank prompt or a blank answer. Expected rows to learn from.")
    return examples


def given(row: Row, name: str) -> Any:
    """A row's field; None where it is missing or NaN, which is what pandas makes of a missing one."""
    value = row.get(name)
    return None if isinstance(value, float) and math.isnan(value) else value


def _text(row: Row, names: Sequence[str], source: str, number: int) -> str:
    name = next((name for name in names if given(row, name) is not None), None)
    if name is None:
        raise DataError(
            f"{source}, row {number} has none of the fields {', '.join(names)}. Expected Alpaca fields (instruction, "
            f"input, output), got {', '.join(sorted(map(str, row))) or 'no field'}. Rename the columns."
        )
    if not isinstance(row[name], str):
        raise DataError(f"{source}, row {number}: field {name!r} must be text, got {type(row[name]).__name__}.")
    return str(row[name])


def _group(row: Row, column: str, source: str, number: int) -> str:
    if given(row, column) is None:
        raise DataError(
            f"{source}, row {number} has nothing in a column {column!r} to partition by. Got the columns "
            f"{', '.join(sorted(map(str, row)))}. Set partition.by to one that every row has a value in."
        )
    return str(row[column])
