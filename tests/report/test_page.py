"""The page: complete, self-contained, safe against hostile records, and the same each time."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedeat.errors import RecordError
from fedeat.report import write_report, write_report_for

NewRun = Callable[..., None]
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Outline(HTMLParser):
    """Collects tags, attributes and unbalanced ends of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)


@pytest.fixture(scope="module")
def page(comparison: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("page") / "comparison"
    shutil.copytree(comparison, copy)
    return write_report(copy)


def test_the_page_is_one_file_that_needs_no_network(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    outline = Outline(text)
    assert (outline.open, outline.unbalanced) == ([], [])
    assert len(text) < 2_000_000
    for tag, attributes in outline.tags:
        assert tag not in ("script", "link", "iframe", "object", "form")
        assert (attributes.get("src") or "data:").startswith("data:image/svg+xml;base64,") or tag != "img"
        assert not re.match("[a-z]+:", attributes.get("href") or "")
        assert not any(name.startswith("on") for name in attributes)


def test_every_link_leads_to_a_file_beside_the_page(page: Path) -> None:
    links = [attributes["href"] for tag, attributes in Outline(page.read_text(encoding="utf-8")).tags if tag == "a"]
    assert len(links) >= 5
    assert all((page.parent / str(link)).is_file() for link in links)


def test_every_figure_is_also_a_png(page: Path) -> None:
    images = [attributes for tag, attributes in Outline(page.read_text(encoding="utf-8")).tags if tag == "img"]
    files = list((page.parent / "figures").glob("*.png"))
    assert (
        len(images) == len(files) == 27
    )  # 2 x (accuracy, ASR, curve, loss, accuracy by round), 8 scatters, 8 weights, 1 partition
    assert all(image["alt"] for image in images)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_numbers_flags_and_definitions_stand_on_the_page(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    row = json.loads((page.parent / "results.json").read_text())[0]
    assert f"{100 * row['accuracy']:.1f}" in text
    assert f"{row['broken']}/{row['benign_correct']}" in text
    assert "<strong>†</strong> EAT: sst2 (constant prediction: 98 % positive)." in text
    assert "Attack success rate (ASR)" in text
    assert "8 of 320 client updates were rejected" in text
    assert "minilm-l6" in text
    assert "<dt>Malicious clients</dt><dd>none; sign flip 30\N{NO-BREAK SPACE}%</dd>" in text
    assert '<h2 id="costs">What each condition costs</h2>' in text
    assert "/data/models" not in text


def test_a_flagged_cell_is_never_bold(page: Path) -> None:
    cells = re.findall(r'<td class="flagged">(.*?)</td>', page.read_text(encoding="utf-8"))
    assert len(cells) == 2
    assert not any("<b>" in cell for cell in cells)


def test_the_same_records_give_the_same_bytes(run_directory: Path) -> None:
    first = write_report(run_directory).read_bytes()
    assert write_report(run_directory).read_bytes() == first


def test_hostile_text_is_shown_and_not_obeyed(run_directory: Path) -> None:
    evil = "<script>alert(1)</script>\"'&{{ 7 * 7 }}$x_{"
    rows = json.loads((run_directory / "evaluation.json").read_text())["rows"]
    rows[0] |= {"task": evil, "flags": [evil], "histogram": {evil: 3}, "run": "../../../" + evil}
    rows = [row | {"method": evil, "attack": evil} for row in rows]
    (run_directory / "evaluation.json").write_text(json.dumps({"rows": rows}))
    quoted = json.dumps(evil)
    (run_directory / "config.toml").write_text(f"# {evil}\nmethod = {quoted}\n[model]\nname = {quoted}\n")
    (run_directory / "environment.json").write_text(json.dumps({evil: evil}))
    (run_directory / "partition.json").write_text(json.dumps({"clients": {"0": {"counts": {evil: 4}}}}))
    line = {"kind": "round", "round": 3, "cohort": [0], "weights": {}, "rejected": [{"client": evil, "reason": evil}]}
    with (run_directory / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    page = write_report(run_directory)
    text = page.read_text(encoding="utf-8")
    outline = Outline(text)
    assert (outline.open, outline.unbalanced) == ([], [])
    assert "script" not in {tag for tag, _ in outline.tags}
    assert "{{ 7 * 7 }}" in text.replace("&#34;", '"')
    pictures = [base64.b64decode(str(a["src"]).split(",")[1]).decode() for tag, a in outline.tags if tag == "img"]
    assert pictures
    assert not any("<script" in picture for picture in pictures)
    names = [path.relative_to(page.parent).as_posix() for path in page.parent.rglob("*.png")]
    assert all(re.fullmatch(r"figures/[A-Za-z0-9._-]+\.png", name) for name in names)


def test_a_run_that_has_just_begun_gives_a_page_with_notes(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "rou')
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "no evaluation.json: not evaluated yet" in text
    assert "Nothing has been evaluated yet." in text
    assert "for no round is recorded yet" in text


def test_records_of_the_wrong_shape_give_a_page(run_directory: Path) -> None:
    lines = [
        {"kind": "round", "round": 0, "weights": [1], "cohort": {"a": 1}, "malicious": "xy", "rejected": 3},
        {"kind": "round", "round": 1, "weights": {"x": 1, "2": None, "3": -1, "4": 1e400}, "cohort": [None, 2.5, "7"]},
        {"kind": "round", "round": "two"},
        {"kind": "evaluation", "round": 0, "task": None, "accuracy": None},
        {"kind": "client"},
        {"kind": ["round"], "round": {}},
    ]
    (run_directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "7\n")
    (run_directory / "partition.json").write_text('{"clients": {"a": 1, "0": {"counts": {"x": -3}}, "1": {}}}')
    (run_directory / "timings.jsonl").write_text('{"seconds": "x"}\n{"round": 0, "seconds": 1}\n')
    huge = f'{{"method": "gm", "task": "sst2", "asr": {10**400}, "seed": {10**400}}}'
    (run_directory / "evaluation.json").write_text(f'{{"rows": [{huge}, {{"x": 1}}]}}')
    text = write_report(run_directory).read_text(encoding="utf-8")
    assert "1 result row without method or task left out" in text
    assert "n/a" in text


def test_several_directories_make_one_page(tmp_path: Path, new_run: NewRun) -> None:
    for method in ("gm", "fedeat"):
        new_run(tmp_path / method, method, "none", rounds=1)
    page = write_report_for([tmp_path / "gm", tmp_path / "fedeat"], tmp_path / "out" / "both.html")
    assert page == tmp_path / "out" / "both.html"
    assert "<h1>GM and FedEAT on minilm-l6</h1>" in page.read_text(encoding="utf-8")
    assert not (tmp_path / "gm" / "report.html").exists()


def test_many_conditions_stand_in_a_table_and_a_figure_a_task(tmp_path: Path, new_run: NewRun) -> None:
    attacks = ("none", "sign_flip", "alie", "ipm", "mimic")
    methods = ("fedavg", "gm")
    runs = [(method, attack) for attack in attacks for method in methods]
    for method, attack in runs:
        new_run(tmp_path / f"{method}-{attack}", method, attack)
    page = write_report_for([tmp_path / f"{method}-{attack}" for method, attack in runs], tmp_path / "all")
    text = page.read_text(encoding="utf-8")
    outline = Outline(text)
    assert (outline.open, outline.unbalanced) == ([], [])
    overview, folded, rest = text.partition("A table for each condition")
    assert folded
    assert rest.count('class="caption"') == len(attacks)
    captions = re.findall(r'<p class="caption" [^>]*>(.*?)</p>', overview)
    assert captions == [f"{task} under each condition" for task in ("sst2", "qqp", "qnli", "mnli")]
    assert overview.count('<th class="method condition"') == 4 * len(attacks)
    lines = (page.parent / "tables" / "conditions-qqp.csv").read_text().splitlines()
    assert len(lines) == 1 + len(runs)
    figures = {file.name for file in (page.parent / "figures").glob("*.png")}
    assert {f"{measure}-{task}.png" for measure in ("accuracy", "asr") for task in ("sst2", "mnli")} <= figures
    assert not any(name.startswith("accuracy-alie") for name in figures)


def test_methods_and_conditions_stand_in_one_order_and_a_condition_is_named_once(
    tmp_path: Path, new_run: NewRun
) -> None:
    # Methods stand by name, conditions as they come; nothing may follow the order of directories or of a set.
    runs = [(m, a) for a in ("none", "sign_flip", "backdoor") for m in ("zeta", "beta", "alpha")]
    for method, attack in runs:
        new_run(tmp_path / f"{method}-{attack}", method, attack)
    page = write_report_for([tmp_path / f"{method}-{attack}" for method, attack in runs], tmp_path / "all")
    text = page.read_text(encoding="utf-8")
    methods, tables = ["alpha", "beta", "zeta"], page.parent / "tables"
    conditions = ["sign_flip", "backdoor"]
    with (tables / "costs.csv").open() as file:
        found = [(line["attack"], line["method"]) for line in csv.DictReader(file) if line["task"] == "sst2"]
    assert found == [(attack, method) for attack in conditions for method in methods]
    with (tables / "backdoors.csv").open() as file:
        assert [line["method"] for line in csv.DictReader(file)] == methods
    with (tables / "timings.csv").open() as file:
        names = [line["run"] for line in csv.DictReader(file)]
    assert names == [f"{method}-{attack}" for attack in ("none", *conditions) for method in methods]
    costs = text.partition('<h2 id="costs">')[2].partition('<h2 id="figures">')[0]
    title = "Backdoor, 30\N{NO-BREAK SPACE}% malicious clients"
    assert re.findall(rf'rowspan="(\d+)">{title}</th>', costs) == ["3", "3"]  # of the costs and of the backdoor


def test_an_out_directory_gets_the_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert write_report_for([tmp_path], tmp_path / "out") == tmp_path / "out" / "report.html"


def test_no_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no directory given"):
        write_report_for([], tmp_path)
    with pytest.raises(RecordError):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
