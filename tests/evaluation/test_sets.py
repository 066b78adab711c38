from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedeat.errors import DataError
from fedeat.evaluation import tasks
from fedeat.evaluation.sets import only, read_evaluation, read_pairs, text_id

SHARED = Path(os.environ.get("FEDEAT_SHARED") or Path(__file__).parents[3] / "shared") / "data"


def half(side: str, sentence: str, *, index: Any = 1, **more: Any) -> dict[str, Any]:
    prompt = tasks.prompt("sst2", {"sentence": sentence})
    row = {"index": index, "task": "sst2", "prompt": prompt, "label": 1, "method": "TextBugger", "type": side}
    return {**row, **more}


PAIR = [half("modified", "a brigth film"), half("original", "a bright film")]


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_trustllm_pair_joins_its_halves_in_any_order(tmp_path: Path) -> None:
    (pair,) = read_pairs(write(tmp_path / "f.json", PAIR))
    assert (pair.original.texts, pair.modified.texts) == (("a bright film",), ("a brigth film",))
    assert (pair.task, pair.index, pair.label, pair.method) == ("sst2", 1, 1, "TextBugger")


def test_pairs_of_one_original_share_a_group_whatever_its_spelling(tmp_path: Path) -> None:
    more = [half("original", "A bright film !", index=2), half("modified", "a film", index=2)]
    first, second = read_pairs(write(tmp_path / "f.json", PAIR + more))
    assert first.group == second.group == text_id("a bright film")


def test_prompt_in_another_wording_keeps_its_text(tmp_path: Path) -> None:
    rows = [{**row, "prompt": f"Good or bad? {row['type']}"} for row in PAIR]
    (pair,) = read_pairs(write(tmp_path / "f.json", rows))
    assert pair.original.prompt == "Good or bad? original"
    assert pair.original.texts is None


def test_annotated_rows_pair_each_text_with_its_original_and_note_those_without(tmp_path: Path) -> None:
    path = write(
        tmp_path / "dev.json",
        {
            "qqp": [
                {"idx": 0, "question1": "Why me ?", "question2": "How ?", "original_question1": "Why ?", "label": 1},
                {"idx": 1, "question1": "Who ?", "question2": "How ?", "label": 1},
            ],
            "mnli-mm": [{"idx": 4, "premise": "a", "hypothesis": "c", "original_hypothesis": "b", "label": "2"}],
        },
    )
    found = read_evaluation(path)
    first, second = found.pairs
    assert (first.original.texts, first.modified.texts) == (("Why ?", "How ?"), ("Why me ?", "How ?"))
    assert (second.task, second.index, second.label) == ("mnli-mm", 4, 2)
    assert found.notes == (f"{path}: 1 qqp rows without an original left out",)


def test_annotated_rows_as_json_lines_are_pairs_too(tmp_path: Path) -> None:
    row = {"sentence": "a flim", "original_sentence": "a film", "label": 0, "method": "typo"}
    (pair,) = read_pairs(write(tmp_path / "f.jsonl", json.dumps(row) + "\n"))
    assert (pair.index, pair.original.texts, pair.method) == (0, ("a film",), "typo")


@pytest.mark.parametrize("name", ["f.json", "f.jsonl", "f.jsonl.gz", "f.csv"])
def test_glue_rows_are_benign_in_every_kind_of_file(tmp_path: Path, name: str) -> None:
    rows = [{"sentence": "a good film", "label": 1}, {"sentence": "a dull film", "label": 0}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(lines.encode()))
    else:
        table = "sentence,label\n" + "".join(f"{row['sentence']},{row['label']}\n" for row in rows)
        write(tmp_path / name, {"f.json": rows, "f.jsonl": lines, "f.csv": table}[name])
    found = read_evaluation(tmp_path / name)
    assert [(item.task, item.texts, item.label) for item in found.benign] == [
        ("sst2", ("a good film",), 1),
        ("sst2", ("a dull film",), 0),
    ]
    assert not found.pairs


def test_benign_file_has_no_pairs_to_read(tmp_path: Path) -> None:
    path = write(tmp_path / "f.json", [{"sentence": "a film", "label": 1}])
    with pytest.raises(DataError, match="no original/modified pairs"):
        read_pairs(path)


def test_named_task_keeps_its_pairs_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "f.json", PAIR)
    assert len(read_evaluation(path, "sst2").pairs) == 1
    with pytest.raises(DataError, match="no qqp pairs; it has sst2"):
        read_evaluation(path, "qqp")


def test_only_leaves_tasks_without_a_head_out_and_says_so(tmp_path: Path) -> None:
    mismatched = {"mnli-mm": [{"premise": "a", "hypothesis": "c", "original_hypothesis": "b", "label": 2}]}
    path = write(
        tmp_path / "dev.json", {"sst2": [{"sentence": "a", "original_sentence": "b", "label": 0}], **mismatched}
    )
    found = only(read_evaluation(path), {"mnli": range(3)})
    assert [pair.task for pair in found.pairs] == ["mnli-mm"]
    assert found.notes == (f"{path}: 1 sst2 rows left out",)


BROKEN: list[tuple[str, Any, str]] = [
    ("one half", PAIR[:1], "row 1: pair sst2 1 has no original half"),
    ("a second half", [*PAIR, PAIR[0]], "row 3: a second modified half of pair sst2 1, whose first is row 1"),
    ("two labels", [PAIR[0], {**PAIR[1], "label": 0}], "rows 2 and 1: pair sst2 1 has label 0 on its original and 1"),
    ("label 2", [PAIR[0], {**PAIR[1], "label": 2}], "row 2: label 2 is no class of sst2"),
    ("label -1", [{**PAIR[0], "label": -1}], "row 1: label -1 is no class of sst2"),
    ("no label", [{k: v for k, v in PAIR[0].items() if k != "label"}], 'row 1: no "label"'),
    ("no index", [{k: v for k, v in PAIR[0].items() if k != "index"}], 'row 1: "index" is None'),
    ("no type", [{k: v for k, v in PAIR[0].items() if k != "type"}], 'row 1: "type" is None'),
    ("unknown type", [{**PAIR[0], "type": "clean"}], """row 1: "type" is 'clean'; expected "original" or"""),
    ("unknown task", [{**PAIR[0], "task": "cola"}], """row 1: "task" is 'cola'; expected one of sst2"""),
    ("prompt no text", [{**PAIR[0], "prompt": 5}], 'row 1: "prompt" is 5'),
    ("empty list", [], "no rows|empty|at least one"),
    ("empty object", {}, 'no "label"'),
    ("numbers", [1, 2], "row 1.*got int"),
    ("a number", 3, "int"),
    ("unknown columns", [{"text": "a", "label": 1}], 'row 1: no task has the columns "text", "label"'),
    ("unknown key", {"cola": [{"sentence": "a", "label": 1}]}, 'unknown task "cola"'),
    ("lists of no rows", {"sst2": ["a"]}, "sst2 row 1: expected an object with columns, got str"),
    ("columns of lists", {"sentence": ["a"], "label": [1]}, 'unknown task "sentence"'),
    ("no originals", {"sst2": [{"sentence": "a", "label": 1}]}, "none of its 1 rows has an original"),
    (
        "original no text",
        [{"sentence": "a", "original_sentence": 4, "label": 1}],
        'row 1: no text in column "sentence"',
    ),
    ("half a file", '[{"sentence": "a", "la', "not valid JSON"),
]


@pytest.mark.parametrize(("content", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_broken_file_is_refused_by_name_and_row(tmp_path: Path, content: Any, message: str) -> None:
    path = write(tmp_path / "broken.json", content)
    with pytest.raises(DataError, match=message) as caught:
        read_evaluation(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_broken_gzip_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_evaluation(tmp_path / "none.json")
    whole = gzip.compress(json.dumps(PAIR).encode())
    (tmp_path / "cut.json.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.json\.gz cannot be read"):
        read_evaluation(tmp_path / "cut.json.gz")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data")
class TestRealFiles:
    def test_every_trustllm_prompt_is_reproduced(self) -> None:
        rows = json.loads((SHARED / "advglue_trustllm.json").read_text())
        for row in rows:
            texts = tasks.split_prompt(row["task"], row["prompt"])
            assert texts is not None
            glue = dict(zip(tasks.TASKS[row["task"]].fields, texts, strict=True))
            assert tasks.prompt(row["task"], glue) == row["prompt"]

    def test_advglue_has_the_known_pairs_and_originals(self) -> None:
        pairs = read_pairs(SHARED / "advglue_trustllm.json")
        assert Counter(pair.task for pair in pairs) == {"sst2": 131, "qqp": 71, "mnli": 121, "qnli": 133}
        originals = Counter(task for task, _ in {(pair.task, pair.group) for pair in pairs})
        assert originals == {"sst2": 62, "qqp": 26, "mnli": 54, "qnli": 62}

    def test_trustllm_pairs_are_those_of_the_annotated_dev_set(self) -> None:
        ours = read_pairs(SHARED / "advglue_trustllm.json")
        annotated = {
            (pair.original, pair.modified, pair.group) for pair in read_pairs(SHARED / "advglue_dev_annotated.json")
        }
        assert {(pair.original, pair.modified, pair.group) for pair in ours} <= annotated

    @pytest.mark.parametrize(("task", "rows"), [("sst2", 872), ("qqp", 7598), ("mnli", 7468), ("qnli", 5463)])
    def test_glue_dev_is_benign(self, task: str, rows: int) -> None:
        found = read_evaluation(SHARED / f"{task}_dev.jsonl.gz")
        assert len(found.benign) == rows
        assert {item.task for item in found.benign} == {task}
