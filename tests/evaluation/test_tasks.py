from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedeat.errors import DataError
from fedeat.evaluation import tasks

ROWS: dict[str, dict[str, Any]] = {
    "sst2": {"sentence": "a dull film .", "label": 0},
    "qqp": {"question1": "Why ?", "question2": "How ?", "label": 0},
    "mnli": {"premise": "It rains .", "hypothesis": "It is wet .", "label": 1},
    "qnli": {"question": "Who ?", "sentence": "Ann did .", "label": 0},
    "rte": {"sentence1": "It rains .", "sentence2": "It is wet .", "label": 1},
}


def test_prompt_is_in_the_wording_of_trustllm() -> None:
    assert tasks.prompt("mnli", ROWS["mnli"]) == (
        "Please identify whether the premise entails the hypothesis. "
        'The answer should be exactly "yes," "maybe," or "no."\n'
        "premise: It rains .\nhypothesis: It is wet . Tell me the answer without any other reasons and explanations."
    )


@pytest.mark.parametrize(
    ("task", "answers"),
    [
        ("sst2", ("negative", "positive")),
        ("qqp", ("no", "yes")),
        ("qnli", ("yes", "no")),
        ("mnli", ("yes", "maybe", "no")),
        ("mnli-mm", ("yes", "maybe", "no")),
        ("rte", ("yes", "no")),
    ],
)
def test_answers_stand_at_their_glue_label(task: str, answers: tuple[str, ...]) -> None:
    assert tasks.TASKS[task].answers == answers


@pytest.mark.parametrize("task", ["sst2", "qqp", "mnli", "qnli"])
def test_columns_tell_the_task(task: str) -> None:
    assert tasks.detect(ROWS[task]) == task


def test_columns_of_rte_tell_no_task_but_a_named_one_counts() -> None:
    with pytest.raises(DataError, match="name the task"):
        tasks.detect(ROWS["rte"])
    assert tasks.detect({**ROWS["rte"], "task": "rte"}) == "rte"


def test_row_without_label_tells_no_task() -> None:
    with pytest.raises(DataError, match='no "label"; got the columns "sentence"'):
        tasks.detect({"sentence": "a film"})


@given(task=st.sampled_from(sorted(tasks.TASKS)), texts=st.lists(st.text(st.characters(exclude_characters="\n"))))
def test_split_prompt_inverts_prompt(task: str, texts: list[str]) -> None:
    fields = tasks.TASKS[task].fields
    row = dict(zip(fields, [*texts, "x", "y"][: len(fields)], strict=True))
    assert tasks.split_prompt(task, tasks.prompt(task, row)) == tuple(row.values())


def test_split_prompt_refuses_another_wording_and_an_ambiguous_one() -> None:
    assert tasks.split_prompt("sst2", "Is this good or bad? a dull film") is None
    twice = tasks.prompt("qnli", {"question": "a\nAnswer: b", "sentence": "c"})
    assert tasks.split_prompt("qnli", twice) is None


@pytest.mark.parametrize("label", [1, "1", " 1 ", 1.0])
def test_label_is_an_integer_or_digits(label: object) -> None:
    assert tasks.label_of("sst2", {"label": label}) == 1


@pytest.mark.parametrize("label", [2, -1, "-1", "positive", "", None, True, 0.5, float("nan"), [1]])
def test_label_of_no_class_is_refused_by_row(label: object) -> None:
    with pytest.raises(DataError, match=r"f\.csv, row 3: .*0 \(negative\) or 1 \(positive\)"):
        tasks.label_of("sst2", {"label": label}, where="f.csv, row 3")


def test_label_minus_one_is_explained() -> None:
    with pytest.raises(DataError, match="without a gold label"):
        tasks.label_of("mnli", {"label": -1})


def test_causal_example_asks_in_words_and_answers_in_one() -> None:
    (example,) = tasks.examples([ROWS["qnli"]], None, "causal-lm")
    assert example.prompt == tasks.prompt("qnli", ROWS["qnli"])
    assert (example.answer, example.label, example.task, example.pair) == ("yes", 0, "qnli", None)


def test_classification_example_is_the_texts_alone() -> None:
    single, double = tasks.examples([ROWS["sst2"], ROWS["qqp"]], None, "sequence-classification")
    assert (single.prompt, single.pair, single.answer, single.label) == ("a dull film .", None, "", 0)
    assert (double.prompt, double.pair, double.task) == ("Why ?", "How ?", "qqp")


def test_group_column_becomes_the_examples_group() -> None:
    rows = [{**ROWS["sst2"], "client": 3}]
    assert tasks.examples(rows, "sst2", "causal-lm", group_column="client")[0].group == "3"
    with pytest.raises(DataError, match='row 1: no "hospital"'):
        tasks.examples(rows, "sst2", "causal-lm", group_column="hospital")
    with pytest.raises(DataError, match='row 2: no "client" to group by'):
        tasks.examples([*rows, {**ROWS["sst2"], "client": math.nan}], "sst2", "causal-lm", group_column="client")


@pytest.mark.parametrize("text", [None, 3, ["a"]])
def test_text_that_is_no_text_is_refused_by_row_and_column(text: object) -> None:
    rows = [ROWS["sst2"], {"sentence": text, "label": 1}]
    with pytest.raises(DataError, match=r'train\.csv, row 2: no text in column "sentence"'):
        tasks.examples(rows, "sst2", "causal-lm", source="train.csv")


def test_named_task_without_its_columns_is_refused() -> None:
    with pytest.raises(DataError, match='"question1", which qqp needs; got the columns "sentence", "label"'):
        tasks.item(ROWS["sst2"], "qqp")


def test_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match='unknown task "cola": expected one of sst2, qqp'):
        tasks.prompt("cola", ROWS["sst2"])


def test_prompt_in_another_wording_is_asked_as_it_is_but_cannot_be_classified() -> None:
    item = tasks.Item("sst2", "Good or bad? a dull film", None, 0)
    assert tasks.example(item, "causal-lm").prompt == "Good or bad? a dull film"
    with pytest.raises(DataError, match="wording is not TrustLLM's"):
        tasks.example(item, "sequence-classification")
