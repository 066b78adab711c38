"""White-box curves: the model's own answers at radius 0, attacks as strong as they should be, and honest suspicions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fedeat.attacks.embedding import CurvePoint, _Puzzle, robustness_curve, suspicions
from fedeat.evaluation import predict, tasks
from fedeat.evaluation.tasks import Item
from fedeat.model import AdaptedModel

Load = Callable[..., AdaptedModel]

WORDS = ("the", "film", "was", "good", "and", "story", "bright", "a", "dull", "with", "bad", "is", "answer")


def texts(task: str, count: int) -> list[Item]:
    """Texts of words that the tiny tokenizers know, and labels in turn."""
    generator = torch.Generator().manual_seed(5)

    def sentence() -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (6,), generator=generator).tolist())

    fields = tasks.named(task).fields
    classes = len(tasks.named(task).answers)
    return [tasks.item({**{f: sentence() for f in fields}, "label": n % classes}, task) for n in range(count)]


def model_and_texts(load: Load, name: str, count: int) -> tuple[AdaptedModel, list[Item]]:
    """A tiny model, and texts of two tasks labelled so that it has most right."""
    model = load(name, max_length=64)
    items = [*texts("sst2", count), *texts("mnli", count // 2)]
    answers = predict(model, [tasks.example(item, model.kind) for item in items])
    # The first of each task keeps its label, right or wrong.
    labels = [
        item.label if n in (0, count) else answer for n, (item, answer) in enumerate(zip(items, answers, strict=True))
    ]
    return model, [replace(item, label=label or 0) for item, label in zip(items, labels, strict=True)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-classifier", "llama-classifier"])
def test_without_a_perturbation_a_text_is_right_where_the_evaluation_has_it_right(load: Load, name: str) -> None:
    model, items = model_and_texts(load, name, 8)
    for task in ("sst2", "mnli"):
        own = [item for item in items if item.task == task]
        answers = predict(model, [tasks.example(item, model.kind) for item in own])
        with torch.no_grad():
            right = _Puzzle.of(model, own).right(None).tolist()
        assert right == [item.label == answer for item, answer in zip(own, answers, strict=True)]


@pytest.mark.parametrize("name", ["llama", "bert-classifier"])
def test_a_perturbation_acts_on_each_text_as_if_it_were_alone(load: Load, name: str) -> None:
    model, items = model_and_texts(load, name, 4)
    own = [item for item in items if item.task == "mnli"] + [items[-1]]
    puzzle = _Puzzle.of(model, own)
    keep = puzzle.prompts.perturbable
    delta = torch.randn(model.embed(puzzle.prompts).shape, generator=torch.Generator().manual_seed(0))
    delta = delta * keep[..., None]
    with torch.no_grad():
        together, plain = puzzle.scores(delta), puzzle.scores(None)
        for row, item in enumerate(own):
            alone = _Puzzle.of(model, [item])
            length = alone.prompts.input_ids.shape[1]
            assert torch.allclose(alone.scores(delta[row : row + 1, :length])[0], together[row], atol=1e-4)
    assert not torch.allclose(together, plain, atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "bert-classifier"])
def test_a_larger_ball_and_the_gradient_break_more(load: Load, name: str) -> None:
    model, items = model_and_texts(load, name, 12)
    told: list[tuple[int, int]] = []
    points = robustness_curve(
        model, items, radii=(1e-7, 0.5), steps=6, restarts=2, batch_size=5, progress=lambda *what: told.append(what)
    )
    assert told[-1][0] == told[-1][1]
    assert [point.kind for point in points if point.radius == 0] == ["none", "none"]
    broken = {(kind, radius): 0 for kind in ("random", "fgsm", "pgd") for radius in (1e-7, 0.5)}
    for point in points:
        assert 0 <= point.broken <= point.right <= point.texts
        if point.kind != "none":
            broken[point.kind, point.radius] += point.broken
    assert all(broken[kind, 1e-7] == 0 for kind in ("random", "fgsm", "pgd"))
    assert broken["pgd", 0.5] >= broken["fgsm", 0.5]
    assert broken["pgd", 0.5] > broken["random", 0.5]
    again = robustness_curve(model, items, radii=(1e-7, 0.5), steps=6, restarts=2, batch_size=5)
    assert again == points


def test_more_restarts_never_break_fewer(load: Load) -> None:
    model, items = model_and_texts(load, "llama", 10)
    one, three = (
        sum(p.broken for p in robustness_curve(model, items, radii=(0.2,), kinds=("pgd",), steps=3, restarts=n))
        for n in (1, 3)
    )
    assert three >= one


def test_a_curve_that_hides_its_gradient_is_suspected() -> None:
    def point(kind: str, radius: float, broken: int) -> CurvePoint:
        return CurvePoint("sst2", kind, radius, 100, 90, broken)

    sound = [point("none", 0, 0), point("random", 0.1, 5), point("pgd", 0.1, 40), point("pgd", 0.2, 39)]
    assert suspicions(sound) == []
    (noise,) = suspicions([point("random", 0.1, 50), point("pgd", 0.1, 40)])
    assert noise.startswith("sst2: random breaks 50 texts at radius 0.1, pgd only 40.")
    (lost,) = suspicions([point("pgd", 0.1, 40), point("pgd", 0.2, 20)])
    assert "A larger ball holds the smaller" in lost


def test_a_points_record_has_its_interval() -> None:
    record = CurvePoint("sst2", "pgd", 0.1, 100, 90, 45).record()
    assert (record["accuracy"], record["asr"]) == (0.45, 0.5)
    assert record["accuracy_low"] < 0.45 < record["accuracy_high"]
    assert CurvePoint("sst2", "pgd", 0.1, 10, 0, 0).record()["asr"] is None
