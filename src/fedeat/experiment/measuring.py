"""What is measured of a model at the end of a run, as evaluation.json has it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from fedeat import evaluation
from fedeat.attacks.refusal import refusal_rates
from fedeat.config import Config
from fedeat.evaluation import EvaluationSet
from fedeat.evaluation.refusal import Behaviour, read_behaviours
from fedeat.evaluation.scoring import Scorer
from fedeat.experiment import attacking, binding
from fedeat.model import AdaptedModel

Progress: TypeAlias = Callable[[str, int, int], None]

_log = logging.getLogger(__name__)


def requests(config: Config) -> list[Behaviour]:
    """The harmful requests a configuration names, at most `evaluation.attacked` of each file.

    Raises:
        DataError: a file is broken.
    """
    section = config.evaluation
    return [item for file in section.refusals for item in read_behaviours(file)[: section.attacked]]


def tell_cuts(model: AdaptedModel, sets: Sequence[EvaluationSet], scorer: Scorer) -> None:
    """Says to the log, before any work, which texts the model's maximum length cuts, a line a task.

    Raises:
        ModelError: the answers of a task do not fit into that length, or cannot be told apart.
    """
    for found in evaluation.shown(model, sets, scorer=scorer):
        note = found.note(model.max_length)
        if note:
            _log.log(logging.WARNING if found.is_vacuous else logging.INFO, "%s", note)


def measure(
    config: Config,
    model: AdaptedModel,
    sets: Sequence[EvaluationSet],
    asked: Sequence[Behaviour],
    progress: Progress,
) -> dict[str, Any]:
    """Rows and predictions; the robustness curve where radii are asked for, and refusals where requests are named.

    Args:
        config: the run's.
        model: with its adapter.
        sets: what is evaluated.
        asked: harmful requests.
        progress: told how many texts are answered.
    """
    rows, predictions = evaluate(config, model, sets, progress)
    found: dict[str, Any] = {"rows": rows, "predictions": predictions}
    section = config.evaluation
    if section.radii and sets:
        found["curve"] = attacking.curve(
            model,
            attacking.texts_of(sets, limit=section.attacked),
            radii=section.radii,
            steps=section.attack_steps,
            restarts=section.restarts,
            batch_size=section.batch_size,
            seed=config.seed,
            progress=progress,
        )
    if asked:
        rates = refusal_rates(
            model,
            asked,
            radii=section.radii,
            steps=section.attack_steps,
            batch_size=section.batch_size,
            seed=config.seed,
            progress=functools.partial(progress, "evaluate"),
        )
        found["refusals"] = [rate.record() for rate in rates]
    return found


def evaluate(
    config: Config, model: AdaptedModel, sets: Sequence[EvaluationSet], progress: Progress
) -> tuple[list[evaluation.Row], dict[str, evaluation.TaskPredictions]]:
    """Rows of the results table, and the predictions they were computed from; none where there are no sets."""
    if not sets:
        return [], {}
    return evaluation.evaluate(
        model,
        sets,
        scorer=config.evaluation.scorer,
        batch_size=config.evaluation.batch_size,
        triggered=binding.triggered_function(config),
        progress=functools.partial(progress, "evaluate"),
    )
