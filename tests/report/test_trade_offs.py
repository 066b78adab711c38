"""Curves over the radius and the scatter of accuracy against attack success."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedeat.report import write_report
from fedeat.report.cells import read_rows
from fedeat.report.reading import read_directory, read_run
from fedeat.report.tables import result_tables
from fedeat.report.trade_offs import curve_points, mean_curves, method_curves_figure, robustness_figure, scatter_figure

NewRow = Callable[..., dict[str, Any]]
NewRun = Callable[..., None]


def test_curves_are_means_over_seeds_in_order_of_radius(tmp_path: Path, new_run: NewRun) -> None:
    for seed in (0, 1):
        new_run(tmp_path / f"gm{seed}", "gm", "none", seed)
    runs = [read_run(tmp_path / f"gm{seed}") for seed in (0, 1)]
    found = mean_curves(runs, "sst2")["gm"]
    assert [point["radius"] for point in found] == [0.0, 0.02, 0.05, 0.1, 0.2]
    one, two = (mean_curves([run], "sst2")["gm"][1] for run in runs)
    assert found[1]["accuracy"] == pytest.approx((one["accuracy"] + two["accuracy"]) / 2)
    assert mean_curves(runs, "qqp") == {}


def test_points_that_cannot_be_drawn_are_left_out(tmp_path: Path, new_run: NewRun) -> None:
    new_run(tmp_path / "gm", "gm", "none")
    run = read_run(tmp_path / "gm")
    run.curve["points"].extend([3, {"task": "sst2"}, {"radius": "far"}, None])  # type: ignore[index]
    assert len(curve_points(run)) == 13


def test_figures_have_a_line_or_a_mark_for_each(comparison: Path, new_row: NewRow) -> None:
    run = read_directory(comparison).runs[0]
    (axes,) = robustness_figure(curve_points(run)).axes
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["random", "FGSM", "PGD", "no attack"]
    assert axes.get_xscale() == "log"
    (panel,) = method_curves_figure(mean_curves(read_directory(comparison).runs, "sst2"), "sst2").axes
    assert len(panel.get_lines()) == 4
    assert panel.get_xscale() == "symlog"
    assert [label.get_text() for label in panel.get_xticklabels()] == ["0", "0.02", "0.05", "0.1", "0.2"]
    rows = [new_row(name, "none", "sst2", 0) for name in ("fedavg", "gm")]
    rows.append(new_row("eat", "none", "sst2", 0) | {"asr": None, "asr_low": None, "asr_high": None})
    (table,) = result_tables(read_rows(rows)[0])
    labels = [text.get_text() for text in scatter_figure(table, "sst2").legends[0].get_texts()]
    assert labels == ["FedAvg", "GM"]


def test_a_page_has_curves_scatters_the_backdoor_and_refusals(tmp_path: Path, new_run: NewRun, new_row: NewRow) -> None:
    for method in ("fedavg", "gm"):
        new_run(tmp_path / "runs" / method, method, "backdoor", rounds=2)
    # The base model is measured too, and trained nowhere.
    refused = {"attack": "embedding", "radius": 0.1, "requests": 20, "refused": 5, "empty": 1}
    stored = json.loads((tmp_path / "runs" / "gm" / "evaluation.json").read_text())
    base = {"rows": [new_row("base", "none", "sst2", 0)], "curve": stored["curve"]}
    (tmp_path / "runs" / "base").mkdir()
    for name, content in (("base", base), ("gm", stored)):
        content["refusals"] = [{**refused, "rate": 0.25, "low": 0.11, "high": 0.47}]
        (tmp_path / "runs" / name / "evaluation.json").write_text(json.dumps(content))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Robust accuracy under PGD on the embeddings (20 steps, starts: 3)" in page
    assert "Accuracy against attack success rate" in page
    assert "80 rows of the data were left out: excluded by the configuration" in page
    assert '<h2 id="backdoor">' in page
    with (tmp_path / "tables" / "backdoors.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["method"], line["success"], line["without_trigger"]) for line in lines] == [
        ("fedavg", "0.9", "0.1"),
        ("gm", "0.9", "0.1"),
    ]
    with (tmp_path / "tables" / "robustness.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3 * 13
    assert '<h2 id="refusals">' in page
    assert "<td>25.0<small>[11.0, 47.0]</small><small>n = 20, 1 empty</small></td>" in page
    with (tmp_path / "tables" / "refusals.csv").open() as file:
        assert [(line["method"], line["refused"], line["empty"]) for line in csv.DictReader(file)] == [
            ("base", "0.25", "1"),
            ("gm", "0.25", "1"),
        ]
    names = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert {"robustness-backdoor-0.3-sst2.png", "trade-off-backdoor-0.3-sst2.png"} <= names
