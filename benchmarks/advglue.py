"""The paper's methods on real GLUE and AdvGLUE, one study a command (Sec. 6; Tables 2-5 in shape).

    python benchmarks/advglue.py --study ablation --shared ../shared --out runs/advglue --seeds 0 1 2 3 4

    advglue         the four methods without malicious clients and with 30 % that flip signs
    ablation        the four methods without malicious clients
    attacks         the same, and 30 % malicious clients under each attack of the package
    heterogeneity   one federation of all four tasks: even, skewed by label, one task a client
    language-model  the four methods on a small causal language model, with prompts and likelihood scoring

First the base model (`public_base`; a language model comes from scripts/train_base_model.py), then `fedeat compare` of
the study's files under configs/real. What was killed goes on where it stopped, cells that another study ran in the same
OUT are not run again, and the page is written from whatever runs are finished. The records beside a page hold all of
its runs but the weights; --records puts them back, on any machine, to make the page again or to go on from there.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import advglue_page
import advglue_records
import public_base
from advglue_page import ATTACKS, METHODS, TASKS

from fedeat import config
from fedeat.errors import FedeatError
from fedeat.experiment import comparison
from fedeat.report.reading import read_records

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = 800
"""Rows of a task that settings of the language model are chosen by."""
MIXED = {
    "gm-nnm": {"perturbation.kind": "none", "aggregation.before": ["nearest_neighbour_mixing"]},
    "fedeat-nnm": {"aggregation.before": ["nearest_neighbour_mixing"]},
}
"""Beyond the paper's methods: the median of updates that were each averaged with their nearest."""


@dataclass(frozen=True)
class Study:
    """What is run under one name.

    Attributes:
        files: the configurations under configs/real; each is a comparison in a directory of its name.
        changes: of their [compare] table.
        root: the directory that the configurations write below, which OUT replaces.
    """

    files: tuple[str, ...]
    changes: Mapping[str, Any]
    root: str = "runs/advglue/"


STUDIES: Mapping[str, Study] = {
    "advglue": Study(TASKS, {}),
    "ablation": Study(TASKS, {"fractions": [0.0]}),
    "attacks": Study(TASKS, {"fractions": [0.0, 0.3], "attacks": ATTACKS, "variants": MIXED}),
    "heterogeneity": Study(("heterogeneity",), {}),
    "language-model": Study(tuple(f"lm-{task}" for task in TASKS), {}, "runs/lm/"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="advglue", choices=STUDIES)
    parser.add_argument("--shared", type=Path, required=True, help="directory with data/ and models/")
    parser.add_argument("--out", type=Path, required=True, help="where the base, the rows and the runs go")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="of a study with a federation for each; default all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the configurations")
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, *MIXED), help="default: the paper's four")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, help="of the study `attacks`; default all")
    parser.add_argument("--processes", type=int, default=1, help="cells run side by side; 0 is one a core")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every configuration")
    parser.add_argument("--results", type=Path, help="where the page and what belongs to it go; OUT where not given")
    parser.add_argument("--records", nargs="+", type=Path, default=[], help="of a page's runs, to begin with: .tar.xz")
    parser.add_argument("--page", help="name of the page of a part of a study; by default the study's")
    parser.add_argument("--tables-only", action="store_true", help="run nothing; the page from the finished runs")
    parser.add_argument("--adapters", type=Path, help="copy the attack-free adapters of the first seed there")
    given = parser.parse_args(arguments)
    study = STUDIES[given.study]
    files = [name for name in study.files if not given.tasks or name.removeprefix("lm-") in (*given.tasks, given.study)]
    places = {given.out: study.root.rstrip("/"), given.shared: "../shared"}
    for file in given.records:
        print(f"{file}: {advglue_records.unpack(file, given.out, places)} runs that were not there")
    if not given.tables_only:
        prepare(given.study, given.shared, given.out)
        for name in files:
            _compare(name, load(name, given, study), given.out / name)
    finished = [given.out / name for name in files if (given.out / name / "runs").is_dir()]
    target = (given.results or given.out) / f"{given.page or given.study}.md"
    page = advglue_page.write(given.study, finished, given.out, target, given.attacks, places)
    if given.adapters is not None:
        for directory in finished:
            release(directory, study.root + "base", given.adapters / directory.name)
    print(page.read_text(encoding="utf-8").partition(advglue_page.READING)[0])
    print(f"Written: {page}, .csv, .json, {advglue_records.ENDING}")


def prepare(study: str, shared: Path, out: Path) -> None:
    """The base model, and the rows of the clients."""
    if study != "language-model":
        public_base.main(["--shared", str(shared), "--out", str(out)])
        return
    record = out / "base" / "base_model.json"
    if not record.is_file() or "test" not in json.loads(record.read_text()):
        names = {kind: [f"{shared}/data/{task}_{kind}.jsonl.gz" for task in TASKS] for kind in ("train", "dev")}
        sys.exit(
            f"{out / 'base'} holds no finished base model. Train it first, or let its training finish:\n\n"
            f"    python scripts/train_base_model.py {out / 'base'} "
            f"--instructions {shared}/data/alpaca_cleaned.jsonl.gz {shared}/data/dolly15k.jsonl.gz "
            f"--glue {' '.join(names['train'])} --test {' '.join(names['dev'])}"
        )
    write_second_halves(shared, out)


def write_second_halves(shared: Path, out: Path) -> None:
    """OUT/data/<task>.jsonl: the rows of each train file that scripts/train_base_model.py leaves for the clients.

    Its last rows are in <task>-held.jsonl too, and the others in <task>-fit.jsonl, for choosing settings by.
    """
    (out / "data").mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        with gzip.open(shared / "data" / f"{task}_train.jsonl.gz", "rt", encoding="utf-8") as file:
            lines = [line for line in file if line.strip()]
        kept = lines[len(lines) // 2 :]
        for name, rows in (("", kept), ("-fit", kept[:-HELD_OUT]), ("-held", kept[-HELD_OUT:])):
            (out / "data" / f"{task}{name}.jsonl").write_text("".join(rows), encoding="utf-8")


def load(name: str, given: argparse.Namespace, study: Study) -> config.Config:
    """A shipped configuration with its two roots replaced and its grid as the study and the command want it."""
    text = (ROOT / "configs" / "real" / f"{name}.toml").read_text()
    text = text.replace("../shared/", f"{given.shared.as_posix()}/").replace(study.root, f"{given.out.as_posix()}/")
    raw = tomllib.loads(text)
    asked = {"seeds": given.seeds, "methods": given.methods, "processes": given.processes}
    if "attacks" in study.changes:
        asked["attacks"] = given.attacks
    raw["compare"] |= study.changes | {key: value for key, value in asked.items() if value is not None}
    return config.parse(config.override(raw, given.set), source=f"{name}.toml")


def release(directory: Path, base: str, target: Path) -> None:
    """Copies the attack-free adapters of a comparison's first seed to TARGET/METHOD, with `base` as their model."""
    runs = [run for run in read_records(directory).runs if run.rows and run.attack == "none"]
    first = min(run.seed or 0 for run in runs)
    for run in runs:
        if run.seed != first:
            continue
        folder = target / run.rows[0].method
        shutil.copytree(directory / "runs" / run.name / "adapter", folder, dirs_exist_ok=True)
        settings = json.loads((folder / "adapter_config.json").read_text())
        # Where it lay on the machine that trained says nothing to another.
        settings["base_model_name_or_path"] = base
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _compare(name: str, settings: config.Config, out: Path) -> None:
    def tell(cell: str, stage: str, done: int, total: int) -> None:
        if cell and done == total and stage in ("finished", "failed"):
            print(f"{name}: {cell} {stage}", flush=True)

    try:
        comparison.compare(settings, out, progress=tell)
    except FedeatError as error:
        sys.exit(f"{name}: {error}")


if __name__ == "__main__":
    main()
