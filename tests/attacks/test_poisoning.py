"""Label flip: no example keeps its answer, and nothing but the answer changes."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from fedeat.attacks.poisoning import flip_labels
from fedeat.data import Example

ANSWERS = {"sst2": ("negative", "positive"), "mnli": ("yes", "maybe", "no")}


@settings(max_examples=80, deadline=None)
@given(
    labels=st.lists(st.tuples(st.sampled_from(["sst2", "mnli", ""]), st.integers(0, 2)), max_size=30),
    seed=st.integers(0, 3),
)
def test_no_example_keeps_its_answer(labels: list[tuple[str, int]], seed: int) -> None:
    examples = [
        Example(f"prompt {i}", ANSWERS[task][label % len(ANSWERS[task])], None, label % len(ANSWERS[task]), task, "g")
        if task
        else Example(f"prompt {i}", f"text {label}")
        for i, (task, label) in enumerate(labels)
    ]
    flipped = flip_labels(examples, answers=ANSWERS, seed=seed)
    assert len(flipped) == len(examples)
    for before, after in zip(examples, flipped, strict=True):
        assert after.answer != before.answer
        assert replace(after, answer=before.answer, label=before.label) == before
        if before.label is not None:
            assert after.label != before.label
            assert after.answer == ANSWERS[before.task][after.label or 0]
    assert flipped == flip_labels(examples, answers=ANSWERS, seed=seed)


def test_classification_examples_have_no_answer_to_flip() -> None:
    flipped = flip_labels([Example("a", label=1, task="sst2")], answers=ANSWERS, seed=0)
    assert flipped == [Example("a", label=0, task="sst2")]


def test_every_wrong_label_is_drawn() -> None:
    flipped = flip_labels([Example("a", "yes", label=0, task="mnli")] * 50, answers=ANSWERS, seed=0)
    assert {example.label for example in flipped} == {1, 2}


def test_lone_free_text_is_negated() -> None:
    assert flip_labels([Example("a", "red")], answers=ANSWERS, seed=0)[0].answer == "not red"
