"""Rows as examples, by the field names of public instruction sets; batches as values."""

from __future__ import annotations

import math

import pytest
import torch

from fedeat.data import Batch, Example, instruction_examples
from fedeat.errors import DataError


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "Add\n\n1 2", "3"),
        ({"instruction": "Add", "input": "", "output": "3"}, "Add", "3"),
        ({"instruction": "", "input": "1 2", "output": "3"}, "1 2", "3"),
        ({"instruction": "Who?", "context": "He.", "response": "He", "category": "qa"}, "Who?\n\nHe.", "He"),
        ({"prompt": "Who?", "completion": "He"}, "Who?", "He"),
        ({"question": "Who?", "answer": "He", "instruction": None}, "Who?", "He"),
    ],
)
def test_field_names_of_public_sets_are_known(row: dict[str, str], prompt: str, answer: str) -> None:
    assert instruction_examples([row], source="x") == [Example(prompt, answer)]


def test_a_harmful_answer_beside_the_safe_one_is_an_example_to_move_away_from() -> None:
    rows = [
        {"prompt": "request", "safe": "no", "harmful": "steps"},
        {"prompt": "other", "answer": "yes", "harmful": " "},
        {"prompt": "", "safe": "no", "harmful": "steps"},
    ]
    found = instruction_examples(rows, source="x")
    assert found == [Example("request", "no"), Example("request", "steps", away=True), Example("other", "yes")]
    with pytest.raises(DataError, match="row 1: field 'harmful' must be text, got int"):
        instruction_examples([{"prompt": "a", "safe": "b", "harmful": 3}], source="x")


def test_column_becomes_the_group() -> None:
    rows = [{"prompt": "a", "answer": "b", "client": 3}]
    assert instruction_examples(rows, source="x", column="client")[0].group == "3"
    with pytest.raises(
        DataError, match=r"row 1 has nothing in a column 'site' .* Got the columns answer, client, prompt"
    ):
        instruction_examples(rows, source="x", column="site")


def test_nan_is_a_missing_field() -> None:
    nan = math.nan
    row = {"instruction": nan, "prompt": "a", "input": nan, "context": "c", "output": "b", "harmful": nan}
    assert instruction_examples([row], source="x") == [Example("a\n\nc", "b")]
    assert instruction_examples([{**row, "context": nan}], source="x") == [Example("a", "b")]
    with pytest.raises(DataError, match="x, row 2 has none of the fields output"):
        instruction_examples([row, {**row, "output": nan}], source="x")
    with pytest.raises(DataError, match="x, row 1 has nothing in a column 'harmful'"):
        instruction_examples([row], source="x", column="harmful")


@pytest.mark.parametrize("value", [{"a": 1}, 4, ["a"]])
def test_input_that_is_not_text_is_named(value: object) -> None:
    rows = [{"prompt": "a", "input": "", "answer": "b"}, {"prompt": "a", "input": value, "answer": "b"}]
    with pytest.raises(DataError, match="x, row 2: field 'input' must be text, got"):
        instruction_examples(rows, source="x")


def test_rows_without_a_prompt_or_an_answer_are_left_out_and_countable() -> None:
    rows = [
        {"prompt": "a", "answer": "b"},
        {"prompt": "a", "answer": " "},
        {"prompt": "", "answer": "b"},
        {"prompt": " ", "input": "c", "answer": "b"},
    ]
    assert [example.prompt for example in instruction_examples(rows, source="x")] == ["a", "c"]
    with pytest.raises(DataError, match="x: every row has a blank prompt or a blank answer"):
        instruction_examples(rows[1:3], source="x")


def test_row_without_the_fields_is_named() -> None:
    rows = [{"prompt": "a", "answer": "b"}, {"text": "a"}]
    with pytest.raises(DataError, match=r"x, row 2 has none of the fields instruction, .* got text\. Rename"):
        instruction_examples(rows, source="x")
    with pytest.raises(DataError, match="x, row 1: field 'prompt' must be text, got list"):
        instruction_examples([{"prompt": [], "answer": "b"}], source="x")


def test_batch_moves_whole() -> None:
    one = torch.ones(1, 1, dtype=torch.long)
    moved = Batch(one, one, one.bool(), one[0], one[0], one[0], token_type_ids=one).to(torch.device("meta"))
    assert moved.classes is None
    assert all(tensor.is_meta for tensor in vars(moved).values() if tensor is not None)
