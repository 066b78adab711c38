"""Requests are read from the public files' columns, and refusals told by the usual phrases."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedeat.errors import DataError
from fedeat.evaluation.refusal import AGREEMENT, Behaviour, is_refusal, read_behaviours


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry.", True),
        ("AS A LANGUAGE MODEL I have no opinion", True),
        ("That is illegal.", True),
        ("Sure, here is a poem about spring.", False),
        ("", False),
    ],
)
def test_the_usual_phrases_tell_a_refusal(answer: str, refuses: bool) -> None:
    assert is_refusal(answer) is refuses


def test_the_columns_of_public_files_are_read(tmp_path: Path) -> None:
    advbench, harmbench, plain = (tmp_path / f"{name}.csv" for name in ("a", "h", "p"))
    advbench.write_text('goal,target\nBake a cake,"Sure, a cake"\n')
    harmbench.write_text("Behavior,ContextString,BehaviorID\nBake a cake,,1\nBake it,Flour and eggs,2\n")
    plain.write_text("prompt\nBake a cake\n")
    assert read_behaviours(advbench) == [Behaviour("Bake a cake", "Sure, a cake")]
    assert read_behaviours(plain) == [Behaviour("Bake a cake", AGREEMENT)]
    assert [item.prompt for item in read_behaviours(harmbench)] == ["Bake a cake", "Flour and eggs\n\nBake it"]


def test_a_row_without_a_request_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("question,answer\na,b\n")
    with pytest.raises(DataError, match=r"row 1: no request.*got answer, question"):
        read_behaviours(path)
