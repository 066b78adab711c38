"""Figures draw whatever the records hold, and what they draw is what was recorded."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgba

from fedeat.report import calibration_figure
from fedeat.report.cells import read_rows
from fedeat.report.figures import (
    METHOD_COLOURS,
    accuracy_figure,
    conditions_figure,
    legend_columns,
    method_colours,
    method_markers,
    png,
    shorten,
    svg,
)
from fedeat.report.reading import Run, read_run
from fedeat.report.round_figures import curves_figure, partition_figure, weight_bounds, weights_figure
from fedeat.report.tables import result_tables
from fedeat.report.trade_offs import method_curves_figure, scatter_figure

SHARES = {"accuracy": 0.9, "adversarial_accuracy": 0.8}
POINTS = [{"radius": r, "clean_loss": 0.5, "adversarial_loss": 0.5 + r, **SHARES} for r in (0.2, 0.0, 0.05)]


def test_calibration_runs_along_a_logarithmic_radius() -> None:
    figure = calibration_figure(POINTS, 0.05)
    loss, accuracy = figure.axes
    assert loss.get_xscale() == "log"
    adversarial = loss.get_lines()[2]
    assert list(adversarial.get_xdata()) == [0.05, 0.2]
    assert list(adversarial.get_ydata()) == pytest.approx([0.55, 0.7])
    assert accuracy.get_ylabel() == "Accuracy (%)"
    assert png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("recommended", [None, 0.2])
def test_calibration_without_accuracies_shows_the_loss_alone(recommended: float | None) -> None:
    points = [point | {"accuracy": None, "adversarial_accuracy": None} for point in POINTS]
    figure = calibration_figure(points, recommended)
    assert len(figure.axes) == 1
    png(figure)


def test_calibration_of_nothing_is_an_empty_figure() -> None:
    assert png(calibration_figure([], None)).startswith(b"\x89PNG")


def test_marks_of_conditions_stand_at_their_values_and_flagged_ones_are_hollow(new_row: Callable[..., Any]) -> None:
    rows = [new_row(m, a, "sst2", 0) for a in ("none", "sign_flip", "alie", "ipm") for m in ("fedavg", "gm")]
    rows[2] = new_row("fedavg", "sign_flip", "sst2", 0, flags=["constant prediction"])
    tables = result_tables(read_rows(rows)[0])
    (axes,) = conditions_figure(tables, "sst2", "accuracy").axes
    marks = [line for line in axes.get_lines() if line.get_marker() != "None"]
    assert sorted(float(line.get_xdata()[0]) for line in marks) == pytest.approx(
        sorted(100 * row["accuracy"] for row in rows)
    )
    assert [line.get_markerfacecolor() for line in marks].count("white") == 1
    low, high = axes.get_xlim()
    assert low <= min(100 * row["accuracy_low"] for row in rows)
    assert high >= max(100 * row["accuracy_high"] for row in rows)
    assert axes.get_yticklabels()[0].get_text() == "No malicious clients"


def test_a_condition_takes_the_room_of_the_methods_that_it_has(new_row: Callable[..., Any]) -> None:
    cells = [("none", ("fedavg", "eat", "gm", "fedeat")), ("alie", ("fedavg", "gm")), ("ipm", ("gm",))]
    rows = [new_row(method, attack, "sst2", 0) for attack, methods in cells for method in methods]
    (axes,) = conditions_figure(result_tables(read_rows(rows)[0]), "sst2", "accuracy").axes
    marks = [float(line.get_ydata()[0]) for line in axes.get_lines() if line.get_marker() not in ("None", "")]
    across = {float(line.get_ydata()[0]) for line in axes.get_lines() if list(line.get_xdata()) == [0, 1]}
    bounds = list(itertools.pairwise(sorted(across | set(axes.get_ylim()))))
    assert [sum(low < y < high for y in marks) for low, high in bounds] == [4, 2, 1]
    assert list(axes.get_yticks()) == pytest.approx([(low + high) / 2 for low, high in bounds])
    assert bounds[0][1] - bounds[0][0] > bounds[1][1] - bounds[1][0]


def test_a_method_looks_the_same_where_others_of_the_page_are_missing(new_row: Callable[..., Any]) -> None:
    everyone = ["gm", "first", "second"]
    (table,) = result_tables(read_rows([new_row(name, "none", "sst2", 0) for name in ("gm", "second")])[0])
    runs = {name: [{0: 1.0, 1: 0.5}] for name in ("gm", "second")}
    points = [{"radius": r, "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6} for r in (0.0, 0.1)]
    for figure in (
        scatter_figure(table, "sst2", everyone),
        curves_figure(runs, "title", "Loss", everyone),
        method_curves_figure({"gm": points, "second": points}, "title", everyone),
    ):
        (line,) = (line for line in figure.axes[0].get_lines() if line.get_label() == "second")
        assert line.get_color() == method_colours(everyone)["second"]
        assert line.get_marker() == method_markers(everyone)["second"]
    patches = {patch.get_label(): patch for patch in accuracy_figure(table, everyone).legends[0].get_patches()}
    assert patches["second"].get_facecolor() == to_rgba(method_colours(everyone)["second"])
    assert len(set(method_colours(everyone).values())) == 3


def test_figures_leave_no_global_state() -> None:
    before = dict(plt.rcParams)
    svg(calibration_figure(POINTS, 0.05))
    assert dict(plt.rcParams) == before
    assert plt.get_fignums() == []


def test_pictures_are_well_formed_and_repeatable() -> None:
    first = svg(calibration_figure(POINTS, 0.05))
    ElementTree.fromstring(first)
    assert svg(calibration_figure(POINTS, 0.05)) == first


def test_weights_stand_at_their_round_and_client(run_directory: Path) -> None:
    run = read_run(run_directory)
    (axes, _) = weights_figure(run, "$title").axes
    cells = axes.collections[0].get_array()
    assert cells.shape == (3, 10)
    weights = run.rounds[1]["weights"]
    for client in range(10):
        if str(client) in weights:
            assert cells[1, client] == pytest.approx(weights[str(client)])
        else:
            assert np.ma.getmaskarray(cells)[1, client]


def test_malicious_clients_are_framed_and_rejections_crossed(run_directory: Path) -> None:
    run = read_run(run_directory)
    (axes, _) = weights_figure(run, "title").axes
    frames = {round(patch.get_x() + 0.5) for patch in axes.patches}
    assert frames == {client for line in run.rounds for client in line["malicious"]}
    assert len(axes.collections[1].get_offsets()) == sum(len(line["rejected"]) for line in run.rounds) > 0


def test_one_dominant_weight_turns_the_scale_to_a_root() -> None:
    even = Run("a", rounds=({"round": 0, "weights": {"0": 0.5, "1": 0.5}},))
    krum = Run("b", rounds=({"round": 0, "weights": {str(client): float(client == 0) for client in range(8)}},))
    assert weight_bounds([even]) == (0.5, False)
    assert weight_bounds([even, krum]) == (1.0, True)


def test_a_round_without_weights_is_drawn_blank() -> None:
    png(weights_figure(Run("a", rounds=({"round": 0, "cohort": [0, 1], "weights": {}},)), "title"))


def test_a_large_federation_stays_a_small_picture() -> None:
    weights = {str(client): 0.005 for client in range(200)}
    rounds = tuple({"round": index, "weights": weights, "cohort": list(range(200))} for index in range(100))
    assert len(svg(weights_figure(Run("a", rounds=rounds), "title"))) < 200_000
    partition = {client: {f"label {i}": 1.0 + client % 7 for i in range(10)} for client in range(1000)}
    assert len(svg(partition_figure(partition, "title"))) < 500_000


def test_losses_over_many_decades_get_a_logarithmic_axis() -> None:
    flat = curves_figure({"gm": [{0: 1.0, 1: 0.5}]}, "title", "Loss")
    steep = curves_figure({"gm": [{0: 1.0, 1: 500.0}], "fedavg": [{0: 1.0}, {0: 2.0}]}, "title", "Loss")
    assert flat.axes[0].get_yscale() == "linear"
    assert steep.axes[0].get_yscale() == "log"


def test_many_labels_are_gathered_under_other() -> None:
    figure = partition_figure({client: {f"label {i}": 1 + i for i in range(40)} for client in range(3)}, "title")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == 16
    assert labels[-1] == "other"
    heights = sum(patch.get_height() for patch in figure.axes[0].patches)
    assert heights == pytest.approx(3 * sum(range(1, 41)))


def test_methods_keep_their_colours_and_others_differ() -> None:
    colours = method_colours(["krum", "fedeat", "mine"])
    assert colours["fedeat"] == METHOD_COLOURS["fedeat"]
    assert len(set(colours.values())) == 3


def test_a_legend_of_long_names_has_fewer_columns() -> None:
    assert legend_columns(["EAT", "GM", "FedAvg", "FedEAT"], handle=8, limit=4) == 4
    assert legend_columns(["EAT", "a name of 24 letters ..."], handle=8, limit=4) == 1
    assert legend_columns([], handle=8, limit=4) == 1


def test_long_labels_are_cut_to_one_line() -> None:
    assert shorten("a\nb  c") == "a b c"
    assert shorten("x" * 50, 10) == "x" * 9 + "…"
