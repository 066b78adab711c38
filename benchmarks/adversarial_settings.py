"""Which settings of adversarial training buy robustness: the evidence behind the client's defaults.

    python benchmarks/adversarial_settings.py --shared ../shared --base runs/advglue --out runs/settings

Federations of two clients without malicious ones, averaged, that differ in the perturbation and in how long they train.
They are measured on the rows of the GLUE train files that `public_base` held out, and on those rows with typos,
substituted words and distracting clauses, and by attacks on the embeddings. AdvGLUE and the dev files are not read.
What was killed goes on where it stopped, and the page is written from whatever runs are finished.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import advglue
import public_base

from fedeat import config, evaluation
from fedeat.attacks.pairs import pair_rows
from fedeat.evaluation.differences import compare_methods, corrected
from fedeat.evaluation.outcomes import Measure, Outcomes, outcomes
from fedeat.experiment import attacking, comparison
from fedeat.model import ModelSource, load_model
from fedeat.report.reading import Records, Run, read_records
from fedeat.report.tables import percent

KINDS = {"typos": 0.3, "substitution": 0.3, "distraction": 1.0}
"""Text attack -> share of the words it changes at most."""

ALL_LAYERS = {"lora.target_modules": r".*layer\.\d\..*(query|value|dense)"}
"""Adapters in every layer, not the upper half alone: the lower half carries a perturbation up unchecked."""

LONG = {**ALL_LAYERS, "federation.rounds": 16, "client.max_steps": 24, "client.learning_rate": 1e-3}
"""Four times as many steps, twice as long."""

PLAIN = {"perturbation.kind": "none"}


def _mixed(radius: float, steps: int) -> dict[str, Any]:
    return {"perturbation.radius": radius, "perturbation.steps": steps}


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "none": PLAIN,
    "none-all-layers": {**PLAIN, **ALL_LAYERS},
    "noise-.10": {
        "perturbation.kind": "random",
        "perturbation.radius": 0.1,
        "perturbation.harvest_clean_gradient": False,
    },
    "shipped": {},
    "mixed-.01": _mixed(0.01, 3),
    "mixed-.03": _mixed(0.03, 3),
    "mixed-.05": _mixed(0.05, 3),
    "long-none": {**PLAIN, **LONG},
    "long-mixed-.05": {**_mixed(0.05, 1), **LONG},
    "long-mixed-.15": {**_mixed(0.15, 1), **LONG},
}
"""Name -> keys that differ from configs/real/<task>.toml."""

READING = "## Reading\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="directory with data/ and models/")
    parser.add_argument("--base", type=Path, required=True, help="what benchmarks/public_base.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="one comparison directory a task")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "qnli"], choices=list(public_base.FIELDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[4])
    parser.add_argument("--results", type=Path, help="where settings.md and .json go; OUT where not given")
    parser.add_argument("--tables-only", action="store_true", help="run nothing; the page from the finished runs")
    given = parser.parse_args()
    for task in given.tasks if not given.tables_only else ():
        files = validation(task, given.shared, given.base, given.out)
        comparison.compare(study(task, given.shared, given.base, files, given.seeds), given.out / task, progress=_tell)
    finished = [task for task in public_base.FIELDS if (given.out / task / "runs").is_dir()]
    page = write({task: read_records(given.out / task) for task in finished}, given.results or given.out)
    print(page.read_text(encoding="utf-8").partition(READING)[0])


def validation(task: str, shared: Path, base: Path, out: Path) -> list[Path]:
    """Held-out train rows, and one file of original/modified pairs for each kind of text attack."""
    folder = out / "validation"
    folder.mkdir(parents=True, exist_ok=True)
    rows_file = folder / f"{task}.jsonl"
    files = [rows_file, *(folder / f"{task}-{kind}.json" for kind in KINDS)]
    if all(file.is_file() for file in files):
        return files
    with gzip.open(shared / "data" / f"{task}_train.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    random.Random(f"{public_base.SEED} {task}").shuffle(rows)  # the order in which public_base splits them
    held = rows[public_base.PUBLIC[task] : public_base.PUBLIC[task] + public_base.HELD_OUT]
    rows_file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in held), encoding="utf-8")
    items = attacking.texts_of([evaluation.read_evaluation(rows_file, task)])
    model = load_model(
        ModelSource(
            str(base / "base"),
            kind="sequence-classification",
            heads={task: public_base.FIELDS[task][2]},
            max_length=public_base.MAX_LENGTH,
            device="cpu",
        ),
        lora=None,
    )
    for file, (kind, rate) in zip(files[1:], KINDS.items(), strict=True):
        found = attacking.attack_texts(kind, items, model=model, rate=rate)
        file.write_text(json.dumps(pair_rows(found), ensure_ascii=False, indent=1), encoding="utf-8")
    return files


def study(task: str, shared: Path, base: Path, files: list[Path], seeds: list[int]) -> config.Config:
    """The task's shipped configuration with two clients, the variants, and the validation files."""
    text = (advglue.ROOT / "configs" / "real" / f"{task}.toml").read_text()
    text = text.replace("../shared/", f"{shared.as_posix()}/").replace("runs/advglue/", f"{base.as_posix()}/")
    shipped = tomllib.loads(text)
    shipped["partition"] = {"kind": "iid", "clients": 2}
    shipped["client"] |= {"max_steps": 12}
    shipped["aggregation"] = {"rule": "mean"}
    shipped["evaluation"] = {
        "data": [{"path": str(file), "task": task} for file in files],
        "radii": [0.05, 0.15],
        "attacked": 200,
        "attack_steps": 6,
        "restarts": 1,
    }
    variants = {name: dict(keys) for name, keys in VARIANTS.items()}
    shipped["compare"] = {"methods": list(variants), "variants": variants, "fractions": [0.0], "seeds": seeds}
    return config.parse(shipped, source=f"{task}.toml")


def write(records: Mapping[str, Records], target: Path) -> Path:
    """Writes TARGET/settings.md and .json from the finished runs of each task; what stands under "Reading" stays."""
    target.mkdir(parents=True, exist_ok=True)
    rows = {task: measured(list(found.runs)) for task, found in records.items()}
    # The command of the process that trained is a detail of the machine; the page has the one to type.
    environment = {k: v for k, v in next(iter(records.values())).environment.items() if k != "command"}
    content = {"environment": environment, "rows": rows}
    (target / "settings.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    page = target / "settings.md"
    before = page.read_text(encoding="utf-8").partition(READING) if page.is_file() else ("", READING, "")
    tables = "\n\n".join(f"## {task}\n\n{_table(found)}" for task, found in rows.items())
    page.write_text(_HEAD + tables + "\n\n" + READING + before[2], encoding="utf-8")
    return page


_HEAD = """# What adversarial training buys, by its settings

    python benchmarks/adversarial_settings.py --shared ../shared --base runs/advglue --out runs/settings \\
        --results docs/results

Two clients that share the rows evenly, averaged, without malicious ones. Adapters in the upper three of MiniLM's six
layers, 8 rounds of 12 steps of 16 texts, unless it says "all-layers"; "long" is all layers, 16 rounds of 24 steps and
twice the learning rate. "mixed" is the clean loss plus the adversarial one within the radius that the name ends with,
relative to the mean norm of a token's embedding, found in three steps (one where it is long); "shipped" is radius .03
in one step; "noise" is random noise of that radius.

Measured on 400 train rows that nobody trained on. ASR: the same rows attacked in three ways, all with its 95 % interval
over originals, then each alone. Change: against training as long without perturbation, in points with 95 % intervals,
bold where shown (McNemar and a paired bootstrap, corrected over the column). PGD: accuracy under six steps on the
embeddings within a relative radius, of 200 originals of each of the four files. Means over seeds, in percent.

"""


def measured(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One record a variant, in their order: rates, differences from its control, seconds."""
    by: dict[str, list[Run]] = {}
    for run in runs:
        if run.rows:
            by.setdefault(run.rows[0].method, []).append(run)
    found = [{"variant": name, "control": _control(name), **_rates(by[name])} for name in VARIANTS if name in by]
    for measure in ("accuracy", "asr"):
        tested = [
            item
            for row in found
            if row["variant"] != row["control"] in by
            for item in compare_methods(
                {name: _outcomes(by[name], measure) for name in (row["variant"], row["control"])},
                task=by[row["variant"]][0].rows[0].task,
                measure=measure,
            )
        ]
        changes = {item.first: asdict(item) | {"shown": item.significant} for item in corrected(tested)}
        for row in found:
            row[f"{measure}_change"] = changes.get(row["variant"])
    return found


def _control(variant: str) -> str:
    return "long-none" if variant.startswith("long") else "none"


def _outcomes(runs: Sequence[Run], measure: Measure) -> dict[int, Outcomes]:
    return {run.seed or 0: outcomes(run.predictions[run.rows[0].task], measure) for run in runs}


def _rates(runs: Sequence[Run]) -> dict[str, Any]:
    rows = [run.rows[0] for run in runs]
    kinds: dict[str, list[bool]] = {}
    for run in runs:
        for pair in run.predictions[run.rows[0].task]["pairs"]:
            if pair["original"] == pair["label"]:
                kinds.setdefault(pair["method"].partition(":")[0], []).append(pair["modified"] != pair["label"])
    points = [
        (f"{point['kind']} {point['radius']:g}", point["accuracy"]) for run in runs for point in run.curve["points"]
    ]
    return {
        "seeds": [run.seed for run in runs],
        "accuracy": statistics.fmean(row.accuracy or 0 for row in rows),
        "asr": sum(row.broken for row in rows) / sum(row.benign_correct for row in rows),
        "asr_low": statistics.fmean(row.asr_low or 0 for row in rows),
        "asr_high": statistics.fmean(row.asr_high or 0 for row in rows),
        "asr_by_kind": {kind: statistics.fmean(broken) for kind, broken in kinds.items()},
        "robust": {name: statistics.fmean(value for key, value in points if key == name) for name, _ in points},
        "seconds": statistics.fmean(sum(float(line["seconds"]) for line in run.timings) for run in runs),
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    kinds, curve = list(rows[0]["asr_by_kind"]), [name for name in rows[0]["robust"] if name.startswith("pgd")]
    head = ["training", "accuracy", "change", "ASR", "change", *kinds, *(name.replace("pgd", "PGD") for name in curve)]
    lines = [
        [
            row["variant"],
            percent(row["accuracy"]),
            _change(row["accuracy_change"]),
            f"{percent(row['asr'])} [{percent(row['asr_low'])}, {percent(row['asr_high'])}]",
            _change(row["asr_change"]),
            *(percent(row["asr_by_kind"][kind]) for kind in kinds),
            *(percent(row["robust"][name]) for name in curve),
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    rule = ["---", *("---:" for _ in head)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ([*head, "seconds"], rule, *lines))


def _change(item: Mapping[str, Any] | None) -> str:
    if item is None:
        return ""
    text = f"{100 * item['value']:+.1f} [{100 * item['low']:+.1f}, {100 * item['high']:+.1f}]"
    return f"**{text}**" if item["shown"] else text


def _tell(cell: str, stage: str, done: int, total: int) -> None:
    if cell and stage == "finished":
        print(cell, flush=True)


if __name__ == "__main__":
    main()
