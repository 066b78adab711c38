"""Results as numbers: rows read from records, cells over seeds, and which cells may be called best.

A cell is one method on one task under one condition (attack and share of malicious clients). Over several seeds it
holds the mean, the standard deviation, and a 95 % interval of that mean (`evaluation.outcomes.rate_over_seeds`). Rows
without their predictions leave, on each side, the wider of two: the mean of the seeds' own intervals (which texts were
drawn) and the t interval of the seeds' values (which run was drawn).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from scipy.special import stdtrit

from fedeat.evaluation.outcomes import Measure
from fedeat.evaluation.statistics import Interval
from fedeat.report.values import Record, count, share

# The paper's order: the base model, then FedAvg, each ingredient alone, and both.
METHOD_NAMES = {"base": "Base model", "fedavg": "FedAvg", "eat": "EAT", "gm": "GM", "fedeat": "FedEAT"}


@dataclass(frozen=True)
class Row:
    """One method on one task, once: a line of `results.json`. Shares are in 0..1, None where undefined."""

    method: str
    attack: str
    byzantine_fraction: float
    task: str
    seed: int
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    benign: int
    asr: float | None
    asr_low: float | None
    asr_high: float | None
    pairs: int
    originals: int
    benign_correct: int
    broken: int
    accuracy_original: float | None
    accuracy_modified: float | None
    unparsable: float | None
    histogram: tuple[tuple[str, int], ...]
    flags: tuple[str, ...]
    run: str
    partition: str = ""
    backdoor: float | None = None
    backdoor_low: float | None = None
    backdoor_high: float | None = None
    backdoor_clean: float | None = None
    backdoor_texts: int = 0

    @property
    def condition(self) -> Condition:
        """The condition this row was measured under."""
        return Condition.of(self.attack, self.byzantine_fraction, self.partition)


@dataclass(frozen=True)
class Condition:
    """An attack, the share of malicious clients in 0..1, and the partition; one table and one panel each.

    The partition is "" where a page has but one.
    """

    attack: str
    fraction: float
    partition: str = ""

    @classmethod
    def of(cls, attack: str, fraction: float, partition: str = "") -> Condition:
        """The condition; no attack and no malicious clients are the same one."""
        return cls("none", 0.0, partition) if attack == "none" or not fraction else cls(attack, fraction, partition)

    @property
    def title(self) -> str:
        """Such as "Sign flip, 30 % malicious clients"."""
        where = f"; {self.partition}" if self.partition else ""
        if self.attack == "none":
            return f"No malicious clients{where}"
        return f"{attack_name(self.attack)}, {100 * self.fraction:g} % malicious clients{where}"

    @property
    def phrase(self) -> str:
        """The same within a sentence: "with 30 % malicious clients (sign flip)"."""
        if self.attack == "none":
            return "without malicious clients" + (f" ({self.partition})" if self.partition else "")
        where = f"; {self.partition}" if self.partition else ""
        return f"with {100 * self.fraction:g} % malicious clients ({attack_name(self.attack, inner=True)}{where})"

    @property
    def short(self) -> str:
        """The same as a file name part."""
        attack = "none" if self.attack == "none" else f"{self.attack}-{self.fraction:g}"
        return f"{attack}-{self.partition}" if self.partition else attack


def attack_name(attack: str, *, inner: bool = False) -> str:
    """An attack as it is written in a table, or within a sentence: "Sign flip", and the literature's capitals."""
    if attack in ("ipm", "alie"):
        return attack.upper()
    name = attack.replace("_", " ")
    return "NaN" if attack == "nan" else name if inner else f"{name[:1].upper()}{name[1:]}"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval and spread, all in 0..1; `seeds` is how many values are behind it."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None
    deviation: float | None = None
    seeds: int = 0

    def below(self, other: Estimate) -> bool:
        """Whether this interval lies wholly under the other's; False where either is unknown."""
        return self.high is not None and other.low is not None and self.high < other.low


@dataclass(frozen=True)
class Cell:
    """One method on one task under one condition, over seeds. Counts are summed over seeds."""

    accuracy: Estimate
    asr: Estimate
    benign: int
    pairs: int
    benign_correct: int
    broken: int
    flags: tuple[str, ...]


def read_rows(records: Iterable[object], *, method: str | None = None) -> tuple[list[Row], list[str]]:
    """Rows of `results.json` or `evaluation.json`, and a note on those that could not be used.

    Args:
        records: one mapping a row.
        method: the method of rows that name none; without it they cannot be used.
    """
    rows = []
    skipped = 0
    for record in records:
        if isinstance(record, Row):
            rows.append(record)
        elif isinstance(record, Mapping) and record.get("task") and (record.get("method") or method):
            rows.append(_row({"method": method, **record}))
        else:
            skipped += 1
    note = f"{skipped} result row{'s' * (skipped > 1)} without method or task left out"
    return rows, [note] if skipped else []


def display_name(method: str) -> str:
    """The method as it is written in a table."""
    return METHOD_NAMES.get(method, method)


def method_order(methods: Iterable[str]) -> list[str]:
    """Distinct methods: the base first, the paper's next, others by name, so that all tables of a page agree."""
    known = list(METHOD_NAMES)
    return sorted(set(methods), key=lambda name: (known.index(name) if name in known else len(known), name))


def conditions(rows: Sequence[Row]) -> list[Condition]:
    """Distinct conditions: no attack first, then attacks in order of appearance, each by rising fraction.

    The base model takes part in no federation, so it makes no condition of its own beside others.
    """
    found = dict.fromkeys(row.condition for row in rows if row.method != "base")
    found = found or dict.fromkeys(row.condition for row in rows)
    attacks = list(dict.fromkeys(condition.attack for condition in found))
    partitions = list(dict.fromkeys(condition.partition for condition in found))
    return sorted(
        found,
        key=lambda item: (
            partitions.index(item.partition),
            item.attack != "none",
            attacks.index(item.attack),
            item.fraction,
        ),
    )


def without_common_partition(rows: Sequence[Row]) -> list[Row]:
    """The rows, none naming its partition where all have the same."""
    several = len({row.partition for row in rows if row.method != "base"}) > 1
    return list(rows) if several else [replace(row, partition="") for row in rows]


def group(
    rows: Sequence[Row],
    condition: Condition,
    intervals: Mapping[tuple[str, str, Measure], Interval] | None = None,
) -> dict[tuple[str, str], Cell]:
    """Cells by (method, task) of one condition; the base model's rows belong to every condition.

    Args:
        rows: of all conditions.
        condition: whose cells.
        intervals: (method, task, measure) -> interval over seeds, where it is known.
    """
    gathered: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.condition == condition or row.method == "base":
            gathered.setdefault((row.method, row.task), []).append(row)
    known = intervals or {}
    return {
        key: _cell(members, known.get((*key, "accuracy")), known.get((*key, "asr")))
        for key, members in gathered.items()
    }


def best_methods(
    cells: Mapping[str, Cell], *, accuracy: Sequence[tuple[str, str]], asr: Sequence[tuple[str, str]]
) -> tuple[frozenset[str], frozenset[str]]:
    """Methods of one task whose accuracy, and whose ASR, may be printed bold.

    Bold is a method shown to be better than at least one other and not shown to be worse than any; where no two are
    shown to differ nothing is bold. The base model does not compete. A flagged method is never bold, and neither is
    an ASR whose accuracy is shown to be worse than an unflagged method's: giving one answer always, or answering at
    random, is not robustness.

    Args:
        cells: the task's, by method.
        accuracy: (better, worse) of each difference in accuracy that is shown.
        asr: the same of ASR.
    """
    sound = {method for method, cell in cells.items() if not cell.flags and method != "base"}
    able = sound - {worse for better, worse in accuracy if better in sound}
    return _leaders(sound, accuracy), _leaders(able, [pair for pair in asr if pair[0] in able and pair[1] in able])


def estimate(
    values: Sequence[tuple[float | None, float | None, float | None]], pooled: Interval | None = None
) -> Estimate:
    """Mean over seeds of (value, low, high); seeds whose value is None are left out of the mean.

    Args:
        values: one for each seed.
        pooled: the interval over several seeds, where it is known; it stands in place of one made of theirs.
    """
    known = [(value, low, high) for value, low, high in values if value is not None]
    if not known:
        return Estimate()
    seeds = len(known)
    mean = math.fsum(value for value, _, _ in known) / seeds
    lows = [low for _, low, _ in known if low is not None]
    highs = [high for _, _, high in known if high is not None]
    low = math.fsum(lows) / seeds if len(lows) == seeds else None
    high = math.fsum(highs) / seeds if len(highs) == seeds else None
    if seeds == 1:
        return Estimate(mean, low, high, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value, _, _ in known) / (seeds - 1))
    if pooled is not None:
        return Estimate(mean, min(pooled.low, mean), max(pooled.high, mean), deviation, seeds)
    reach = float(stdtrit(seeds - 1, 0.975)) * deviation / math.sqrt(seeds)
    low = max(min(mean - reach, mean if low is None else low), 0.0)
    high = min(max(mean + reach, mean if high is None else high), 1.0)
    return Estimate(mean, low, high, deviation, seeds)


def _leaders(candidates: Collection[str], shown: Sequence[tuple[str, str]]) -> frozenset[str]:
    better = {winner for winner, _ in shown}
    worse = {loser for winner, loser in shown if winner in candidates}
    return frozenset(method for method in candidates if method in better and method not in worse)


def _cell(rows: Sequence[Row], accuracy: Interval | None = None, asr: Interval | None = None) -> Cell:
    return Cell(
        accuracy=estimate([(row.accuracy, row.accuracy_low, row.accuracy_high) for row in rows], accuracy),
        asr=estimate([(row.asr, row.asr_low, row.asr_high) for row in rows], asr),
        benign=sum(row.benign for row in rows),
        pairs=sum(row.pairs for row in rows),
        benign_correct=sum(row.benign_correct for row in rows),
        broken=sum(row.broken for row in rows),
        flags=_flags(rows),
    )


def _flags(rows: Sequence[Row]) -> tuple[str, ...]:
    """A cell's flags: those of its run, or of several what was flagged and in how many."""
    if len(rows) == 1:
        return rows[0].flags
    kinds = Counter(kind for row in rows for kind in {flag.partition(":")[0] for flag in row.flags})
    return tuple(f"{kind} in {count} of {len(rows)} seeds" for kind, count in sorted(kinds.items()))


def _row(record: Record) -> Row:
    histogram = record.get("histogram")
    counted = histogram.items() if isinstance(histogram, Mapping) else ()
    flags = record.get("flags")
    return Row(
        method=str(record["method"]),
        attack=str(record.get("attack") or "none"),
        byzantine_fraction=share(record.get("byzantine_fraction")) or 0.0,
        task=str(record["task"]),
        seed=count(record.get("seed")),
        accuracy=share(record.get("accuracy")),
        accuracy_low=share(record.get("accuracy_low")),
        accuracy_high=share(record.get("accuracy_high")),
        benign=count(record.get("benign")),
        asr=share(record.get("asr")),
        asr_low=share(record.get("asr_low")),
        asr_high=share(record.get("asr_high")),
        pairs=count(record.get("pairs")),
        originals=count(record.get("originals")),
        benign_correct=count(record.get("benign_correct")),
        broken=count(record.get("broken")),
        accuracy_original=share(record.get("accuracy_original")),
        accuracy_modified=share(record.get("accuracy_modified")),
        unparsable=share(record.get("unparsable")),
        histogram=tuple((str(name), count(value)) for name, value in counted),
        flags=tuple(str(flag) for flag in flags) if isinstance(flags, list | tuple) else (),
        run=str(record.get("run") or ""),
        partition=str(record.get("partition") or ""),
        backdoor=share(record.get("backdoor")),
        backdoor_low=share(record.get("backdoor_low")),
        backdoor_high=share(record.get("backdoor_high")),
        backdoor_clean=share(record.get("backdoor_clean")),
        backdoor_texts=count(record.get("backdoor_texts")),
    )
