"""Which radius suits a model: its losses and accuracies along a grid of radii (the paper's open limitation, Sec. 8).

A radius that trains well raises the loss and leaves something to learn. The one recommended is the largest of the
grid at which the attack takes away at most half of what the model can do on clean inputs: half of its accuracy above
chance on classes or answer tokens, the token that closes an answer left out. It is a rule of thumb that a validation
run should confirm, and it speaks of the model as it is: calibrate the model that will be attacked, with an adapter
where there is one.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fedeat import seeding
from fedeat.data import Batch, Encoded
from fedeat.errors import DataError
from fedeat.model import AdaptedModel
from fedeat.objective import sample_sum
from fedeat.perturbation import Norm, Perturb, pgd, random

GRID = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
"""Radii tried by default, relative to the mean embedding norm."""


@dataclass(frozen=True)
class Point:
    """What one radius does.

    Attributes:
        radius: relative to the mean embedding norm.
        clean_loss: mean cross-entropy a sample without a perturbation.
        adversarial_loss: the same at the perturbation that PGD finds.
        random_loss: the same at a random perturbation of that length; an attack that is no stronger is broken.
        accuracy: share of classes or answer tokens that the model gets right without a perturbation.
        adversarial_accuracy: the same at the perturbation that PGD finds.
    """

    radius: float
    clean_loss: float
    adversarial_loss: float
    random_loss: float
    accuracy: float
    adversarial_accuracy: float


@dataclass(frozen=True)
class Calibration:
    """The points of a grid and the radius it recommends.

    Attributes:
        points: one a radius, in rising order.
        chance: accuracy of the most frequent target: of each task's, and behind what an answer of a task has said so
            far, or of all tokens of free text.
        recommended: a radius of the grid, None where even the smallest takes too much.
        examples: how many were used.
    """

    points: tuple[Point, ...]
    chance: float
    recommended: float | None
    examples: int

    def record(self) -> dict[str, object]:
        """As JSON."""
        return asdict(self)


def calibrate(
    model: AdaptedModel,
    encoded: Sequence[Encoded],
    *,
    tasks: Sequence[str] = (),
    radii: Sequence[float] = GRID,
    steps: int = 10,
    norm: Norm = "l2",
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Calibration:
    """Attacks a model at every radius of a grid.

    Args:
        model: with its adapter, where it has one.
        encoded: labelled or answered examples; none that the model is to move away from.
        tasks: the task of each example, "" for free text; () takes all of them for free text.
        radii: > 0, relative.
        steps: >= 1, of PGD; more than training uses, so that a weak attack does not pass for a robust model.
        norm: which ball.
        batch_size: >= 1, examples a forward pass.
        seed: of the random perturbations.
        progress: told batches done, and of how many.

    Raises:
        DataError: no example has an answer or a label to be right about.
    """
    unit = model.embedding_unit(norm)
    closing = model.tokenizer.eos_token_id if model.kind == "causal-lm" else None
    chance = _chance(encoded, tasks or [""] * len(encoded), closing)
    order = sorted(encoded, key=lambda item: len(item.input_ids))
    batches = [model.collate(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    total = len(batches) * (1 + len(radii))
    clean = _Tally(closing)
    for done, batch in enumerate(batches, start=1):
        clean.add(model, batch, None)
        progress("calibrate", done, total)
    points = []
    for index, radius in enumerate(sorted(radii)):
        attack: Perturb = functools.partial(pgd, radius=radius * unit, steps=steps, norm=norm)
        noise: Perturb = functools.partial(random, radius=radius * unit, norm=norm)
        attacked, random_ = _Tally(closing), _Tally(closing)
        for number, batch in enumerate(batches):
            generator = seeding.generator(seed, "calibration", index, number)
            attacked.add(model, batch, _find(model, batch, attack, generator))
            random_.add(model, batch, _find(model, batch, noise, generator))
            progress("calibrate", len(batches) * (1 + index) + number + 1, total)
        points.append(Point(radius, clean.loss, attacked.loss, random_.loss, clean.accuracy, attacked.accuracy))
    return Calibration(tuple(points), chance, recommend(points, chance=chance), len(encoded))


def recommend(points: Sequence[Point], *, chance: float) -> float | None:
    """The largest radius up to which the attack leaves at least half of the accuracy above chance.

    Args:
        points: in rising order of radius.
        chance: 0..1, accuracy that needs no input.

    Returns:
        A radius of the points; None where even the smallest takes more, or the model is no better than chance.
    """
    best = None
    for point in points:
        if point.accuracy <= chance or point.adversarial_accuracy < (chance + point.accuracy) / 2:
            break
        best = point.radius
    return best


def _chance(encoded: Sequence[Encoded], tasks: Sequence[str], closing: int | None) -> float:
    """Accuracy of one who knows the task and what of its answer was said, but not the text; see `Calibration`.

    Raises:
        DataError: there is nothing to be right about.
    """
    seen: dict[Hashable, Counter[int]] = defaultdict(Counter)
    for item, task in zip(encoded, tasks, strict=True):
        if item.label is not None:
            seen[task, item.classes][item.label] += 1
            continue
        answer = item.input_ids[item.answer_start :]
        for place, token in enumerate(answer):
            if token != closing:
                seen[task, answer[:place] if task else ()][token] += 1
    if not seen:
        raise DataError("nothing to calibrate on: no example has an answer. Give training data with answers.")
    return sum(max(counts.values()) for counts in seen.values()) / sum(counts.total() for counts in seen.values())


class _Tally:
    """Sums of losses a sample and of right rows, those of the closing token left out: a constant gets them right."""

    def __init__(self, closing: int | None) -> None:
        self._closing = closing
        self._loss = 0.0
        self._samples = self._right = self._rows = 0

    def add(self, model: AdaptedModel, batch: Batch, delta: Tensor | None) -> None:
        with model.evaluating():
            logits = model.supervised_logits(batch, delta)
        self._loss += float(sample_sum(logits, batch.targets, batch.samples))
        self._samples += len(batch.input_ids)
        right = logits.argmax(-1) == batch.targets
        if self._closing is not None:
            right = right[batch.targets != self._closing]
        self._right += int(right.sum())
        self._rows += len(right)

    @property
    def loss(self) -> float:
        return self._loss / self._samples

    @property
    def accuracy(self) -> float:
        return self._right / self._rows


def _find(model: AdaptedModel, batch: Batch, perturb: Perturb, generator: torch.Generator) -> Tensor:
    with model.attacking():
        return perturb(
            lambda delta: sample_sum(model.supervised_logits(batch, delta), batch.targets, batch.samples),
            model.embed(batch),
            batch.perturbable,
            generator,
        )
