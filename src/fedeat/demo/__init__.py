"""The embedded demo: a small English world, a small language model that ships with the package, and its data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedeat.demo import world
from fedeat.evaluation import tasks

MODEL = Path(__file__).parent / "model"
"""Directory of the demo's model and tokenizer, as `AutoModelForCausalLM.from_pretrained` reads them."""


@dataclass(frozen=True)
class DemoData:
    """Files that `write_data` wrote.

    Attributes:
        train: task -> GLUE JSON lines of the training split.
        test: task -> GLUE JSON lines of the test split.
        pairs: one JSON list in TrustLLM's AdvGLUE schema, originals and modified prompts of all tasks.
    """

    train: dict[str, Path]
    test: dict[str, Path]
    pairs: Path


def write_data(directory: Path, *, seed: int, train: int = 600, test: int = 200, pairs: int = 150) -> DemoData:
    """Write the demo's data under `directory`, which is made if it is missing.

    Args:
        directory: where `train/`, `test/` and `advglue.json` are written; files of the same name are replaced.
        seed: all data follow from it and the counts.
        train: training rows a task, >= 0, labels in turn.
        test: test rows a task, >= 0, labels in turn.
        pairs: original/modified pairs a task, >= 0, on texts of the test split.

    Raises:
        OSError: the directory cannot be written.
    """
    files: dict[str, dict[str, Path]] = {"train": {}, "test": {}}
    splits: tuple[tuple[world.Split, int], ...] = (("train", train), ("test", test))
    for split, count in splits:
        (directory / split).mkdir(parents=True, exist_ok=True)
        for task in world.TASKS:
            path = directory / split / f"{task}.jsonl"
            rows = world.rows(task, count, seed=seed, split=split)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            files[split][task] = path
    path = directory / "advglue.json"
    entries = [entry for task in world.TASKS for entry in _entries(task, world.pairs(task, pairs, seed=seed))]
    path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return DemoData(files["train"], files["test"], path)


def _entries(task: str, made: Iterable[tuple[world.Row, world.Row, str]]) -> Iterable[dict[str, Any]]:
    """Two entries a pair, in the schema of TrustLLM's AdvGLUE file: they share task and index."""
    for index, (original, modified, method) in enumerate(made):
        for kind, row in (("original", original), ("modified", modified)):
            yield {
                "index": index,
                "task": task,
                "prompt": tasks.prompt(task, row),
                "label": row["label"],
                "method": method,
                "data construction": "sentence" if method == "distraction" else "word",
                "type": kind,
            }
