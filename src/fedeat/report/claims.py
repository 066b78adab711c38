"""What a comparison shows and what it does not: sentences made from its tests, and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from fedeat.evaluation.differences import LEVEL, POWER, Difference
from fedeat.report.cells import Condition, Row, display_name, method_order
from fedeat.report.summary import listed
from fedeat.report.tables import ResultTable, percent

_FEW_TABLES = 3
_FEW_CONDITIONS = 2
_FEW_SEEDS = 5
_REASONS = {
    "constant prediction": "a model that always answers the same is not robust",
    "no better than guessing": "a model no better than by guessing has nothing that could be moved",
    "unparsable answers": "where answers are no answers, the rest says little",
    "few originals right": "of a handful of pairs a rate is noise",
    "identical pairs": "a pair that is the same to the model on both sides cannot be broken",
}
"""What a kind of flag (`evaluation.robustness`) says against reading an attack success rate."""
_MEASURES = {"accuracy": "accuracy", "asr": "attack success rate"}


def shows(tables: Sequence[ResultTable]) -> list[str]:
    """A sentence a measure and two methods: on which tasks, and by how many points, one is shown to be better.

    A lower ASR is no gain where the method, or the one it is compared with, is shown to be less accurate than another.
    Over many tables a sentence speaks of all of them.
    """
    if len(tables) > _FEW_TABLES:
        return _shows_over(tables)
    sentences = []
    for table in tables:
        where = f", {table.condition.phrase}" if len(tables) > 1 else ""
        found: dict[tuple[str, str, str], list[Difference]] = {}
        for item in table.tested.differences:
            if item.better is not None and not _bought(table, item):
                worse = item.second if item.better == item.first else item.first
                found.setdefault((item.better, item.measure, worse), []).append(item)
        for (better, measure, worse), items in found.items():
            direction = "higher" if measure == "accuracy" else "lower"
            parts = [f"{item.task} by {percent(abs(item.value))} {_reach(item)}" for item in items]
            sentences.append(
                f"{display_name(better)} has {direction} {_MEASURES[measure]} than {display_name(worse)}{where}: "
                f"{listed(parts)}."
            )
    return sentences


def _shows_over(tables: Sequence[ResultTable]) -> list[str]:
    found: dict[tuple[str, str, str], dict[str, list[Difference]]] = {}
    for table in tables:
        for item in table.tested.differences:
            if item.better is not None and not _bought(table, item):
                worse = item.second if item.better == item.first else item.first
                places = found.setdefault((item.better, item.measure, worse), {})
                places.setdefault(table.condition.phrase, []).append(item)
    sentences = []
    for (better, measure, worse), places in found.items():
        direction = "higher" if measure == "accuracy" else "lower"
        parts = [
            f"{phrase} on {listed([item.task for item in items])} {_span(items)}" for phrase, items in places.items()
        ]
        sentences.append(
            f"{display_name(better)} has {direction} {_MEASURES[measure]} than {display_name(worse)} in "
            f"{len(places)} of {len(tables)} tables: {'; '.join(parts)}."
        )
    return sentences


def losses(costs: Sequence[tuple[Condition, str, Difference]]) -> list[str]:
    """Under which conditions, on which tasks, each method is shown to lose accuracy, and where it is not.

    A sentence a method; those that are shown to lose none share one.

    Args:
        costs: of `differences.condition_costs`.
    """
    sentences = []
    unharmed: dict[tuple[str, ...], list[str]] = {}
    for method in method_order(method for _, method, _ in costs):
        own: dict[Condition, list[Difference]] = {}
        for condition, name, item in costs:
            if name == method:
                own.setdefault(condition, []).append(item)
        parts, held = [], []
        for condition, items in own.items():
            lost = [item for item in items if item.significant and item.value < 0]
            if lost:
                where = "every task" if 1 < len(items) == len(lost) else listed([item.task for item in lost])
                parts.append(f"{condition.phrase} on {where} {_span(lost)}")
            else:
                held.append(condition.phrase)
        if not parts:
            unharmed.setdefault(tuple(held), []).append(display_name(method))
            continue
        words = f"loses accuracy {'; '.join(parts)}"
        if held:
            words += f", and is not shown to lose accuracy {_conditions(held, 'other ')}"
        sentences.append(f"{display_name(method)} {words}.")
    for phrases, methods in unharmed.items():
        verb = "are" if len(methods) > 1 else "is"
        sentences.append(f"{listed(methods)} {verb} not shown to lose accuracy {_conditions(phrases)}.")
    return sentences


def _conditions(phrases: Sequence[str], other: str = "") -> str:
    """Conditions by name, but of many only how many: named one by one they would bury what is shown."""
    return listed(phrases) if len(phrases) <= _FEW_CONDITIONS else f"under any of the {other}{len(phrases)} conditions"


def _span(items: Sequence[Difference]) -> str:
    """Such as "by 2.0 to 13.5 points"."""
    low, high = (percent(edge(abs(item.value) for item in items)) for edge in (min, max))
    return f"by {low} points" if low == high else f"by {low} to {high} points"


def _bought(table: ResultTable, item: Difference) -> bool:
    """Whether a difference in ASR is one between methods of which one is less accurate than an unflagged other."""
    if item.measure != "asr":
        return False
    shown = table.tested.shown(item.task, "accuracy")
    beaten = {worse for better, worse in shown if not table.cells[better, item.task].flags}
    return item.first in beaten or item.second in beaten


def shows_not(tables: Sequence[ResultTable], rows: Sequence[Row]) -> list[str]:
    """Sentences on what the tests leave open: differences too small to see, flags, seeds, and what was not measured."""
    sentences = []
    for measure, words in _MEASURES.items():
        tested = [item for table in tables for item in table.tested.differences if item.measure == measure]
        hidden = [item for item in tested if not item.significant]
        if hidden:
            of = f"{len(tested)} comparison{'s' * (len(tested) > 1)} of two methods"
            sentences.append(
                f"In {words}, {len(hidden)} of {of} show{'s' * (len(hidden) == 1)} no difference. That is not evidence "
                f"of equality: {_could_show([item.detectable for item in hidden])}."
            )
    bought = sum(item.significant and _bought(table, item) for table in tables for item in table.tested.differences)
    if bought:
        sentences.append(
            f"{bought} lower attack success rate{'s are' if bought > 1 else ' is'} not counted, because one of the two "
            "methods is shown to be less accurate than another: what answers at random cannot be moved."
        )
    if not any(table.tested.differences for table in tables):
        sentences.append("No two methods could be compared on the same texts, so no difference is shown.")
    return [*sentences, *_flagged(tables), *_seeds(tables), *_pairs(rows)]


def _could_show(smallest: Sequence[float]) -> str:
    """From which differences on the tests would have shown them, most of the time."""
    able = sorted(value for value in smallest if value < 1)
    if not able:
        return "so few texts or seeds could have shown no difference, however large"
    low, high = percent(able[0]), percent(able[-1])
    span = low if low == high else f"{low} to {high}"
    rest = len(smallest) - len(able)
    blind = f"; {rest} of the comparisons, of few texts or seeds, could have shown none" if rest else ""
    return f"these texts could have shown differences of {span} points or more ({100 * POWER:.0f} % power){blind}"


def method_note(tables: Sequence[ResultTable]) -> str:
    """How the tests were made, in one sentence; "" where there are none."""
    largest = max((len(table.tested.differences) for table in tables), default=0)
    if not largest:
        return ""
    count = f"{largest} comparison{'s' * (largest > 1)} at most"
    return (
        "Two methods are compared on the same texts by McNemar's exact test over distinct originals and by a paired "
        f"bootstrap; the larger p-value counts, 1 where the two point opposite ways, corrected by Holm over the table "
        f"({count}), at {100 * LEVEL:.0f} %. "
        "Differences are in points, with 95 % intervals that are not corrected."
    )


def _flagged(tables: Sequence[ResultTable]) -> list[str]:
    methods: dict[str, int] = {}
    kinds: set[str] = set()
    for table in tables:
        for (method, _), cell in table.cells.items():
            if cell.flags and not (method == "base" and table is not tables[0]):
                methods[method] = methods.get(method, 0) + 1
                kinds |= {reason for start, reason in _REASONS.items() if any(f.startswith(start) for f in cell.flags)}
    if not methods:
        return []
    total = sum(methods.values())
    names = listed([f"{count} of {display_name(method)}" for method, count in methods.items()])
    why = "; ".join(reason for reason in dict.fromkeys(_REASONS.values()) if reason in kinds)
    return [
        f"{total} cell{' is' if total == 1 else 's are'} flagged ({names}) and compared with nothing "
        f"in attack success{': ' if why else ''}{why}."
    ]


def _seeds(tables: Sequence[ResultTable]) -> list[str]:
    """What the seeds that two methods share let a difference say."""
    counts = {item.seeds for table in tables for item in table.tested.differences}
    if not counts:
        return []
    fewest, most = min(counts), max(counts)
    one = "the differences are between these trained models, and another training may turn them."
    if most == 1:
        return [f"One seed was run: {one}"]
    span = f"{most} seeds were run" if fewest == most else f"Two methods share {fewest} to {most} seeds"
    found = [f"{span}; a difference between methods is one over these seeds and these texts."]
    if fewest == 1:
        found.append(f"Where it is one seed, {one}")
    if fewest < _FEW_SEEDS:
        found.append(
            "So few say little of how far trainings scatter, and the tests allow for that: with more seeds much "
            "smaller differences could be shown."
        )
    return found


def _pairs(rows: Sequence[Row]) -> list[str]:
    counted = [row for row in rows if row.pairs]
    if not counted:
        return []
    correct = [row.benign_correct for row in counted if row.asr is not None]
    originals = sorted({row.originals for row in counted})
    span = f"{originals[0]}" if len(originals) == 1 else f"{originals[0]} to {originals[-1]}"
    most = (
        f"{min(correct)} to {max(correct)}" if correct and min(correct) < max(correct) else f"{max(correct, default=0)}"
    )
    right = f"{most} pairs that the model has right on the original" if correct else "no pair"
    return [
        f"Each attack success rate rests on {right}, made of {span} distinct originals a task. The modified texts are "
        "fixed ones: an attacker who adapts to the model does at least as well."
    ]


def _reach(item: Difference) -> str:
    low, high = sorted((abs(item.low), abs(item.high))) if item.low * item.high > 0 else (item.low, item.high)
    return f"[{percent(low)}, {percent(high)}]"
