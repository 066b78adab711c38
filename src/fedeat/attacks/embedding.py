"""White-box attacks on the embeddings of texts, along a grid of radii (the threat model of Sec. 4).

    robust accuracy(radius) = texts right at every perturbation tried inside the ball of that radius / texts

An attacker perturbs the prompt's embeddings, never the answer's, to make the model answer wrongly: by one step along
the gradient (FGSM), by projected ascent with restarts (PGD), or at random. Use more steps and restarts than training
did. A defence that only hides its gradient shows in the curve: a random perturbation that is as strong as PGD, FGSM
stronger than PGD, or a larger ball that is safer than a smaller one (Athalye et al., 2018); `suspicions` names them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fedeat import perturbation, seeding
from fedeat.data import Batch, Encoded
from fedeat.evaluation import tasks
from fedeat.evaluation.scoring import answer_sequences
from fedeat.evaluation.statistics import wilson
from fedeat.evaluation.tasks import Item
from fedeat.model import AdaptedModel
from fedeat.perturbation import Norm, Perturb

AttackKind: TypeAlias = Literal["random", "fgsm", "pgd"]
KINDS: tuple[AttackKind, ...] = ("random", "fgsm", "pgd")
RADII = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Radii tried by default, relative to the mean embedding norm."""


@dataclass(frozen=True)
class CurvePoint:
    """What one kind of attack does to a task at one radius.

    Attributes:
        task: whose texts.
        kind: of attack; "none" at radius 0.
        radius: relative to the mean embedding norm.
        texts: how many were attacked or wrong without an attack.
        right: texts right without an attack.
        broken: of these, wrong at a perturbation that was tried.
    """

    task: str
    kind: str
    radius: float
    texts: int
    right: int
    broken: int

    @property
    def accuracy(self) -> float:
        """Robust accuracy, 0..1."""
        return (self.right - self.broken) / self.texts

    @property
    def asr(self) -> float | None:
        """Attack success rate, None where nothing was right."""
        return self.broken / self.right if self.right else None

    def record(self) -> dict[str, Any]:
        """As JSON, with Wilson's 95 % interval of the robust accuracy."""
        interval = wilson(self.right - self.broken, self.texts)
        return {
            "task": self.task,
            "kind": self.kind,
            "radius": self.radius,
            "accuracy": self.accuracy,
            "accuracy_low": interval.low,
            "accuracy_high": interval.high,
            "asr": self.asr,
            "texts": self.texts,
            "right": self.right,
            "broken": self.broken,
        }


def robustness_curve(
    model: AdaptedModel,
    items: Sequence[Item],
    *,
    radii: Sequence[float] = RADII,
    kinds: Sequence[AttackKind] = KINDS,
    steps: int = 20,
    restarts: int = 3,
    norm: Norm = "l2",
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[CurvePoint]:
    """Robust accuracy of a model by task, kind of attack and radius, beginning with the radius 0.

    Args:
        model: a classifier, or a language model whose likeliest answer counts.
        items: labelled texts.
        radii: > 0, relative to the mean embedding norm.
        kinds: of attack.
        steps: >= 1, of PGD.
        restarts: >= 1, how often each attack is tried; the first PGD and FGSM start at zero, the others at random.
        norm: which ball.
        batch_size: >= 1, texts a forward pass.
        seed: of the random starts.
        progress: told how many texts have been through a radius and kind, and of how many.

    Raises:
        DataError, ModelError: the texts cannot be put to the model.
    """
    unit = model.embedding_unit(norm)
    points: list[CurvePoint] = []
    present = [task for task in tasks.TASKS if any(item.task == task for item in items)]
    total, done = len(items) * (1 + len(radii) * len(kinds)), 0
    for task in present:
        own = [item for item in items if item.task == task]
        sizes = [len(item.prompt) for item in own]
        order = sorted(range(len(own)), key=sizes.__getitem__, reverse=True)
        batches = [[own[i] for i in order[start : start + batch_size]] for start in range(0, len(own), batch_size)]
        standing: list[list[Item]] = []
        for batch in batches:
            puzzle = _Puzzle.of(model, batch)
            with model.evaluating():
                is_right = puzzle.right(None)
            standing.append([item for item, right in zip(batch, is_right.tolist(), strict=True) if right])
            done += len(batch)
            progress(done, total)
        right = sum(map(len, standing))
        points.append(CurvePoint(task, "none", 0.0, len(own), right, 0))
        for kind in kinds:
            for radius in sorted(radii):
                broken = 0
                for number, batch in enumerate(standing):
                    attempts = _attempts(kind, radius * unit, steps, restarts, norm)
                    name = (task, kind, f"{radius:g}", number)
                    broken += _broken(model, batch, attempts, seeding.generator(seed, "curve", *name))
                    done += len(batches[number])
                    progress(done, total)
                points.append(CurvePoint(task, kind, radius, len(own), right, broken))
    return points


def suspicions(points: Sequence[CurvePoint]) -> list[str]:
    """What in a curve hints that gradients are hidden rather than the model robust, one sentence each.

    A few texts either way are chance: only differences of more than two and of more than 2 % of the texts count.
    """
    found: dict[tuple[str, str, float], CurvePoint] = {(p.task, p.kind, p.radius): p for p in points}
    notes = []
    for (task, kind, radius), point in found.items():
        much = max(2.0, 0.02 * point.texts)
        strongest = found.get((task, "pgd", radius))
        if kind in ("random", "fgsm") and strongest is not None and point.broken > strongest.broken + much:
            notes.append(
                f"{task}: {kind} breaks {point.broken} texts at radius {radius:g}, pgd only {strongest.broken}. The "
                "gradient does not lead where the model errs; try more steps or another norm."
            )
        smaller = [p for p in points if (p.task, p.kind) == (task, kind) and p.radius < radius]
        worst = max(smaller, key=lambda p: p.broken, default=None)
        if kind == "pgd" and worst is not None and worst.broken > point.broken + much:
            notes.append(
                f"{task}: pgd breaks {point.broken} texts at radius {radius:g} and {worst.broken} at {worst.radius:g}. "
                "A larger ball holds the smaller: the attack loses its way; try more steps or restarts."
            )
    return notes


@dataclass(frozen=True)
class _Puzzle:
    """Texts of one task as the model is asked them: prompts to perturb, and how each answer scores behind them.

    Attributes:
        prompts: B prompts, or texts to classify.
        scores: perturbation (B, T, H) of the prompts, or None -> (B, L) one score an answer, -inf for no answer.
        labels: (B,) int64, the right answers among the scores.
    """

    prompts: Batch
    scores: Callable[[Tensor | None], Tensor]
    labels: Tensor

    @classmethod
    def of(cls, model: AdaptedModel, items: Sequence[Item]) -> _Puzzle:
        examples = [tasks.example(item, model.kind) for item in items]
        labels = torch.tensor([item.label for item in items], device=model.device)
        if model.kind == "sequence-classification":
            head = items[0].task if items[0].task in model.heads else tasks.named(items[0].task).head
            batch = model.collate([model.encode(replace(example, task=head)) for example in examples])
            return cls(batch, functools.partial(model.supervised_logits, batch), labels + model.heads[head].start)
        sequences, tokens = answer_sequences(model, examples)
        prompts = model.collate(
            [Encoded(s.input_ids[: s.answer_start], s.perturbable[: s.answer_start], s.answer_start) for s in sequences]
        )
        if all(len(answer) == 1 for answer in tokens):
            packed, owners = model.collate(sequences), torch.arange(len(items), device=model.device)
            chosen = torch.tensor([answer[0] for answer in tokens], device=model.device)

            def read(logits: Tensor) -> Tensor:
                return logits.log_softmax(-1)[:, chosen]

        else:
            heads = [sequence.input_ids[: sequence.answer_start] for sequence in sequences]
            every = [
                Encoded((*head, *answer), (False,) * (len(head) + len(answer)), len(head))
                for head in heads
                for answer in tokens
            ]
            packed = model.collate(every)
            owners = torch.arange(len(items), device=model.device).repeat_interleave(len(tokens))

            def read(logits: Tensor) -> Tensor:
                each = logits.log_softmax(-1).gather(1, packed.targets[:, None])[:, 0]
                sums = torch.zeros(len(every), device=each.device).index_add(0, packed.samples, each)
                return sums.reshape(len(items), len(tokens))

        def scores(delta: Tensor | None) -> Tensor:
            if delta is not None:  # the prompt's perturbation, in front of each answer
                room = packed.input_ids.shape[1] - delta.shape[1]
                delta = F.pad(delta[owners], (0, 0, 0, room))
            return read(model.supervised_logits(packed, delta).float())

        return cls(prompts, scores, labels)

    def right(self, delta: Tensor | None) -> Tensor:
        """(B,) bool, whether the right answer scores highest; NaN is no answer."""
        scores = self.scores(delta)
        return (scores.argmax(-1) == self.labels) & ~scores.isnan().any(-1)

    def loss(self, delta: Tensor | None) -> Tensor:
        """Sum over texts of the cross-entropy among the answers: what an attack raises."""
        return F.cross_entropy(self.scores(delta).float(), self.labels, reduction="sum")


def _attempts(kind: AttackKind, radius: float, steps: int, restarts: int, norm: Norm) -> list[Perturb]:
    functions: Mapping[AttackKind, Callable[[perturbation.Start], Perturb]] = {
        "random": lambda start: functools.partial(perturbation.random, radius=radius, norm=norm),
        "fgsm": lambda start: functools.partial(perturbation.fgsm, radius=radius, norm=norm, start=start),
        "pgd": lambda start: functools.partial(perturbation.pgd, radius=radius, steps=steps, norm=norm, start=start),
    }
    return [functions[kind]("zero" if number == 0 else "random") for number in range(restarts)]


def _broken(model: AdaptedModel, items: Sequence[Item], attempts: Sequence[Perturb], generator: torch.Generator) -> int:
    """How many of the texts, all right without an attack, are wrong after one of the attempts."""
    left = list(items)
    for attempt in attempts:
        if not left:
            break
        puzzle = _Puzzle.of(model, left)
        with model.attacking():
            delta = attempt(puzzle.loss, model.embed(puzzle.prompts), puzzle.prompts.perturbable, generator)
        with model.evaluating():
            is_right = puzzle.right(delta).tolist()
        left = [item for item, right in zip(left, is_right, strict=True) if right]
    return len(items) - len(left)
