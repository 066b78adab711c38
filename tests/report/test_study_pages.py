"""The pages of `benchmarks/advglue.py`: from whatever is finished, and with what a person wrote kept."""

from __future__ import annotations

import gzip
import importlib
import json
import lzma
import math
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedeat import aggregation
from fedeat.report.reading import read_records

NewRun = Callable[..., None]
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ENVIRONMENT = dict.fromkeys(("fedeat", "python", "torch", "transformers", "peft", "cpu", "threads"), "x")
BASE = {
    "held_out_accuracy_with_its_own_heads": {"sst2": 0.9},
    "public_rows": {"sst2": 10},
    "held_out_rows": 4,
    "seconds": 60,
}


@pytest.fixture
def advglue(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("advglue")


@pytest.fixture
def out(tmp_path: Path, new_run: NewRun) -> Path:
    """A study of one task of which some cells are finished, one is not."""
    place = tmp_path / "out"
    for method, attack, seeds in (("fedavg", "none", (0,)), ("gm", "none", (0, 1)), ("gm", "sign_flip", (0, 1))):
        for seed in seeds:
            run = place / "sst2" / "runs" / f"{method}-{attack}-{seed}"
            new_run(run, method, attack, seed, rounds=2)
            stored = json.loads((run / "evaluation.json").read_text())
            rows = [row for row in stored["rows"] if row["task"] == "sst2"]
            (run / "evaluation.json").write_text(json.dumps({**stored, "rows": rows}))
    new_run(place / "sst2" / "runs" / "fedavg-none-1", "fedavg", "none", 1, rounds=2)
    (place / "sst2" / "runs" / "fedavg-none-1" / "evaluation.json").unlink()
    (place / "sst2" / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (place / "base").mkdir()
    (place / "base" / "public_base.json").write_text(json.dumps(BASE))
    return place


def test_a_page_is_made_of_what_is_finished_and_keeps_its_reading(advglue: Any, out: Path, tmp_path: Path) -> None:
    command = ["--shared", "none", "--out", str(out), "--results", str(tmp_path / "docs"), "--tables-only"]
    advglue.main(["--study", "ablation", *command])
    page = tmp_path / "docs" / "ablation.md"
    text = page.read_text()
    assert "Sign flip" not in text
    assert "], 1 seed |" in text
    assert "], 2 seeds |" in text
    assert "3 runs; training took" in text
    assert "1 more were not finished when this page was made." in text.replace("\n  ", " ")
    assert "--out runs/advglue --tasks sst2 --methods fedavg gm --seeds 0 1 --results docs/results" in text
    page.write_text(text + "\nWhat a person wrote.\n")
    advglue.main(["--study", "ablation", *command])
    assert page.read_text() == text + "\nWhat a person wrote.\n"

    advglue.main(["--study", "attacks", *command])
    text = (tmp_path / "docs" / "attacks.md").read_text()
    assert "## What each costs against no attack" in text
    assert "GM is not shown to lose accuracy with 30 % malicious clients (sign flip)." in text
    kept = json.loads((tmp_path / "docs" / "attacks.json").read_text())
    assert {item["condition"] for item in kept["differences"]} == {"none"}
    assert len(kept["rows"]) == 5
    with pytest.raises(SystemExit, match="holds no finished run of this study"):
        advglue.main(["--study", "heterogeneity", *command])

    advglue.main(["--study", "attacks", "--attacks", "sign_flip", "--page", "signs", *command])
    text = (tmp_path / "docs" / "signs.md").read_text()
    assert text.startswith("# Sign flip, 30 % malicious clients\n")
    assert "--attacks sign_flip --seeds 0 1 --results docs/results --page signs\n" in text
    assert "[signs.json](signs.json)" in text.replace("\n  ", " ")


def test_the_records_beside_a_page_make_it_again(advglue: Any, out: Path, tmp_path: Path) -> None:
    """On another machine, where nothing was trained and the study lies elsewhere."""
    for file in out.glob("*/runs/*/config.toml"):
        file.write_text(file.read_text() + f'\n[model]\nname = "{out}/base"\n')
    command = ["--study", "attacks", "--tables-only", "--shared", "none", "--out"]
    advglue.main([*command, str(out), "--results", str(tmp_path / "docs")])
    records = tmp_path / "docs" / "attacks.tar.xz"
    other = tmp_path / "other"
    advglue.main([*command, str(other), "--results", str(tmp_path / "again"), "--records", str(records)])
    for name in ("attacks.csv", "attacks.json"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "docs" / name).read_text()
    assert records.read_bytes() == (tmp_path / "again" / "attacks.tar.xz").read_bytes()
    first, second = ((tmp_path / place / "attacks.md").read_text().split() for place in ("docs", "again"))
    assert " ".join(second) == " ".join(first).replace("1 more were not finished when this page was made. ", "")
    assert str(tmp_path).encode() not in lzma.decompress(records.read_bytes())
    assert f'name = "{other}/base"' in (other / "sst2" / "runs" / "gm-none-0" / "config.toml").read_text()


def test_records_leave_a_run_that_is_there_alone(advglue: Any, out: Path, tmp_path: Path) -> None:
    unpack, pack = advglue.advglue_records.unpack, advglue.advglue_records.pack
    there, gone = out / "sst2" / "runs" / "gm-none-0", out / "sst2" / "runs" / "gm-none-1"
    pack(tmp_path / "runs.tar.xz", out, [there, gone], [], {out: "runs/advglue"})
    (there / "config.toml").write_text("own")
    kept = (gone / "metrics.jsonl").read_text()
    shutil.rmtree(gone)
    assert unpack(tmp_path / "runs.tar.xz", out, {out: "runs/advglue"}) == 1
    assert (there / "config.toml").read_text() == "own"
    assert (gone / "metrics.jsonl").read_text() == kept


def test_records_of_runs_from_another_base_are_refused(
    advglue: Any, out: Path, tmp_path: Path, new_run: NewRun
) -> None:
    record, evaluated = out / "base" / "public_base.json", out / "sst2" / "runs" / "base"
    new_run(evaluated, "base", "none", 0, rounds=2)
    advglue.advglue_records.pack(tmp_path / "runs.tar.xz", out, [evaluated], [record], {})
    record.write_text(json.dumps({**BASE, "seconds": 1}))
    assert advglue.advglue_records.unpack(tmp_path / "runs.tar.xz", out, {}) == 0
    record.write_text(json.dumps({**BASE, "held_out_rows": 5}))
    with pytest.raises(SystemExit, match="holds runs from another base model"):
        advglue.advglue_records.unpack(tmp_path / "runs.tar.xz", out, {})


def test_what_is_no_archive_of_records_is_refused(advglue: Any, tmp_path: Path) -> None:
    (tmp_path / "half.tar.xz").write_bytes(b"\xfd7zXZ\x00\x00")
    with tarfile.open(tmp_path / "away.tar.xz", "w:xz") as archive:
        archive.addfile(tarfile.TarInfo("../config.toml"))
    for name, message in (("half", "holds no records"), ("none", "holds no records"), ("away", "outside of a study")):
        with pytest.raises(SystemExit, match=message):
            advglue.advglue_records.unpack(tmp_path / f"{name}.tar.xz", tmp_path / "out", {})
    assert not (tmp_path / "config.toml").exists()


def test_methods_are_compared_seed_by_seed(advglue: Any, out: Path, tmp_path: Path, new_run: NewRun) -> None:
    for method, seed, accuracy in (("fedavg", 0, 0.5), ("fedavg", 1, 0.9), ("eat", 0, 0.4), ("eat", 1, 0.95)):
        run = out / "sst2" / "runs" / f"{method}-mimic-{seed}"
        new_run(run, method, "mimic", seed, rounds=2)
        stored = json.loads((run / "evaluation.json").read_text())
        row = {**next(row for row in stored["rows"] if row["task"] == "sst2"), "accuracy": accuracy}
        row["flags"] = ["constant prediction: positive"] if accuracy == 0.4 else []
        (run / "evaluation.json").write_text(json.dumps({**stored, "rows": [row]}))
    section = importlib.import_module("advglue_seeds").section
    lines = section(read_records(out / "sst2")).splitlines()
    head = next(line for line in lines if line.startswith("|  |"))
    assert "| EAT below FedAvg | FedEAT below GM | GM below FedAvg |" in head
    (mimic,) = [line for line in lines if line.startswith("| Mimic")]
    cells = dict(zip(head.split(" | "), mimic.split(" | "), strict=True))
    assert cells["EAT below FedAvg"] == "1 of 2, -2.5"
    assert cells["GM below FedAvg"] == ""
    assert (cells["one answer, FedAvg"], cells["one answer, EAT"]) == ("0 of 2", "1 of 2")


def test_a_base_model_alone_makes_no_page(advglue: Any, out: Path, tmp_path: Path, new_run: NewRun) -> None:
    for file in (out / "sst2" / "runs").glob("*/evaluation.json"):
        file.unlink()
    new_run(out / "sst2" / "runs" / "base", "base", "none", 0, rounds=2)
    command = ["--shared", "none", "--out", str(out), "--results", str(tmp_path), "--tables-only"]
    with pytest.raises(SystemExit, match="holds no finished run of this study"):
        advglue.main(["--study", "ablation", *command])


def test_an_ablation_leaves_a_method_of_another_study_out(
    advglue: Any, out: Path, tmp_path: Path, new_run: NewRun
) -> None:
    new_run(out / "sst2" / "runs" / "gm-nnm-none-0", "gm-nnm", "none", 0, rounds=2)
    new_run(out / "sst2" / "runs" / "base", "base", "none", 0, rounds=2)
    command = ["--shared", "none", "--out", str(out), "--results", str(tmp_path), "--tables-only"]
    for study in ("ablation", "attacks"):
        advglue.main(["--study", study, *command])
        text = (tmp_path / f"{study}.md").read_text()
        assert "| Base model |" in text
        assert ("| gm-nnm |" in text) == (study == "attacks")


def test_parts_of_a_grid_have_a_command_each(
    advglue: Any, out: Path, tmp_path: Path, new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = importlib.import_module("advglue_page")
    monkeypatch.setattr(page, "ATTACKS", ("sign_flip", "mimic"))
    for method, attack in (("gm", "mimic"), ("fedavg", "sign_flip"), ("eat", "none")):
        new_run(out / "sst2" / "runs" / f"{method}-{attack}-0", method, attack, 0, rounds=2)
    for method in ("fedavg", "eat"):
        new_run(out / "qqp" / "runs" / f"{method}-sign_flip-0", method, "sign_flip", 0, rounds=2)
    for path in out.glob("*/runs/*/evaluation.json"):
        stored, task = json.loads(path.read_text()), path.parents[2].name
        path.write_text(json.dumps({**stored, "rows": [row for row in stored["rows"] if row["task"] == task]}))
    (out / "qqp" / "environment.json").write_text(json.dumps(ENVIRONMENT))
    command = ["--shared", "none", "--out", str(out), "--results", str(tmp_path), "--tables-only"]
    advglue.main(["--study", "attacks", *command])
    text = (tmp_path / "attacks.md").read_text()
    words = [line.split() for line in text.splitlines() if line.startswith("    python")]
    assert all(line[-5:] == ["--seeds", "0", "1", "--results", "docs/results"] for line in words)
    assert sorted(f"{line[3]} {' '.join(line[8:-5])}" for line in words) == [
        "ablation --tasks sst2 --methods eat",
        "attacks --tasks qqp --methods fedavg eat --attacks sign_flip",
        "attacks --tasks sst2 --methods fedavg --attacks sign_flip",
        "attacks --tasks sst2 --methods gm",
    ]


def test_the_spread_of_honest_updates_is_that_of_the_updates_themselves(
    advglue: Any, out: Path, tmp_path: Path, new_run: NewRun
) -> None:
    generator = torch.Generator().manual_seed(0)
    spreads = importlib.import_module("advglue_spread").spreads
    expected, lengths = {}, {}
    for method, noise in (("fedavg", 1.0), ("eat", 3.0)):
        updates = 1 + noise * torch.randn(4, 50, generator=generator, dtype=torch.float64)
        mean = updates.mean(0)
        lengths[method] = float(mean.norm())
        expected[method] = float((updates - mean).square().sum(1).mean().sqrt()) / lengths[method]
        run = out / "sst2" / "runs" / f"{method}-of-known-updates"
        new_run(run, method, "none", 2, rounds=1)
        with (run / "config.toml").open("a") as config:
            config.write('[aggregation]\nrule = "mean"\n')
        lines = [{"kind": "client", "round": 0, "update_norm": float(update.norm())} for update in updates]
        lines.append({"kind": "round", "round": 0, "update_norm": lengths[method]})
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = [run for run in read_records(out / "sst2").runs if run.name.endswith("known-updates")]
    assert {run.method: spreads(run)[0] for run in runs} == pytest.approx(expected)

    attacked = out / "sst2" / "runs" / "gm-attacked"
    new_run(attacked, "gm", "adaptive", 2, rounds=1)
    first = {"kind": "round", "round": 0, "cohort": list(range(10)), "malicious": [0, 1], "update_norm": 2.0}
    (attacked / "metrics.jsonl").write_text(json.dumps(first) + "\n")

    command = ["--shared", "none", "--out", str(out), "--results", str(tmp_path / "docs"), "--tables-only"]
    advglue.main(["--study", "attacks", *command])
    page = (tmp_path / "docs" / "attacks.md").read_text()
    left, measured = 1 - expected["fedavg"] * 0.25 / math.sqrt(1 - 0.25**2), 2.0 / lengths["fedavg"]
    told = " | ".join(f"{value:.2f} ({value:.2f} to {value:.2f})" for value in (left, measured))
    assert f"| sst2 | {told} |" in page
    plain, trained = (f"{value:.2f} ({value:.2f} to {value:.2f})" for value in expected.values())
    turned = (f"{100 * aggregation.turning_share(value):.1f}" for value in expected.values())
    turning = " | ".join(f"{share}, {share} %" for share in turned)
    assert f"| sst2 | {plain} | {trained} | 1 of 1 | {turning} |" in page


def test_every_study_has_its_configurations_and_a_title(advglue: Any) -> None:
    page = importlib.import_module("advglue_page")
    assert set(advglue.STUDIES) == set(page.TITLES)
    for study in advglue.STUDIES.values():
        assert all((BENCHMARKS.parent / "configs" / "real" / f"{name}.toml").is_file() for name in study.files)


def test_the_clients_of_a_language_model_hold_what_its_base_has_not_seen(
    advglue: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advglue, "HELD_OUT", 1)
    (tmp_path / "data").mkdir()
    for task in advglue.TASKS:
        with gzip.open(tmp_path / "data" / f"{task}_train.jsonl.gz", "wt") as file:
            file.write("".join(json.dumps({"row": number}) + "\n" for number in range(5)))
    advglue.write_second_halves(tmp_path, tmp_path / "out")
    for name, rows in (("sst2", [2, 3, 4]), ("sst2-fit", [2, 3]), ("mnli-held", [4])):
        lines = (tmp_path / "out" / "data" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["row"] for line in lines] == rows
