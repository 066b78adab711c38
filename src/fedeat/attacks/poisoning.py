"""Poisoned training data: what a malicious client trains on when it attacks through its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fedeat import seeding
from fedeat.data import Example


def flip_labels(examples: Sequence[Example], *, answers: Mapping[str, Sequence[str]], seed: int) -> list[Example]:
    """The same prompts with wrong answers (label flip; Biggio et al., 2012).

    Args:
        examples: one client's; those of a task get another of its labels, free text gets the answer of the next
            example that has another one, or "not" before its own where there is none.
        answers: task -> the answer word of each label.
        seed: which wrong label, where there are several.
    """
    generator = seeding.generator(seed, "label-flip")
    flipped = []
    for index, example in enumerate(examples):
        if example.label is None:
            others = (examples[(index + k) % len(examples)].answer for k in range(1, len(examples)))
            wrong = next((answer for answer in others if answer != example.answer), f"not {example.answer}")
            flipped.append(replace(example, answer=wrong))
            continue
        words = answers[example.task]
        shift = 1 + int(torch.randint(len(words) - 1, (), generator=generator))
        label = (example.label + shift) % len(words)
        flipped.append(replace(example, label=label, answer=words[label] if example.answer else ""))
    return flipped
