"""Which methods differ: paired bootstrap and McNemar's exact test on the same texts, corrected over a whole table.

Two methods are compared on the texts both answered. Texts that share an original fall together, so originals are what
is resampled, and what votes:

- the difference of the two rates, and its 95 % interval, by a bootstrap that draws originals with replacement, the
  same ones for both methods and all seeds, and where there are several seeds adds what these leave open (`outcomes`);
- McNemar's exact test over originals: each votes once, for the method that came off better on its texts and seeds.

The p-value of a comparison is the larger of the two, and 1 where they point opposite ways (a few originals with many
texts against many with few), adjusted by Holm's step-down over all comparisons of a table.
What is significant then is shown; of the rest, "no difference shown", and `detectable` says what could have been.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betaincinv, stdtr, stdtrit

from fedeat import seeding
from fedeat.evaluation.outcomes import Floats, Measure, Outcomes, resampled_sums, run_error, run_noise
from fedeat.evaluation.statistics import mcnemar

LEVEL = 0.05
"""Family-wise error of a table."""

POWER = 0.8
"""With which a difference of `detectable` would have been found."""


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
        adjusted: `p_value` after Holm's correction, 0..1.
        text_error, run_error: standard errors of `value`: from which originals were drawn, and from which runs.
        detectable: smallest difference these texts and seeds could have shown, with `POWER` at the first step of
            Holm's correction; an estimate from both errors, 1 where they could have shown none.
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
    text_error: float
    run_error: float
    detectable: float
    seeds: int
    originals: int

    @property
    def p_value(self) -> float:
        """The larger of both tests', 1 where they do not say the same of which rate is higher."""
        same = (self.first_votes - self.second_votes) * self.value > 0
        return max(self.mcnemar, self.bootstrap) if same else 1.0

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
    adjusted = holm([item.p_value for item in differences])
    first_step = LEVEL / max(len(differences), 1)
    return [
        replace(item, adjusted=p, detectable=_detectable(item, first_step))
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
    rates = [hits.sum(1) / counted.sum(1) for hits, counted in zip(paired.hits, paired.counted, strict=True)]
    by_seed = rates[0] - rates[1]
    parts = np.split(resampled_sums(np.concatenate([*paired.hits, *paired.counted]), rng, resamples), 4, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = (parts[0] / parts[2] - parts[1] / parts[3]).mean(1)
    samples = (drawn + run_noise(by_seed, rng, resamples))[np.isfinite(drawn)]
    votes = int((paired.votes > 0).sum()), int((paired.votes < 0).sum())
    low, high = np.quantile(samples, [LEVEL / 2, 1 - LEVEL / 2]) if len(samples) else (-1.0, 1.0)
    tail = min(int((samples <= 0).sum()), int((samples >= 0).sum()))
    found = Difference(
        task=task,
        measure=measure,
        first=first,
        second=second,
        value=float(by_seed.mean()),
        low=float(low),
        high=float(high),
        first_votes=votes[0],
        second_votes=votes[1],
        mcnemar=mcnemar(*votes),
        bootstrap=min(1.0, 2 * (tail + 1) / (len(samples) + 1)),
        adjusted=1.0,
        text_error=float(drawn[np.isfinite(drawn)].std()) if len(samples) else 1.0,
        run_error=run_error(by_seed),
        detectable=1.0,
        seeds=seeds,
        originals=originals,
    )
    return replace(found, detectable=_detectable(found, LEVEL))


def _detectable(item: Difference, level: float) -> float:
    """Smallest difference found with `POWER` at a two-sided level, by both tests.

    McNemar's needs some votes whatever else: as many originals must change, of which a difference is the expected share
    (over several seeds, as if each lost the same ones).

    The runs' part of the error is known from few seeds alone: degrees of freedom by Satterthwaite for the power, which
    lies in the middle of the distribution. The level lies in its tail, where that approximation is far too light.
    """
    variance = item.text_error**2 + item.run_error**2
    if item.run_error > 0:
        freedom = variance**2 * (item.seeds - 1) / item.run_error**4
        reach = float(stdtrit(freedom, POWER)) * math.sqrt(variance)
    else:
        reach = NormalDist().inv_cdf(POWER) * item.text_error
    votes = _fewest_votes(level)
    if votes > item.originals:
        return 1.0
    enough = float(betaincinv(votes, item.originals - votes + 1, POWER))  # the share of which that many are drawn
    return min(1.0, max(_critical(item, level) + reach, enough))


def _critical(item: Difference, level: float) -> float:
    """How far from zero a value is found at a two-sided level: the tail of what `compare_methods` draws from."""
    if item.run_error == 0:
        return NormalDist().inv_cdf(1 - level / 2) * item.text_error
    # An even grid over the normal part: a run error near zero makes a step of the tail, which Gauss' nodes would miss.
    nodes = np.linspace(-8.0, 8.0, 401)
    weights = np.exp(-(nodes**2) / 2)
    weights /= weights.sum()

    def excess(value: float) -> float:
        tails = stdtr(item.seeds - 1, (item.text_error * nodes - value) / item.run_error)
        return float(weights @ tails) - level / 2

    # Where each part alone stays within half of the tail, their sum stays within the whole.
    alone = NormalDist().inv_cdf(1 - level / 4) * item.text_error
    return float(brentq(excess, 0.0, alone + float(stdtrit(item.seeds - 1, 1 - level / 4)) * item.run_error))


def _fewest_votes(level: float) -> int:
    """The fewest votes, all for one method, of which McNemar's test has a p-value within the level."""
    return math.ceil(1 - math.log2(level))
