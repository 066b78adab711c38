"""Which figures a page shows: panels by condition and run, with their captions.

`everyone` is all methods of a page in their order: each looks the same in all its figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedeat.evaluation.outcomes import Measure
from fedeat.report.canvas import Canvas, Panel
from fedeat.report.cells import attack_name, display_name
from fedeat.report.figures import accuracy_figure, asr_figure, conditions_figure, folded
from fedeat.report.reading import Run
from fedeat.report.round_figures import (
    accuracies,
    all_clients,
    curves_figure,
    losses,
    malicious_clients,
    mean_accuracy,
    partition_figure,
    rejections,
    weight_bounds,
    weights_figure,
)
from fedeat.report.tables import FEW, FLAG, ResultTable, by_task
from fedeat.report.trade_offs import curve_points, mean_curves, method_curves_figure, scatter_figure

# A page of many conditions and seeds stays at two or three MB; the rest is in the figures folder.
_SHOWN_HEATMAPS = 16
_SHOWN_PARTITIONS = 4
_SHOWN_SCATTERS = 12


def result_figures(tables: Sequence[ResultTable], canvas: Canvas, everyone: Sequence[str]) -> list[dict[str, Any]]:
    """Accuracy and ASR: a panel a condition, or where there are many conditions a panel a task."""
    if not tables:
        return []
    draw = _by_condition if len(tables) <= FEW else _by_task
    return [
        draw(tables, canvas, everyone, "accuracy", "Accuracy on unmodified texts"),
        draw(tables, canvas, everyone, "asr", "Attack success rate"),
    ]


def _by_condition(
    tables: Sequence[ResultTable], canvas: Canvas, everyone: Sequence[str], measure: Measure, words: str
) -> dict[str, Any]:
    draw = accuracy_figure if measure == "accuracy" else asr_figure
    panels = [
        canvas.panel(
            draw(item, everyone), f"{measure}-{item.condition.short}", f"{words} by method, {item.condition.title}"
        )
        for item in tables
    ]
    hatched = any(result.footnotes for result in tables)
    extra = f" Hatched bars with {FLAG} are flagged and show no robustness." if hatched else ""
    where = "table of the same title" if len(tables) > 1 else "table"
    text = f"{words} by task and method, with 95 % intervals; the counts stand in the {where}.{extra}"
    return _figure(text, panels)


def _by_task(
    tables: Sequence[ResultTable], canvas: Canvas, everyone: Sequence[str], measure: Measure, words: str
) -> dict[str, Any]:
    panels = [
        canvas.panel(
            conditions_figure(tables, task, measure, everyone),
            f"{measure}-{task}",
            f"{words} by condition and method on {task}",
        )
        for task in by_task(tables)
    ]
    hollow = any(result.footnotes for result in tables)
    extra = f" Hollow marks are flagged ({FLAG}) and show no robustness." if hollow else ""
    return _figure(f"{words} under each condition by method, with 95 % intervals.{extra}", panels)


def scatter_figures(tables: Sequence[ResultTable], canvas: Canvas, everyone: Sequence[str]) -> list[dict[str, Any]]:
    """Accuracy against ASR, a panel a condition and task, of the tables that have two methods to compare."""
    drawn = [
        (scatter_figure(table, task, everyone), f"trade-off-{table.condition.short}-{task}", table, task)
        for table in tables
        for task in table.tasks
        if sum(table.cells[key].asr.mean is not None for key in table.cells if key[1] == task) > 1
    ]
    panels = [
        canvas.panel(figure, name, f"Accuracy against attack success rate by method on {task}, {table.condition.title}")
        for figure, name, table, task in drawn[:_SHOWN_SCATTERS]
    ]
    for figure, name, _, _ in drawn[_SHOWN_SCATTERS:]:
        canvas.picture(figure, canvas.unique(name))
    if not panels:
        return []
    text = (
        "Accuracy against attack success rate, with both 95 % intervals; further up and left is better. Counts, and "
        f"whether two methods differ on the same texts, stand in the tables. Hollow marks with {FLAG} are flagged."
    )
    more = len(drawn) - len(panels)
    return [_figure(text + (f" {more} more panels are in the figures folder." if more else ""), panels)]


def robustness_figures(runs: Sequence[Run], canvas: Canvas, everyone: Sequence[str]) -> list[dict[str, Any]]:
    """Robust accuracy under PGD along the radius: a panel a condition and task, a line a method, a mean over seeds.

    The base model took part in no federation and stands in every panel.
    """
    drawn = [run for run in runs if curve_points(run)]
    if not drawn:
        return []
    panels = []
    trained = [run for run in drawn if run.method != "base"] or drawn
    for condition in dict.fromkeys(run.condition for run in trained):
        members = [run for run in drawn if run.condition == condition or run.method == "base"]
        for task in dict.fromkeys(point["task"] for run in members for point in curve_points(run)):
            curves = mean_curves(members, task)
            where = f"{task}; {condition.title}" if len({run.condition for run in trained}) > 1 else task
            figure = method_curves_figure(curves, folded(where), everyone)
            alt = f"Robust accuracy along the radius by method on {task}, {condition.title}"
            panels.append(canvas.panel(figure, f"robustness-{condition.short}-{task}", alt))
    settings = dict.fromkeys((run.curve.get("steps"), run.curve.get("restarts")) for run in drawn)
    how = " or ".join(f"{steps} steps, starts: {restarts}" for steps, restarts in settings)
    suspect = sum(bool(run.curve.get("suspicions")) for run in drawn)
    counts = sorted({int(n) for run in drawn for point in curve_points(run) if (n := point["texts"]) is not None})
    n = f" of {'-'.join(dict.fromkeys(map(str, (counts[0], counts[-1]))))} texts a task" if counts else ""
    text = f"Robust accuracy{n} under PGD on the embeddings ({how}) along the relative radius, with 95 % bands."
    if suspect:
        text += (
            f" In {suspect} of {len(drawn)} runs the curve hints at a hidden gradient: a weaker attack breaks clearly "
            "more than PGD, or a larger radius clearly less. Their robustness is not shown."
        )
    else:
        text += " In no run did a random perturbation or a single step break clearly more, or a larger radius less."
    return [_figure(text, panels)]


def round_figures(runs: Sequence[Run], canvas: Canvas, everyone: Sequence[str]) -> list[dict[str, Any]]:
    figures = []
    for name, label, words, values in (
        ("loss", "Mean client loss", "Mean training loss of the round's clients, all counted alike", losses),
        ("accuracy-per-round", "Accuracy (%)", "Accuracy during training, a mean over tasks", mean_accuracy),
    ):
        panels = []
        for condition in dict.fromkeys(run.condition for run in runs):
            series: dict[str, list[Mapping[int, float]]] = {}
            members = [run for run in runs if run.condition == condition]
            for run in members:
                found = values(run)
                if found:
                    series.setdefault(run.method, []).append(found)
            by_tasks = len(runs) == 1 and values is mean_accuracy
            if by_tasks:
                series = {task: [found] for task, found in accuracies(runs[0]).items()}
            if series:
                figure = curves_figure(series, condition.title, label, () if by_tasks else everyone)
                panels.append(canvas.panel(figure, f"{name}-{condition.short}", f"{words}, {condition.title}"))
        if panels:
            banded = any(run.seed != runs[0].seed for run in runs)
            band = " Lines are means over seeds; bands reach from the lowest to the highest seed." if banded else ""
            if len(runs) == 1 and values is mean_accuracy:
                words = "Accuracy during training, by task"
            figures.append(_figure(f"{words}, by round.{band}", panels))
    return figures


def weight_figures(runs: Sequence[Run], canvas: Canvas) -> list[dict[str, Any]]:
    drawn = [run for run in runs if run.rounds and all_clients(run)]
    first_seed = [run for run in drawn if run.seed == drawn[0].seed]
    shown = first_seed[:_SHOWN_HEATMAPS]
    bounds = weight_bounds(drawn)
    panels = []
    for run in [*shown, *(run for run in drawn if run not in shown)]:
        condition = run.condition
        several = "" if run.seed is None or len(first_seed) == len(drawn) else f", seed {run.seed}"
        share = f"{attack_name(condition.attack)} {100 * condition.fraction:g} %"
        where = "no attack" if condition.attack == "none" else share
        where += f", {condition.partition}" if condition.partition else ""
        figure = weights_figure(run, f"{display_name(run.method)}, {where}{several}", bounds)
        name = f"weights-{run.name}"
        if run in shown:
            panels.append(canvas.panel(figure, name, f"Client weights by round, {run.name}"))
        else:
            canvas.picture(figure, canvas.unique(name))
    if not panels:
        return []
    more = len(drawn) - len(shown)
    sentences = ["How much each client's update counted, by round; a blank cell is a client that was not sampled."]
    if any(malicious_clients(run) for run in shown):
        sentences.append("A framed column with a coloured number is a malicious client.")
    if any(rejections(line) for run in shown for line in run.rounds):
        sentences.append("A cross is a rejected update.")
    if len(panels) > 1:
        sentences.append("All panels share one scale.")
    if bounds[1]:
        sentences.append("Colours follow the square root of the weight, so that small weights can be told apart.")
    if more:
        sentences.append(f"{more} more run{'s are' if more > 1 else ' is'} in the figures folder.")
    return [_figure(" ".join(sentences), panels, small=True)]


def partition_figures(runs: Sequence[Run], canvas: Canvas) -> list[dict[str, Any]]:
    distinct: dict[str, list[Run]] = {}
    for run in runs:
        if any(sum(counts.values()) for counts in run.partition.values()):
            distinct.setdefault(repr(run.partition), []).append(run)
    panels = []
    drawn = [run for members in distinct.values() for run in members]
    for members in _one_of_each(list(distinct.values()))[:_SHOWN_PARTITIONS]:
        first = members[0]
        malicious = {tuple(malicious_clients(run)) for run in members if malicious_clients(run)}
        several = len({run.seed for run in drawn}) > 1
        where = [first.condition.partition, f"seed {first.seed}" if several else ""]
        title = folded(", ".join(["Training data by client", *filter(None, where)]), 52)
        figure = partition_figure(first.partition, title, next(iter(malicious)) if len(malicious) == 1 else ())
        panels.append(canvas.panel(figure, f"partition-{first.name}", "Examples each client holds, by label"))
    if not panels:
        return []
    more = len(distinct) - len(panels)
    text = "Who holds which data: training examples of each client, by label."
    if any(malicious_clients(run) for run in runs):
        text += " Coloured client numbers are malicious in the runs with an attack."
    reasons = {"blank": "without a prompt or an answer", "excluded": "excluded by the configuration"}
    for reason, count in drawn[0].left_out.items():
        text += f" {count} rows of the data were left out: {reasons.get(reason, reason)}."
    return [_figure(text + (f" {more} more partitions are not shown." if more else ""), panels)]


def _one_of_each(groups: Sequence[list[Run]]) -> list[list[Run]]:
    """The groups of runs with one of each partition first, further seeds after."""
    names = [members[0].condition.partition for members in groups]
    return [groups[i] for i in sorted(range(len(groups)), key=lambda i: names[:i].count(names[i]))]


def _figure(caption: str, panels: Sequence[Panel], *, small: bool = False) -> dict[str, Any]:
    return {"caption": caption, "panels": panels, "small": small}
