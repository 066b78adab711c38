"""Values from records as what they should be, or as unknown: records can be old, half written or hostile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

Record: TypeAlias = Mapping[str, Any]


def number(value: object) -> float | None:
    """The value as a finite float, None for anything else (null, text, NaN, true)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        converted = float(value)
    except OverflowError:
        return None
    return converted if math.isfinite(converted) else None


def share(value: object) -> float | None:
    """The value as a number within 0..1, None for what is no finite number."""
    found = number(value)
    return None if found is None else min(max(found, 0.0), 1.0)


def count(value: object) -> int:
    """The value as a whole number >= 0, 0 for anything else."""
    found = number(value)
    return 0 if found is None else max(int(found), 0)


def client_ids(values: object) -> list[int]:
    """The whole numbers of a list or of a mapping's keys, others left out."""
    found = []
    for value in values if isinstance(values, Iterable) and not isinstance(values, str) else ():
        try:
            found.append(int(value))
        except (TypeError, ValueError, OverflowError):
            continue
    return found
