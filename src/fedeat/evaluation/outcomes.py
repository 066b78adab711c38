"""What runs did text by text, and the rate they have together over seeds.

Two things vary when a method is run with several seeds: which texts were drawn, the same for every seed, and which run
was drawn. The first is seen by resampling originals (cluster bootstrap), all seeds of an original together; the second
by the spread of the seeds' own rates, of which there are few, so by Student's t. A bootstrap over seeds would not do:
of three values it draws sets that are too narrow by a third, and never one outside what was seen.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedeat import seeding
from fedeat.evaluation.robustness import TaskPredictions, accuracy_basis
from fedeat.evaluation.statistics import Interval, wilson_share

Measure: TypeAlias = Literal["accuracy", "asr"]
Floats: TypeAlias = NDArray[np.float64]


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


def rate_over_seeds(
    runs: Sequence[Outcomes], *, seed: int = 0, resamples: int = 4000, level: float = 0.95
) -> Interval | None:
    """Interval of the mean over seeds of a method's rate on one task.

    Where every original has the same rate in every run no resampling can vary; the texts' part is then Wilson's, with
    the originals that are counted as its independent trials, as in `statistics.cluster_ratio`.

    Args:
        runs: one for each seed, at least one; those that count no text have no rate and are left out.
        seed: of the bootstrap.
        resamples: bootstrap samples, > 0.
        level: coverage, 0 < level < 1.

    Returns:
        The interval, or None where no run counts a text.
    """
    counting = [run for run in runs if any(run.counted)]
    if not counting:
        return None
    number: dict[Hashable, int] = {}
    for run in counting:
        for group in run.groups:
            number.setdefault(group, len(number))
    hits, counted = (np.zeros((len(counting), len(number))) for _ in range(2))
    for row, run in enumerate(counting):
        place = [number[group] for group in run.groups]
        np.add.at(hits[row], place, run.hits)
        np.add.at(counted[row], place, run.counted)
    rates = hits.sum(1) / counted.sum(1)
    mean = float(rates.mean())
    rng = np.random.default_rng(seeding.derive(seed, "rate over seeds"))
    noise = run_noise(rates, rng, resamples)
    shares = hits[counted > 0] / counted[counted > 0]
    if np.all(shares == shares[0]):
        return wilson_share(mean, int((counted > 0).any(0).sum()), level)
    drawn = resampled_sums(np.concatenate([hits, counted]), rng, resamples)
    above, below = np.split(drawn, 2, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        samples = (above / below).mean(1) + noise
    bounds = np.quantile(samples[np.isfinite(samples)], [(1 - level) / 2, (1 + level) / 2])
    low, high = (min(max(float(bound), 0.0), 1.0) for bound in bounds)
    return Interval(min(low, mean), max(high, mean))


def resampled_sums(table: Floats, rng: np.random.Generator, resamples: int) -> Floats:
    """Sums of a table's rows over originals drawn with replacement: (R, G) -> (resamples, R).

    Originals with the same column are exchangeable: only how often each kind is drawn matters, and kinds are few.
    """
    kinds, sizes = np.unique(table, axis=1, return_counts=True)
    originals = table.shape[1]
    sums: Floats = rng.multinomial(originals, sizes / originals, size=resamples) @ kinds.T
    return sums


def run_error(values: Floats) -> float:
    """Standard error of a mean over seeds, (S,) values; 0 for one seed, which shows nothing of it."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def run_noise(values: Floats, rng: np.random.Generator, resamples: int) -> Floats:
    """How far the mean over all seeds that could be drawn may lie from that of these: Student's t, (resamples,)."""
    if len(values) < 2:
        return np.zeros(resamples)
    return run_error(values) * rng.standard_t(len(values) - 1, size=resamples)
