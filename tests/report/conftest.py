"""Synthetic records: four methods with and without 30 % sign-flip clients, 10 clients, 5 rounds, 4 tasks."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

METHODS = ("fedavg", "eat", "gm", "fedeat")
TASKS = {"sst2": ("negative", "positive"), "qqp": ("no", "yes"), "qnli": ("yes", "no"), "mnli": ("yes", "maybe", "no")}
PAIRS = {"sst2": 148, "qqp": 78, "qnli": 148, "mnli": 121}
ACCURACY = {"sst2": 0.87, "qqp": 0.79, "qnli": 0.80, "mnli": 0.67}
MALICIOUS = (2, 5, 8)
REASON = 'not finite: tensor "layer.0.lora_A" holds 12 NaN <script>alert(1)</script> $'


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.96
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(centre - reach, 0.0), min(centre + reach, 1.0)


def make_row(method: str, attack: str, task: str, seed: int, **changes: Any) -> dict[str, Any]:
    """A result row of plausible numbers; `accuracy` and `asr` may be given."""
    draw = random.Random(f"{method}{attack}{task}{seed}")
    collapsed = attack != "none" and method in ("fedavg", "eat")
    labels = TASKS[task]
    accuracy = changes.pop("accuracy", None)
    if accuracy is None:
        accuracy = 1 / len(labels) + 0.04 if collapsed or method == "base" else ACCURACY[task]
        accuracy += draw.uniform(-0.025, 0.025)
    asr = changes.pop("asr", {"fedavg": 0.58, "eat": 0.44, "gm": 0.56, "fedeat": 0.36, "base": 0.5}.get(method, 0.55))
    correct = round(PAIRS[task] * accuracy)
    broken = round(correct * min(max(asr + draw.uniform(-0.04, 0.04), 0.0), 1.0)) if asr else 0
    low, high = wilson(accuracy, 872)
    asr_low, asr_high = wilson(broken / correct, max(correct * 3 // 4, 1))
    row = {
        "method": method, "attack": attack, "byzantine_fraction": 0.0 if attack == "none" else 0.3, "task": task,
        "seed": seed, "accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "benign": 872,
        "asr": broken / correct, "asr_low": asr_low, "asr_high": asr_high, "pairs": PAIRS[task],
        "originals": PAIRS[task] // 3, "benign_correct": correct, "broken": broken, "accuracy_original": accuracy,
        "accuracy_modified": accuracy * (1 - broken / correct), "unparsable": 0.0,
        "histogram": {label: PAIRS[task] // len(labels) for label in labels} | {"unparsable": 0}, "flags": [],
        "run": f"runs/{cell_name(method, attack, seed)}",
    }  # fmt: skip
    return row | changes


def make_predictions(row: dict[str, Any]) -> dict[str, Any]:
    """Answers of about a row's accuracy and ASR, to 300 texts and to pairs of which three share an original."""
    draw = random.Random(f"answers{row['method']}{row['attack']}{row['task']}{row['seed']}")
    right, broken = row["accuracy"], row["asr"] or 0.0
    labels = [index % 2 for index in range(300)]
    pairs = []
    for index in range(row["pairs"]):
        label, is_right, falls = index // 3 % 2, draw.random() < right, draw.random() < broken
        original = label if is_right else 1 - label
        modified = 1 - original if falls else original
        pairs.append({"index": index, "group": f"g{index // 3}", "label": label, "method": "word"})
        pairs[-1] |= {"original": original, "modified": modified}
    answers = [label if draw.random() < right else 1 - label for label in labels]
    return {"benign": {"labels": labels, "predictions": answers}, "pairs": pairs}


def make_curve(method: str, seed: int) -> dict[str, Any]:
    """A robustness curve on one task: methods that saw perturbations hold out longer."""
    points = [{"task": "sst2", "kind": "none", "radius": 0.0, "asr": 0.0, **_around(0.85)}]
    for kind, strength in (("random", 0.1), ("fgsm", 1.0), ("pgd", 1.6)):
        for radius in (0.02, 0.05, 0.1, 0.2):
            value = 0.85 * math.exp(-strength * radius * (6 if "eat" in method else 12)) - 0.01 * seed
            points.append({"task": "sst2", "kind": kind, "radius": radius, "asr": 0.0, **_around(value)})
    return {"steps": 20, "restarts": 3, "points": points, "suspicions": []}


def _around(value: float) -> dict[str, float]:
    low, high = wilson(value, 100)
    return {"accuracy": value, "accuracy_low": low, "accuracy_high": high}


def cell_name(method: str, attack: str, seed: int) -> str:
    """Name of a run directory."""
    return f"{method}-{attack}-{0.0 if attack == 'none' else 0.3}-seed{seed}"


def write_json(path: Path, value: object) -> None:
    """Writes one JSON file."""
    path.write_text(json.dumps(value), encoding="utf-8")


def write_run(directory: Path, method: str, attack: str, seed: int = 0, *, rounds: int = 5, clients: int = 10) -> None:
    """A run directory as a finished run leaves it."""
    directory.mkdir(parents=True)
    draw = random.Random(f"{method}{attack}{seed}")
    (directory / "config.toml").write_text(
        f'task = "sequence-classification"\nmethod = "{method}"\nseed = {seed}\n'
        f'[model]\nname = "/data/models/minilm-l6"\n'
        f'[partition]\nkind = "dirichlet"\nclients = {clients}\nalpha = 0.5\nby = "label"\n'
        f"[federation]\nclients_per_round = 8\nrounds = {rounds}\n"
        f'[attack]\nkind = "{attack}"\nfraction = {0.0 if attack == "none" else 0.3}\n',
        encoding="utf-8",
    )
    write_json(directory / "environment.json", {"fedeat": "0.1.0", "threads": 1, "command": ["fedeat", "run"]})
    share = random.Random(seed)
    names = [f"{task}:{label}" for task, labels in TASKS.items() for label in labels]
    held = {client: {name: int(share.expovariate(1 / 40)) for name in names} for client in range(clients)}
    stored = {str(client): {"examples": sum(counts.values()), "counts": counts} for client, counts in held.items()}
    left_out = {"blank": 0, "excluded": 80}
    write_json(directory / "partition.json", {"clients": stored, "left_out": left_out})
    lines: list[dict[str, Any]] = []
    timings = []
    for step in range(rounds):
        cohort = sorted(draw.sample(range(clients), 8))
        bad = [client for client in cohort if attack != "none" and client in MALICIOUS]
        refused = [client for client in bad if client == 5 and method in ("gm", "fedeat")]
        accepted = [client for client in cohort if client not in refused]
        median = method in ("gm", "fedeat")
        raw = {c: (0.02 if median and c in bad else draw.uniform(0.7, 1.3) if median else 1.0) for c in accepted}
        total = sum(raw.values())
        exploding = attack != "none" and not median
        loss = 1.1 * 1.9 ** (step * 2) if exploding else 1.1 * 0.75**step + (0.1 if "eat" in method else 0.0)
        lines.append(
            {
                "kind": "round", "round": step, "cohort": cohort, "accepted": accepted, "malicious": bad,
                "weights": {str(c): value / total for c, value in raw.items()}, "iterations": 7 if median else 1,
                "gap": 3e-11 if median else None, "loss": loss, "update_norm": 0.4,
                "rejected": [{"client": client, "reason": REASON} for client in refused],
            }
        )  # fmt: skip
        lines += [
            {"kind": "client", "round": step, "client": c, "malicious": c in bad, "num_examples": 40, "loss": loss}
            for c in cohort
        ]
        lines += [
            {"kind": "evaluation", "round": step, "task": task, "n": 200,
             "accuracy": 0.4 if exploding else ACCURACY[task] - 0.3 * 0.6**step}
            for task in TASKS
        ]  # fmt: skip
        timings.append({"round": step, "seconds": draw.uniform(8, 11), "peak_memory_bytes": 640 * 2**20})
    write_lines(directory / "metrics.jsonl", lines)
    write_lines(directory / "timings.jsonl", timings)
    rows = [make_row(method, attack, task, seed) for task in TASKS]
    if attack != "none" and method == "eat":
        rows[0] |= {"flags": ["constant prediction: 98 % positive"], "broken": 0}
        rows[0] |= {"asr": 0.0, "asr_low": 0.0, "asr_high": 0.05}
        rows[0]["histogram"] = {"negative": 3, "positive": 145, "unparsable": 0}
        rows[1] |= {"asr": None, "asr_low": None, "asr_high": None, "broken": 0, "benign_correct": 0}
    predictions = {row["task"]: make_predictions(row) for row in rows}
    if attack == "backdoor":
        rows[0] |= {"backdoor": 0.9, "backdoor_low": 0.8, "backdoor_high": 0.95, "backdoor_clean": 0.1}
        rows[0]["backdoor_texts"] = 200
    evaluation = {"rows": rows, "predictions": predictions, "curve": make_curve(method, seed)}
    write_json(directory / "evaluation.json", evaluation)


def write_lines(path: Path, lines: Sequence[object]) -> None:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_comparison(directory: Path, seeds: Sequence[int] = (0,)) -> Path:
    """A finished comparison directory."""
    rows = [make_row("base", "none", task, 0, run="") for task in TASKS]
    for seed in seeds:
        for attack in ("none", "sign_flip"):
            for method in METHODS:
                cell = directory / "runs" / cell_name(method, attack, seed)
                write_run(cell, method, attack, seed)
                rows += json.loads((cell / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    write_json(directory / "results.json", rows)
    write_json(directory / "environment.json", {"fedeat": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "threads": 1})
    (directory / "config.toml").write_text('task = "sequence-classification"\n[model]\nname = "minilm-l6"\n')
    return directory


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison directory; tests leave its records as they are."""
    return write_comparison(tmp_path_factory.mktemp("records") / "comparison")


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """A finished run directory that a test may damage."""
    directory = tmp_path / "run"
    write_run(directory, "fedeat", "sign_flip", rounds=3)
    return directory


@pytest.fixture
def rows(comparison: Path) -> list[dict[str, Any]]:
    """The rows of the comparison."""
    loaded: list[dict[str, Any]] = json.loads((comparison / "results.json").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture
def new_row() -> Callable[..., dict[str, Any]]:
    """Makes a result row: (method, attack, task, seed, **changes)."""
    return make_row


@pytest.fixture
def new_run() -> Callable[..., None]:
    """Writes a run directory: (directory, method, attack, seed, *, rounds, clients)."""
    return write_run
