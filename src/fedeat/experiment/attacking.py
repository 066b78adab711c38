"""Attacks on a finished model: texts into pairs, and robust accuracy along the radius."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fedeat import seeding
from fedeat.attacks import adaptive_text, neighbours, text
from fedeat.attacks.embedding import robustness_curve, suspicions
from fedeat.attacks.pairs import pair_rows
from fedeat.attacks.text import Attacked
from fedeat.errors import DataError
from fedeat.evaluation import EvaluationSet, Item
from fedeat.experiment.side_by_side import Tell
from fedeat.model import AdaptedModel

__all__ = ["KINDS", "WITHOUT_MODEL", "attack_texts", "curve", "pair_rows", "texts_of"]

WITHOUT_MODEL = ("typos", "distraction")
KINDS = (*WITHOUT_MODEL, "substitution", "adaptive", "embedding")
"""Each attack that the command line can name; those on texts are `attack_texts`'."""


def texts_of(sets: Sequence[EvaluationSet], *, limit: int | None = None) -> list[Item]:
    """The texts of evaluation files to attack: benign ones, and the distinct originals of pairs.

    Args:
        sets: what the files hold.
        limit: texts taken of each file, drawn at random, the same in every run; None for all.

    Raises:
        DataError: there is no text whose words can be told from its prompt.
    """
    found: list[Item] = []
    for number, entry in enumerate(sets):
        originals = {(pair.task, pair.group): pair.original for pair in entry.pairs}
        items = [*entry.benign, *originals.values()]
        order = torch.randperm(len(items), generator=seeding.generator(0, "attacked", number)).tolist()
        kept = sorted(order[: len(items) if limit is None else limit])
        found += [items[i] for i in kept if items[i].texts is not None]
    if not found:
        raise DataError(
            "there is no text to attack: of prompts in another wording than TrustLLM's the texts cannot be told. Give "
            "GLUE rows, such as SST-2's sentence and label."
        )
    return found


def attack_texts(
    kind: str,
    items: Sequence[Item],
    model: AdaptedModel | None,
    *,
    rate: float,
    budget: int = 300,
    batch_size: int = 32,
    seed: int = 0,
    progress: Tell = lambda stage, done, total: None,
) -> list[Attacked]:
    """Texts under one of the attacks that `KINDS` names.

    Args:
        kind: but for "embedding".
        items: labelled texts.
        model: what is attacked; None for an attack that needs none.
        rate: 0 < rate <= 1, share of a text's words at most.
        budget: of the adaptive attack, texts put to the model for one text.
        batch_size: texts a forward pass.
        seed: of everything random.
        progress: told about texts done.
    """

    def known() -> AdaptedModel:
        if model is None:
            raise ValueError(f"the attack {kind!r} needs a model")
        return model

    attacks: Mapping[str, Callable[[], list[Attacked]]] = {
        "typos": lambda: text.typos(items, rate=rate, seed=seed),
        "distraction": lambda: text.distractions(items, seed=seed),
        "substitution": lambda: text.substitutions(
            items, neighbours.embedding_neighbours(known()), rate=rate, seed=seed
        ),
        "adaptive": lambda: adaptive_text.greedy_substitution(
            items,
            adaptive_text.asked(known(), batch_size=batch_size),
            neighbours.embedding_neighbours(known()),
            rate=rate,
            budget=budget,
            progress=functools.partial(progress, "attack"),
        ),
    }
    return attacks[kind]()


def curve(
    model: AdaptedModel,
    items: Sequence[Item],
    *,
    radii: Sequence[float],
    steps: int,
    restarts: int,
    batch_size: int = 32,
    seed: int = 0,
    progress: Tell = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Robust accuracy along the radius as a record: its points, its settings, and what is suspicious about it."""
    points = robustness_curve(
        model,
        items,
        radii=radii,
        steps=steps,
        restarts=restarts,
        batch_size=batch_size,
        seed=seed,
        progress=functools.partial(progress, "attack"),
    )
    return {
        "steps": steps,
        "restarts": restarts,
        "points": [point.record() for point in points],
        "suspicions": suspicions(points),
    }
