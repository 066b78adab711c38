"""What a strategy makes of replies: their arrays and claims read with suspicion, the new model, the round's metrics."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from torch import Tensor

from fedeat import aggregation
from fedeat.aggregation import AnyRule
from fedeat.aggregation.resilience import fitted
from fedeat.errors import UpdateError
from fedeat.flower.arrays import ArraySpec, read_arrays

Values: TypeAlias = dict[str, np.ndarray[Any, Any]]
"""Arrays of a reply by name."""

_LARGEST = 1e100
"""Number beyond which a reply is rejected: squares and sums of larger ones leave float64 for everybody."""


def require_numbers(arrays: Mapping[str, Array]) -> None:
    """Checks that a model can be aggregated.

    Raises:
        UpdateError: it has an array that is neither a number nor a boolean.
    """
    odd = [f"{name!r} ({array.dtype})" for name, array in arrays.items() if np.dtype(array.dtype).kind not in "fiub"]
    if odd:
        raise UpdateError(f"the model holds arrays that cannot be aggregated: {', '.join(odd)}. Expected real numbers.")


def read_reply(content: RecordDict, specs: Mapping[str, ArraySpec]) -> Values:
    """The arrays of a reply, as the model has them.

    Raises:
        UpdateError: it holds another number of records than one, arrays of other names, shapes or dtypes, a NaN or an
            infinity, or numbers that no rule could square.
    """
    if len(content.array_records) != 1:
        raise UpdateError(f"holds {len(content.array_records)} ArrayRecords, expected one")
    values = read_arrays(next(iter(content.array_records.values())), specs)
    for name, value in values.items():
        wide = value.dtype.kind == "f" and value.size and float(np.finfo(value.dtype).max) > _LARGEST
        if wide and float(np.abs(value).max()) > _LARGEST:
            raise UpdateError(f"tensor {name!r} holds numbers beyond {_LARGEST:g}")
    return values


def read_claim(content: RecordDict, key: str) -> float:
    """The number of examples that a reply claims.

    Raises:
        UpdateError: there is none, or it is no positive number.
    """
    found = [record[key] for record in content.metric_records.values() if key in record]
    if len(found) != 1 or isinstance(found[0], list) or not 0 < found[0] < math.inf:
        raise UpdateError(f"claims {str(found)[:80]} as {key!r}, expected one positive number")
    return float(found[0])


def new_model(
    sent: ArrayRecord, replies: Sequence[Values], rule: AnyRule, prior: Sequence[float] | None
) -> tuple[ArrayRecord, list[float], float]:
    """The new model, each reply's weight and the rule's certified gap.

    Args:
        sent: the model that the nodes had.
        replies: arrays as `read_reply` gave them.
        rule: of floating-point arrays; of others each element is the lower median.
        prior: what each reply counts before the rule; None for all the same.

    Raises:
        UpdateError: the rule cannot aggregate them.
    """
    model = {name: array.numpy() for name, array in sent.items()}
    floats = [name for name, value in model.items() if value.dtype.kind == "f" and value.size]
    updates = [{name: _float64(reply[name]) - _float64(model[name]) for name in floats} for reply in replies]
    weights, gap, moved = [1 / len(replies)] * len(replies), math.nan, {}
    if floats:
        result = aggregation.aggregate(updates, rule=fitted(rule, len(updates)), prior_weights=prior)
        weights, gap, moved = result.weights.tolist(), result.gap, result.value
    fresh = {}
    for name, value in model.items():
        if name in moved:
            fresh[name] = (value.astype(np.float64) + moved[name].numpy().reshape(value.shape)).astype(value.dtype)
        elif value.dtype.kind in "iub":
            fresh[name] = np.sort(np.stack([reply[name] for reply in replies]), axis=0)[(len(replies) - 1) // 2]
        else:
            fresh[name] = value
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in fresh.items()}), weights, gap


def median_metrics(contents: list[RecordDict], weight_key: str) -> MetricRecord:
    """Each key's median over the replies that report it as a finite number: one liar moves it little."""
    reported: dict[str, list[float]] = {}
    for content in contents:
        # One value a reply, the first, in however many records it repeats the key.
        own: dict[str, float] = {}
        for key, value in (item for record in content.metric_records.values() for item in record.items()):
            if key != weight_key and not isinstance(value, list) and math.isfinite(value):
                own.setdefault(key, float(value))
        for key, number in own.items():
            reported.setdefault(key, []).append(number)
    # A key that only a minority reports says nothing about the rest.
    usual = {key: values for key, values in reported.items() if 2 * len(values) > len(contents)}
    return MetricRecord({key: statistics.median(values) for key, values in sorted(usual.items())})


def _float64(value: np.ndarray[Any, Any]) -> Tensor:
    """A flat float64 tensor; an array without dimensions becomes one of one element."""
    return torch.from_numpy(value.astype(np.float64).reshape(-1))
