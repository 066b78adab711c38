"""Attacked texts as original/modified pairs in the schema of TrustLLM's AdvGLUE file, and what they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from fedeat.attacks.text import Attacked


def pair_rows(attacked: Iterable[Attacked]) -> list[dict[str, Any]]:
    """Two rows a text, modified and original, which share task and index.

    A text that the attack could not change stands as it is on both sides, so that no denominator loses it. Beside
    TrustLLM's keys: "rate", "queries" and "fell", as `Attacked` has them, on modified rows.
    """
    counts: Counter[str] = Counter()
    rows = []
    for found in attacked:
        item = found.original
        common = {
            "index": counts[item.task],
            "task": item.task,
            "label": item.label,
            "method": found.method,
            "data construction": "sentence" if found.method == "distraction" else "word",
        }
        counts[item.task] += 1
        told = {"rate": round(found.rate, 4), "queries": found.queries, "fell": found.fell}
        rows.append({**common, "prompt": found.modified.prompt, "type": "modified", **told})
        rows.append({**common, "prompt": item.prompt, "type": "original"})
    return rows


def mean_rate(attacked: Sequence[Attacked]) -> float:
    """Mean share of words changed, over the texts that were changed; 0 where none was."""
    rates = [found.rate for found in attacked if found.modified != found.original]
    return sum(rates) / len(rates) if rates else 0.0
