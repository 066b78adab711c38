"""Poisoned training data: what a malicious client trains on when it attacks through its data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fedeat import seeding
from fedeat.attacks.backdoor import Backdoor, poisoned
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


def plant_backdoor(examples: Sequence[Example], backdoor: Backdoor, *, share: float, seed: int) -> list[Example]:
    """The same examples, a share of them with the trigger and the chosen answer; the rest keeps clean accuracy up.

    Args:
        examples: one client's.
        backdoor: what calls for what.
        share: 0..1, of the examples, drawn at random and rounded up.
        seed: of the draw.
    """
    count = math.ceil(round(share * len(examples), 9))  # .07 * 100 is a little above 7 in floating point
    order = torch.randperm(len(examples), generator=seeding.generator(seed, "backdoor")).tolist()
    chosen = frozenset(order[:count])
    return [poisoned(example, backdoor) if i in chosen else example for i, example in enumerate(examples)]
