"""The four methods on real GLUE and AdvGLUE, with and without sign-flipping clients (Sec. 6; Tables 2-5 in shape).

    python benchmarks/advglue.py --shared ../shared --out runs/advglue

First the base model of `public_base`, then for each task `fedeat compare` of configs/real/<task>.toml. What was killed
goes on where it stopped, and the tables are written from whatever runs are finished.

The seed, 4, is that of a first series on fewer rows, where it was chosen by the partition alone: ten clients and two
labels at Dirichlet(0.5) often leave the honest clients with one label each. The page shows, for each task, how mixed
the honest clients' labels are.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import public_base

from fedeat import config
from fedeat.errors import FedeatError
from fedeat.experiment import comparison

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("sst2", "qqp", "qnli", "mnli")
METHODS = ("fedavg", "eat", "gm", "fedeat")
BASELINE = {"sst2": 0.86, "qqp": 0.78, "qnli": 0.78, "mnli": 0.65}
"""Benign accuracy that makes an attack-free FedAvg a credible baseline."""
COLUMNS = (
    "task", "method", "attack", "byzantine_fraction", "seed",
    "accuracy", "accuracy_low", "accuracy_high", "benign",
    "asr", "asr_low", "asr_high", "broken", "benign_correct", "pairs", "originals",
    "accuracy_original", "accuracy_modified", "seconds", "flags", "trained_on",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="directory with data/ and models/")
    parser.add_argument("--out", type=Path, required=True, help="one comparison directory a task")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--results", type=Path, help="where to write advglue.md, .csv and .json; OUT where not given")
    parser.add_argument("--tables-only", action="store_true", help="run nothing; tables from the finished runs")
    given = parser.parse_args()
    if not given.tables_only:
        public_base.main(["--shared", str(given.shared), "--out", str(given.out)])
        for task in given.tasks:
            _compare(task, given.shared, given.out)
    rows = [row for task in given.tasks for row in finished_rows(given.out / task, task)]
    if not rows:
        sys.exit(f"{given.out} holds no finished run.")
    environment = json.loads((given.out / given.tasks[0] / "environment.json").read_text())
    target = given.results or given.out
    target.mkdir(parents=True, exist_ok=True)
    attacked = {task: sorted((given.out / task / "runs").glob("*-sign_flip-*/partition.json")) for task in given.tasks}
    mixtures = {task: mixture(files[0].parent) for task, files in attacked.items() if files}
    base = json.loads((given.out / "base" / "public_base.json").read_text())
    _write(target, rows, environment, base, mixtures, given.tasks)
    print(tables(rows, given.tasks))
    print(f"Written: {target / 'advglue.md'}, .csv, .json")


def load(task: str, shared: Path, out: Path) -> config.Config:
    """The task's shipped configuration with its two roots, `../shared` and `runs/advglue`, replaced."""
    text = (ROOT / "configs" / "real" / f"{task}.toml").read_text()
    text = text.replace("../shared/", f"{shared.as_posix()}/").replace("runs/advglue/", f"{out.as_posix()}/")
    return config.parse(tomllib.loads(text), source=f"{task}.toml")


def _compare(task: str, shared: Path, out: Path) -> None:
    def tell(cell: str, stage: str, done: int, total: int) -> None:
        if cell and done == total and stage == "finished":
            print(f"{task}: {cell}", flush=True)

    try:
        comparison.compare(load(task, shared, out), out / task, progress=tell)
    except FedeatError as error:
        sys.exit(f"{task}: {error}")


def finished_rows(out: Path, trained_on: str) -> list[dict[str, Any]]:
    """Rows of a task's finished runs, each with the seconds its training took."""
    rows = []
    for file in sorted((out / "runs").glob("*/evaluation.json")):
        timings = (file.parent / "timings.jsonl").read_text().splitlines()
        seconds = sum(json.loads(line)["seconds"] for line in timings)
        found = json.loads(file.read_text())["rows"]
        rows += [{**row, "trained_on": trained_on, "seconds": round(seconds, 1)} for row in found]
    return sorted(rows, key=lambda row: (row["byzantine_fraction"], METHODS.index(row["method"]), row["task"]))


def mixture(run: Path) -> tuple[float, float]:
    """How mixed the honest clients' labels are (0 one label each, 1 as mixed as can be), and the malicious' row share.

    Args:
        run: directory of a run under attack.
    """
    clients = json.loads((run / "partition.json").read_text())["clients"]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    malicious = {str(line["client"]) for line in metrics if line["kind"] == "client" and line["malicious"]}
    labels = {label for client in clients.values() for label in client["counts"]}
    honest = [client for name, client in clients.items() if name not in malicious]
    rows = sum(client["examples"] for client in honest)
    total = sum(client["examples"] for client in clients.values())
    entropy = sum(
        -count * math.log(count / client["examples"]) for client in honest for count in client["counts"].values()
    )
    return entropy / rows / math.log(len(labels)), 1 - rows / total


def tables(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> str:
    """One Markdown table a condition: methods down, accuracy and ASR of each task across."""
    shown = [name for task in tasks for name in ((task, "mnli-mm") if task == "mnli" else (task,))]
    shown = [name for name in shown if any(row["task"] == name for row in rows)]
    parts = []
    notes: list[str] = []
    for attack, fraction in dict.fromkeys((row["attack"], row["byzantine_fraction"]) for row in rows):
        title = "No attack" if attack == "none" else f"{fraction:.0%} of the clients: {attack.replace('_', ' ')}"
        lines = [f"### {title}", "", "| method | " + " | ".join(f"{n} accuracy | {n} ASR" for n in shown) + " |"]
        lines.append("| --- |" + " ---: | ---: |" * len(shown))
        for method in METHODS:
            cells = []
            for name in shown:
                found = [r for r in rows if (r["method"], r["attack"], r["task"]) == (method, attack, name)]
                cells += _cells(found[0], title, notes) if found else ["not run", ""]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    if notes:
        parts.append("† flagged, never a win:\n\n" + "\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts)


def _cells(row: Mapping[str, Any], title: str, notes: list[str]) -> list[str]:
    mark = "†" if row["flags"] else ""
    if row["flags"]:
        notes.append(f"{title}, {row['method']}, {row['task']}: {'; '.join(row['flags'])}")
    accuracy = f"{row['accuracy']:.3f}{mark}"
    if row["asr"] is None:
        return [accuracy, f"none{mark}"]
    interval = "" if row["asr_low"] is None else f" [{row['asr_low']:.2f}, {row['asr_high']:.2f}]"
    return [accuracy, f"{row['asr']:.3f}{interval} ({row['broken']}/{row['benign_correct']}){mark}"]


def _verdicts(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> str:
    """What the numbers say, sentence by sentence, from the numbers alone."""
    by = {(r["task"], r["method"], r["byzantine_fraction"] > 0): r for r in rows}
    lines = []
    for task in tasks:
        plain = by.get((task, "fedavg", False))
        if plain is None:
            continue
        goal = BASELINE[task]
        reached = "reaches" if plain["accuracy"] >= goal else "misses"
        lines.append(
            f"- {task}: attack-free FedAvg {reached} the {goal:.2f} that makes it a strong baseline, with "
            f"{plain['accuracy']:.3f} [{plain['accuracy_low']:.2f}, {plain['accuracy_high']:.2f}]."
        )
        for method in METHODS:
            calm, hit = by.get((task, method, False)), by.get((task, method, True))
            if calm and hit and calm["flags"]:
                lines.append(f"  - {method}: flagged without an attack; nothing to compare.")
            elif calm and hit:
                change = 100 * (hit["accuracy"] - calm["accuracy"])
                flag = ", flagged" if hit["flags"] else ""
                lines.append(f"  - {method}: {change:+.1f} points of accuracy under attack{flag}.")
        for method, against in (("eat", "fedavg"), ("fedeat", "gm")):
            pair = by.get((task, method, False)), by.get((task, against, False))
            if pair[0] and pair[1] and not pair[0]["flags"] and not pair[1]["flags"] and pair[0]["asr"] is not None:
                gap = 100 * (pair[0]["asr"] - pair[1]["asr"])
                overlap = pair[0]["asr_low"] <= pair[1]["asr_high"] and pair[1]["asr_low"] <= pair[0]["asr_high"]
                sure = "the 95 % intervals overlap" if overlap else "the 95 % intervals do not overlap"
                lines.append(f"  - {method} against {against}, no attack: ASR {gap:+.1f} points; {sure}.")
    return "\n".join(lines)


def _write(
    target: Path,
    rows: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
    base: Mapping[str, Any],
    mixtures: Mapping[str, tuple[float, float]],
    tasks: Sequence[str],
) -> None:
    # The command of the process that trained is a detail of the machine; the page has the one to type.
    kept = {key: value for key, value in environment.items() if key != "command"}
    content = {"environment": kept, "base": base, "rows": rows}
    (target / "advglue.json").write_text(json.dumps(content, indent=1) + "\n")
    with (target / "advglue.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "flags": "; ".join(row["flags"])} for row in rows)
    page = target / "advglue.md"
    # What a person wrote about the figures stays when the figures are made again.
    before = page.read_text().partition("## Reading\n") if page.is_file() else ("", "", "")
    page.write_text(
        _page(rows, environment, base, mixtures, tasks) + (before[1] + before[2] if before[1] else "## Reading\n")
    )


def _page(
    rows: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
    base: Mapping[str, Any],
    mixtures: Mapping[str, tuple[float, float]],
    tasks: Sequence[str],
) -> str:
    seeds = sorted({row["seed"] for row in rows})
    seconds = {(row["trained_on"], row["run"]): row["seconds"] for row in rows}.values()
    versions = ", ".join(f"{k} {environment[k]}" for k in ("fedeat", "python", "torch", "transformers", "peft"))
    own = ", ".join(f"{task} {value:.2f}" for task, value in base["held_out_accuracy_with_its_own_heads"].items())
    mixed = "; ".join(f"{task} {honest:.2f}, {share:.0%}" for task, (honest, share) in mixtures.items())
    public = ", ".join(f"{task} {count}" for task, count in base["public_rows"].items())
    return f"""# Four methods on GLUE and AdvGLUE

MiniLM-L6 with a LoRA adapter and a federated head, one federation a task: 10 clients, Dirichlet(0.5) by label, the
[configurations](../../configs/real). The encoder was tuned before, in one place, on a public part of the GLUE train
files ({public} rows), as the paper federates models that were instruction-tuned before. The clients hold other train
rows, of sst2 those of ten words and more, and start from a fresh head; nothing trains on a dev file. The encoder's
own heads, thrown away, were right on {own}
of {base["held_out_rows"]} train rows of each task held out.

Accuracy: GLUE dev rows, all 872 of sst2 and a fixed random sample of the others (its size is in
[advglue.csv](advglue.csv), its 95 % interval about 4 points to either side); for mnli-mm the distinct AdvGLUE
originals. ASR: AdvGLUE pairs wrong on the modified text over those right on the original, with a 95 % cluster
bootstrap over distinct originals and the counts; all pairs of the AdvGLUE dev set that have an original.

{tables(rows, tasks)}

## What the numbers say

{_verdicts(rows, tasks)}

## How they were made

    python benchmarks/advglue.py --shared ../shared --out runs/advglue --results docs/results

- Seed {", ".join(map(str, seeds))}, one run a cell: one seed cannot tell a method's effect from a run's chance.
- How mixed the honest clients' labels are (0: one label each, 1: evenly mixed), and the malicious clients' share of
  the rows: {mixed}.
- {versions}; {environment["cpu"]}, {environment["threads"]} thread.
- {len(seconds)} runs; training took {min(seconds):.0f} to {max(seconds):.0f} s a run, {sum(seconds) / 60:.0f} minutes
  together, on a machine shared with other jobs; the base {base["seconds"] / 60:.0f} minutes. Each run's seconds are in
  [advglue.csv](advglue.csv), counts and histograms in [advglue.json](advglue.json).

"""


if __name__ == "__main__":
    main()
