"""Which methods differ: paired bootstrap and McNemar's exact test on the same texts, corrected over a whole table.

Two methods are compared on the texts both answered. Texts that share an original fall together, so originals are what
is resampled, and what votes:

- the difference of the two rates, and its 95 % interval, by a bootstrap that draws originals and, where there are
  several, seeds with replacement, the same ones for both methods;
- McNemar's exact test over originals: each votes once, for the method that came off better on its texts and seeds.

The p-value of a comparison is the larger of the two, adjusted by Holm's step-down over all comparisons of a table.
What is significant then is shown; of the rest, "no difference shown", and `detectable` says what could have been.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedeat import seeding
from fedeat.evaluation.robustness import TaskPredictions, accuracy_basis
from fedeat.evaluation.statistics import mcnemar

Measure: TypeAlias = Literal["accuracy", "asr"]
Floats: TypeAlias = NDArray[np.float64]

LEVEL = 0.05
"""Family-wise error of a table."""

POWER = 0.8
"""With which a difference of `detectable` would have been found."""


@dataclass(frozen=True)
class Outcomes:
    """What one run did on the texts of one task: a rate is the sum of `hits` over the sum of `counted`.

    Attributes:
        texts: (N,) names of the texts; equal names over runs are the same text.
        groups: (N,) the original of each text.
        counted: (N,) 1 where the text is in the denominator, else 0.
        hits: (N,) 1 where it is in the numerator, else 0.
    """

    texts: tuple[Hashable, ...]
    groups: tuple[Hashable, ...]
    counted: tuple[int, ...]
    hits: tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """One method against another on one task.

    Attributes:
        task: whose texts.
        measure: "accuracy" (of unmodified texts) or "asr".
        first, second: the methods.
        value: rate of the first minus that of the second, a mean over seeds.
        low, high: 95 % interval of `value`, not corrected for how many comparisons there are.
        first_votes, second_votes: originals on which the first, or the second, has the higher rate.
        mcnemar: exact two-sided p-value of these votes.
        bootstrap: two-sided p-value of the paired bootstrap.
        adjusted: the larger of both after Holm's correction, 0..1.
        detectable: smallest difference these texts could have shown, with `POWER` at the first step of Holm's
            correction; an estimate from the spread of the bootstrap, 1 where they could have shown none.
        seeds: of both methods that were compared.
        originals: distinct ones.
    """

    task: str
    measure: Measure
    first: str
    second: str
    value: float
    low: float
    high: float
    first_votes: int
    second_votes: int
    mcnemar: float
    bootstrap: float
    adjusted: float
    detectable: float
    seeds: int
    originals: int

    @property
    def significant(self) -> bool:
        """Whether the difference is shown at the table's level."""
        return self.adjusted <= LEVEL

    @property
    def better(self) -> str | None:
        """The method shown to be better; None where no difference is shown."""
        if not self.significant:
            return None
        is_first = self.value > 0 if self.measure == "accuracy" else self.value < 0
        return self.first if is_first else self.second


def outcomes(predictions: TaskPredictions, measure: Measure) -> Outcomes:
    """A run's outcomes on one task, as `robustness.task_row` counts them: no answer is wrong."""
    if measure == "accuracy":
        texts, labels, answers = accuracy_basis(predictions)
        right = tuple(int(label == answer) for label, answer in zip(labels, answers, strict=True))
        return Outcomes(texts, texts, (1,) * len(texts), right)
    pairs = predictions["pairs"]
    return Outcomes(
        tuple((pair["group"], pair["index"], pair["method"]) for pair in pairs),
        tuple(pair["group"] for pair in pairs),
        tuple(int(pair["original"] == pair["label"]) for pair in pairs),
        tuple(int(pair["original"] == pair["label"] != pair["modified"]) for pair in pairs),
    )


def compare_methods(
    runs: Mapping[str, Mapping[int, Outcomes]],
    *,
    task: str,
    measure: Measure,
    seed: int = 0,
    resamples: int = 4000,
) -> list[Difference]:
    """Every method against every other on one task, not yet corrected for how many comparisons a table has.

    Args:
        runs: method -> seed -> what it did. Pairs of methods without a seed, a text, or a text counted for both in
            common are left out.
        task: named in the result.
        measure: which rate the outcomes are of.
        seed: of the bootstrap.
        resamples: bootstrap samples, > 0.
    """
    found = []
    for first, second in itertools.combinations(runs, 2):
        shared = sorted(runs[first].keys() & runs[second].keys())
        if shared:
            paired = _Paired.of([runs[first][s] for s in shared], [runs[second][s] for s in shared])
            if paired is not None:
                rng = np.random.default_rng(seeding.derive(seed, "difference", task, measure, first, second))
                found.append(_difference(paired, rng, resamples, task, measure, first, second))
    return found


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """The same with p-values adjusted over all of them, and `detectable` at the level that leaves each."""
    adjusted = holm([max(item.mcnemar, item.bootstrap) for item in differences])
    widening = _multiple(LEVEL / max(len(differences), 1)) / _multiple(LEVEL)
    return [
        replace(
            item,
            adjusted=p,
            detectable=min(
                1.0, max(item.detectable * widening, _fewest_votes(LEVEL / len(differences)) / item.originals)
            ),
        )
        for item, p in zip(differences, adjusted, strict=True)
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: below a level, they hold together with that family-wise error (Holm, 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class _Paired:
    """Two methods on the same originals: sums within each, (S seeds, G originals), and each original's vote."""

    hits: tuple[Floats, Floats]
    counted: tuple[Floats, Floats]
    votes: NDArray[np.int64]

    @classmethod
    def of(cls, first: Sequence[Outcomes], second: Sequence[Outcomes]) -> _Paired | None:
        texts = set(first[0].texts).intersection(*(run.texts for run in (*first, *second)))
        known = dict(zip(first[0].texts, first[0].groups, strict=True))
        kept = sorted(texts, key=repr)
        if not kept:
            return None
        number: dict[Hashable, int] = {}
        group = np.array([number.setdefault(known[text], len(number)) for text in kept])

        def table(runs: Sequence[Outcomes], values: str) -> NDArray[np.int64]:
            rows = [dict(zip(run.texts, getattr(run, values), strict=True)) for run in runs]
            return np.array([[row[text] for text in kept] for row in rows], dtype=np.int64)

        def summed(table: NDArray[np.int64]) -> NDArray[np.int64]:
            total = np.zeros((len(table), len(number)), dtype=np.int64)
            for row, values in zip(total, table, strict=True):
                np.add.at(row, group, values)
            return total

        hits = table(first, "hits"), table(second, "hits")
        counted = table(first, "counted"), table(second, "counted")
        if min(part.sum(1).min() for part in counted) == 0:
            return None
        both = counted[0] * counted[1]
        votes = np.sign(summed(both * (hits[0] - hits[1])).sum(0))
        return cls(
            (summed(hits[0]).astype(float), summed(hits[1]).astype(float)),
            (summed(counted[0]).astype(float), summed(counted[1]).astype(float)),
            votes,
        )


def _difference(
    paired: _Paired,
    rng: np.random.Generator,
    resamples: int,
    task: str,
    measure: Measure,
    first: str,
    second: str,
) -> Difference:
    seeds, originals = paired.hits[0].shape
    # Originals with the same outcomes are exchangeable: only how often each kind is drawn matters, and kinds are few.
    stacked = np.concatenate([*paired.hits, *paired.counted])
    kinds, sizes = np.unique(stacked, axis=1, return_counts=True)
    drawn = rng.multinomial(originals, sizes / originals, size=resamples) @ kinds.T
    parts = np.split(drawn.astype(float), 4, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        by_seed = parts[0] / parts[2] - parts[1] / parts[3]  # (resamples, S)
    weights = rng.multinomial(seeds, [1 / seeds] * seeds, size=resamples) / seeds
    samples = (by_seed * weights)[np.isfinite(by_seed).all(1)].sum(1)
    rates = [hits.sum(1) / counted.sum(1) for hits, counted in zip(paired.hits, paired.counted, strict=True)]
    votes = int((paired.votes > 0).sum()), int((paired.votes < 0).sum())
    low, high = np.quantile(samples, [LEVEL / 2, 1 - LEVEL / 2]) if len(samples) else (-1.0, 1.0)
    spread = _multiple(LEVEL) * float(samples.std()) if len(samples) else 1.0
    tail = min(int((samples <= 0).sum()), int((samples >= 0).sum()))
    return Difference(
        task=task,
        measure=measure,
        first=first,
        second=second,
        value=float(np.mean(rates[0] - rates[1])),
        low=float(low),
        high=float(high),
        first_votes=votes[0],
        second_votes=votes[1],
        mcnemar=mcnemar(*votes),
        bootstrap=min(1.0, 2 * (tail + 1) / (len(samples) + 1)),
        adjusted=1.0,
        detectable=max(spread, _fewest_votes(LEVEL) / originals),
        seeds=seeds,
        originals=originals,
    )


def _multiple(level: float) -> float:
    """How many standard errors a difference must have to be found with `POWER` at a two-sided level."""
    normal = NormalDist()
    return normal.inv_cdf(1 - level / 2) + normal.inv_cdf(POWER)


def _fewest_votes(level: float) -> int:
    """The fewest votes, all for one method, of which McNemar's test has a p-value within the level."""
    return math.ceil(1 - math.log2(level))
