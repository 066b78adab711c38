"""The page of a study of `advglue`: tables, tests and how they were made, from the records of its runs alone.

Every figure is one of `fedeat.evaluation` and `fedeat.report`. What a person wrote under "Reading" stays when a page is
made again.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import advglue_records
import advglue_seeds
import advglue_spread

from fedeat.records import write_text
from fedeat.report import markdown
from fedeat.report.cells import Row, attack_name, display_name, method_order
from fedeat.report.claims import losses
from fedeat.report.differences import compare_runs, condition_costs
from fedeat.report.reading import Records, Run, merge, read_records
from fedeat.report.round_figures import malicious_clients
from fedeat.report.tables import FEW, ResultTable, percent, result_tables, table_csv

TASKS = ("sst2", "qqp", "qnli", "mnli")
METHODS = ("fedavg", "eat", "gm", "fedeat")
ATTACKS = ("sign_flip", "gaussian", "label_flip", "ipm", "alie", "mimic", "min_max", "adaptive", "backdoor")
BASELINE = {"sst2": 0.86, "qqp": 0.78, "qnli": 0.78, "mnli": 0.65}
"""Benign accuracy that makes an attack-free FedAvg of a task's own federation a credible baseline."""
READING = "## Reading\n"

_CLASSIFIER = (
    "MiniLM-L6 with a LoRA adapter and federated heads ([configurations](../../configs/real)). The encoder was tuned "
    "before, in one place, on a public part of the GLUE train files ({public} rows), as the paper federates models "
    "that were instruction-tuned before. The clients hold other train rows, of sst2 those of ten words and more, and "
    "start from fresh heads; nothing trains on a dev file. The encoder's own heads, thrown away, were right on {own} "
    "of {held_out} train rows of each task held out."
)
_LANGUAGE_MODEL = (
    "A Llama of {parameters:.1f} million parameters ([its training](../../scripts/train_base_model.py), {steps} "
    "steps) with a LoRA adapter, asked in TrustLLM's wording and scored by likelihood "
    "([configurations](../../configs/real)). The base has seen the first half of each GLUE train file and free "
    "instructions; the clients hold second halves; nothing trains on a dev file. The base alone was right on {own} "
    "of test rows."
)
TITLES = {
    "advglue": ("Four methods on GLUE and AdvGLUE", "One federation a task: 10 clients, Dirichlet(0.5) by label."),
    "ablation": (
        "The ablation, without malicious clients",
        "One federation a task: 10 clients, Dirichlet(0.5) by label.",
    ),
    "attacks": (
        "Every attack, 30 % malicious clients",
        "One federation a task: 10 clients, Dirichlet(0.5) by label, three of them malicious where there is an attack. "
        "gm-nnm and fedeat-nnm, where they stand, are no methods of the paper: gm and fedeat whose updates were each "
        "averaged with their nearest before the median ([nearest-neighbour mixing](../aggregation.md)).",
    ),
    "heterogeneity": (
        "Even data against label and task skew",
        "One federation of all four tasks: 12 clients, no attack. Skew by label draws each task's labels over the "
        "clients by Dirichlet(0.5), which skews tasks too; with one task a client, three clients share each.",
    ),
    "language-model": (
        "The ablation on a causal language model",
        "One federation a task: 10 clients, Dirichlet(0.5) by label, no attack.",
    ),
}


def write(
    study: str,
    directories: Sequence[Path],
    out: Path,
    page: Path,
    attacks: Sequence[str] | None,
    places: Mapping[Path, str],
) -> Path:
    """Writes a page, and beside it .csv, .json and the records, from the finished runs of the directories.

    Args:
        study: its name.
        directories: of its comparisons, finished or not.
        out: holds the base's record.
        page: its path, which ends in .md; made with its folder. One that has not the study's name is of a part of it.
        attacks: the study's conditions are those with these attacks; None for its own.
        places: directory -> what it is called in the records.

    Returns:
        The path of the page.
    """
    parts = [_of_study(study, read_records(path), attacks) for path in directories]
    records = merge(parts) if parts else None
    if records is None or not any(run.rows for run in records.runs):
        sys.exit(f"{out} holds no finished run of this study.")
    tables = result_tables(records.rows, compare_runs(records.rows, records.runs))
    page.parent.mkdir(parents=True, exist_ok=True)
    base = json.loads((out / "base" / _base_record(study)).read_text())
    # The command of the process that trained is a detail of the machine; the page has the one to type.
    environment = {key: value for key, value in records.environment.items() if key != "command"}
    rows = [{**asdict(row), "histogram": dict(row.histogram)} for row in records.rows]
    content = {
        "environment": environment,
        "base": base,
        "seconds": {run.name: seconds_of(run) for run in records.runs if run.rows},
        "rows": rows,
        "differences": [
            {"condition": table.condition.short, **asdict(item)}
            for table in tables
            for item in table.tested.differences
        ],
    }
    page.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    page.with_suffix(".csv").write_text(table_csv(tables), encoding="utf-8")
    runs = [
        path / "runs" / run.name
        for path, part in zip(directories, parts, strict=True)
        for run in (*part.runs, *part.base)
        if run.rows
    ]
    beside = [out / "base" / _base_record(study), *(path / "environment.json" for path in directories)]
    advglue_records.pack(page.with_suffix(advglue_records.ENDING), out, runs, beside, places)
    before = page.read_text(encoding="utf-8").partition(READING) if page.is_file() else ("", READING, "")
    # In one step: what a person wrote under "Reading" is nowhere else.
    write_text(page, _page(study, page.stem, records, tables, base) + READING + before[2])
    return page


def _of_study(study: str, records: Records, attacks: Sequence[str] | None) -> Records:
    """The records without the conditions and methods of other studies that share the directories."""
    own = {"ablation": ["none"], "advglue": ["none", "sign_flip"]}.get(study)
    wanted = own if attacks is None else ["none", *attacks]

    def belongs(of: Row | Run) -> bool:
        return (wanted is None or of.condition.attack in wanted) and (
            study == "attacks" or of.method in (*METHODS, "base")
        )

    return replace(records, rows=tuple(filter(belongs, records.rows)), runs=tuple(filter(belongs, records.runs)))


def _page(study: str, name: str, records: Records, tables: Sequence[ResultTable], base: Mapping[str, Any]) -> str:
    title, setting = TITLES[study]
    if name != study:
        met = {run.condition.attack for run in records.runs}
        title = title.replace("Every attack", ", ".join(attack_name(attack) for attack in ATTACKS if attack in met))
    several = len(tables) > FEW
    parts = [
        f"# {title}",
        markdown.paragraph(f"{setting} {_about_base(study, base)}"),
        markdown.paragraph(
            "Accuracy: GLUE dev rows, a fixed random sample of at most 400 where a task has more than a thousand; for "
            "mnli-mm the distinct AdvGLUE originals. ASR: AdvGLUE pairs wrong on the modified text over those right on "
            "the original, counts summed over seeds; all pairs of the AdvGLUE dev set that have an original. All in "
            "percent, a mean over seeds with its 95 % interval ([how](../evaluation.md)). Bold is what is shown to be "
            "better than another method and not shown to be worse than any; † is flagged, and never a win."
        ),
        markdown.task_tables(tables) if several else markdown.condition_tables(tables),
    ]
    costs = condition_costs(records.rows, records.runs)
    if costs:
        against = "even data" if study == "heterogeneity" else "no attack"
        parts += [
            f"## What each costs against {against}",
            "Points of accuracy on the same texts and seeds, with 95 % intervals; bold where a difference is shown, "
            f"corrected over all {len(costs)} of them.",
            "\n".join(f"- {sentence}" for sentence in losses(costs)),
            markdown.cost_tables(costs),
        ]
    backdoors = _backdoors(records)
    if backdoors:
        parts += ["## The backdoor", backdoors]
    seeds = advglue_seeds.section(records) if study == "attacks" else ""
    if seeds:
        parts += ["## Seed by seed", seeds]
    spreads = advglue_spread.section(records) if study == "attacks" else ""
    if spreads:
        parts += ["## How far apart honest updates are", spreads]
    parts += ["## What the numbers say", markdown.findings(tables, records.rows)]
    baseline = "" if study in ("heterogeneity", "language-model") else _baseline(tables)
    if baseline:
        parts += ["### The baseline", baseline]
    parts += ["## How they were made", _commands(study, name, records), _made(study, name, records, base)]
    return "\n\n".join(parts) + "\n\n"


def _about_base(study: str, base: Mapping[str, Any]) -> str:
    if study == "language-model":
        own = ", ".join(f"{row['task']} {percent(row['accuracy'])} %" for row in base["test"])
        return _LANGUAGE_MODEL.format(parameters=base["parameters"] / 1e6, steps=base["settings"]["steps"], own=own)
    own = ", ".join(
        f"{task} {percent(value)} %" for task, value in base["held_out_accuracy_with_its_own_heads"].items()
    )
    public = ", ".join(f"{task} {count}" for task, count in base["public_rows"].items())
    return _CLASSIFIER.format(public=public, own=own, held_out=base["held_out_rows"])


def _baseline(tables: Sequence[ResultTable]) -> str:
    """Whether attack-free FedAvg is one worth beating."""
    calm = next((table for table in tables if table.condition.attack == "none"), None)
    lines = []
    for task, goal in BASELINE.items():
        cell = calm.cells.get(("fedavg", task)) if calm else None
        if cell is not None and cell.accuracy.mean is not None:
            reached = "reaches" if cell.accuracy.mean >= goal else "misses"
            lines.append(f"- {task}: attack-free FedAvg {reached} {percent(goal)} with {percent(cell.accuracy.mean)}.")
    return "\n".join(lines)


def _backdoors(records: Records) -> str:
    """Success of the trigger by task and method over seeds, beside the same texts without it."""
    rows = [row for row in records.rows if None not in (row.backdoor, row.backdoor_clean)]
    methods = method_order(row.method for row in rows)
    lines = []
    for task in dict.fromkeys(row.task for row in rows):
        cells = []
        for method in methods:
            own = [row for row in rows if (row.task, row.method) == (task, method)]
            values = [row.backdoor for row in own if row.backdoor is not None]
            clean = [row.backdoor_clean for row in own if row.backdoor_clean is not None]
            cells.append(
                f"{percent(_mean(values))} ({percent(min(values))} to {percent(max(values))}); {percent(_mean(clean))}"
                if own
                else ""
            )
        lines.append(f"| {task} | {' | '.join(cells)} |")
    if not lines:
        return ""
    head = f"| | {' | '.join(map(display_name, methods))} |\n| --- |{' ---: |' * len(methods)}"
    return (
        "Texts of other classes that get the target's answer with the trigger in front, in percent: a mean over seeds, "
        "in brackets the least and the most of a seed; then the mean for the same texts without it.\n\n"
        f"{head}\n" + "\n".join(lines)
    )


def _commands(study: str, name: str, records: Records) -> str:
    """What runs these cells: a command for each part of the grid in which all tasks met all attacks by all methods."""
    finished = [run for run in records.runs if run.rows and run.seed is not None]
    met: dict[str, dict[str, set[str]]] = {}
    for run in finished:
        seen = met.setdefault(run.rows[0].task, {}).setdefault(run.rows[0].method, set())
        seen |= {run.condition.attack} - {"none"}
    grids: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for task, methods_met in met.items():
        alike: dict[tuple[str, ...], list[str]] = {}
        for method, seen in methods_met.items():
            alike.setdefault(tuple(sorted(seen)), []).append(method)
        for attacks, methods in alike.items():
            grids.setdefault((tuple(method_order(methods)), attacks), []).append(task)
    seeds = map(str, sorted({run.seed for run in finished if run.seed is not None}))
    ending = ["--seeds", *seeds, "--results", "docs/results"] + (["--page", name] if name != study else [])
    lines = []
    for (methods, attacks), tasks in grids.items():
        named = study if attacks or study != "attacks" else "ablation"  # its cells are the attack-free ones here
        words = ["python", "benchmarks/advglue.py", "--study", named, "--shared", "../shared"]
        words += ["--out", "runs/lm" if study == "language-model" else "runs/advglue"]
        if study != "heterogeneity" and set(tasks) != set(TASKS):
            words += ["--tasks", *tasks]
        if set(methods) != set(METHODS):
            words += ["--methods", *methods]
        if named == "attacks" and set(attacks) != set(ATTACKS):
            words += ["--attacks", *attacks]
        lines.append(f"    {shlex.join([*words, *ending])}")
    return "\n".join(lines)


def _made(study: str, name: str, records: Records, base: Mapping[str, Any]) -> str:
    environment = records.environment
    versions = ", ".join(f"{k} {environment[k]}" for k in ("fedeat", "python", "torch", "transformers", "peft"))
    finished = [run for run in records.runs if run.rows]
    seconds = [seconds_of(run) for run in finished]
    waiting = len(records.runs) - len(finished)
    unfinished = f" {waiting} more were not finished when this page was made." if waiting else ""
    lines = [
        f"{versions}; {environment['cpu']}, {environment['threads']} thread a run.",
        f"{len(finished)} runs; training took {min(seconds):.0f} to {max(seconds):.0f} s a run, "
        f"{sum(seconds) / 60:.0f} minutes together, on a machine shared with other jobs.{unfinished} Each run's "
        f"seconds, counts, histograms and tests are in [{name}.json]({name}.json), the cells in "
        f"[{name}.csv]({name}.csv), its configuration, rounds and answers in [{name}.tar.xz]({name}.tar.xz), of "
        "which `--records` makes this page again.",
    ]
    if study != "language-model":
        lines.append(f"The base took {base['seconds'] / 60:.0f} minutes.")
    mixtures: dict[str, list[tuple[float, float]]] = {}
    for run in finished:
        if run.condition.attack != "none" and run.partition:
            mixtures.setdefault(run.rows[0].task, []).append(mixture(run))
    if mixtures:
        words = [
            f"{task} {_mean([mixed for mixed, _ in found]):.2f}, {_mean([share for _, share in found]):.0%}"
            for task, found in mixtures.items()
        ]
        lines.append(
            "How mixed the honest clients' labels are under attack (0: one label each, 1: evenly mixed), and the "
            f"malicious clients' share of the rows, means over runs: {'; '.join(words)}."
        )
    return "\n".join(map(markdown.list_item, lines))


def seconds_of(run: Run) -> float:
    """How long a run's rounds took."""
    return round(math.fsum(float(line["seconds"]) for line in run.timings), 1)


def mixture(run: Run) -> tuple[float, float]:
    """How mixed the honest clients' labels are (0 one label each, 1 as mixed as can be), and the malicious' row share.

    Args:
        run: under an attack.
    """
    malicious = set(malicious_clients(run))
    labels = {label for counts in run.partition.values() for label in counts}
    honest = [counts for client, counts in run.partition.items() if client not in malicious]
    rows = sum(sum(counts.values()) for counts in honest)
    total = sum(sum(counts.values()) for counts in run.partition.values())
    entropy = math.fsum(
        -count * math.log(count / sum(counts.values())) for counts in honest for count in counts.values() if count
    )
    return entropy / rows / math.log(len(labels)), 1 - rows / total


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _base_record(study: str) -> str:
    return "base_model.json" if study == "language-model" else "public_base.json"
