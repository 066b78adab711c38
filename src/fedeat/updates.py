"""What a client sends back, and the checks an update passes before a rule may see it.

An adapter is a mapping from name to tensor: the LoRA factors and, for classification, the head. A client sends
the *update*, its adapter minus the round's global adapter: in exact arithmetic aggregating updates and
aggregating parameters is the same; in float32 the update keeps the digits that the parameters drown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

Adapter: TypeAlias = Mapping[str, Tensor]
"""Name -> tensor, in PEFT's names. Never mutated once it is in somebody else's hands."""


@dataclass(frozen=True)
class ClientUpdate:
    """One client's answer to one round.

    Attributes:
        client_id: which client.
        delta: local adapter minus global adapter, same names and shapes as the global adapter.
        num_examples: > 0, training examples the client says it used. A claim, not a fact.
        metrics: what the client measured, name -> number.
        failure: why there is no update, from the engine that asked for it; "" where there is one.
    """

    client_id: int
    delta: Adapter
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""


@dataclass(frozen=True)
class Rejection:
    """An update that was not aggregated, and why."""

    client_id: int
    reason: str


def difference(local: Adapter, reference: Adapter) -> dict[str, Tensor]:
    """`local - reference`, tensor by tensor, detached."""
    return {name: (local[name] - reference[name]).detach() for name in reference}


def apply(adapter: Adapter, delta: Adapter) -> dict[str, Tensor]:
    """`adapter + delta`, tensor by tensor, in the adapter's dtypes."""
    return {name: (tensor + delta[name].to(tensor)).detach() for name, tensor in adapter.items()}


def norm(delta: Adapter) -> float:
    """Euclidean length of all tensors as one vector, accumulated in float64."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in delta.values()))


def distance(delta: Adapter, other: Adapter) -> float:
    """Euclidean distance of two updates of the same names and shapes, accumulated in float64."""
    return math.sqrt(sum(float((delta[name].double() - other[name].double()).square().sum()) for name in delta))


def validate(
    updates: Sequence[ClientUpdate], reference: Adapter, cohort: Sequence[int]
) -> tuple[list[ClientUpdate], list[Rejection]]:
    """Splits updates into those fit for aggregation and those rejected, each with its reason.

    An update is rejected when it misses a tensor or brings an unknown one, when a tensor has another shape or
    dtype than the reference or holds a NaN or an infinity, when it claims a non-positive number of examples, or
    when its client was not asked or already answered. A client that was asked and did not answer is rejected too.

    Args:
        updates: the round's answers, in any order.
        reference: the global adapter, whose names, shapes and dtypes count.
        cohort: the clients that were asked.

    Returns:
        The accepted updates sorted by client, so that no sum depends on the order of arrival; the rejections.
    """
    accepted: dict[int, ClientUpdate] = {}
    rejected: list[Rejection] = []
    for update in updates:
        reason = _defect(update, reference)
        if reason is None and update.client_id not in cohort:
            reason = "was not asked in this round"
        if reason is None and update.client_id in accepted:
            reason = "answered twice in one round; the first answer counts"
        if reason is None:
            accepted[update.client_id] = update
        else:
            rejected.append(Rejection(update.client_id, reason))
    answered = {update.client_id for update in updates}
    rejected.extend(Rejection(client_id, "did not answer") for client_id in cohort if client_id not in answered)
    return [accepted[client_id] for client_id in sorted(accepted)], rejected


def _defect(update: ClientUpdate, reference: Adapter) -> str | None:
    """First reason to reject an update, or None."""
    if update.failure:
        return update.failure
    claim = update.num_examples
    if not isinstance(claim, int) or isinstance(claim, bool) or claim <= 0:
        return f"num_examples must be a positive integer, got {claim!r}"
    missing, extra = sorted(reference.keys() - update.delta.keys()), sorted(update.delta.keys() - reference.keys())
    if missing:
        return f"{len(missing)} of {len(reference)} tensors are missing, first {missing[0]!r}"
    if extra:
        return f"{len(extra)} unknown tensors, first {extra[0]!r}"
    for name, expected in reference.items():
        tensor = update.delta[name]
        if tensor.shape != expected.shape:
            return f"tensor {name!r} has shape {tuple(tensor.shape)}, expected {tuple(expected.shape)}"
        if tensor.dtype != expected.dtype:
            return f"tensor {name!r} has dtype {tensor.dtype}, expected {expected.dtype}"
        if not bool(torch.isfinite(tensor).all()):
            return f"tensor {name!r} holds a NaN or an infinity"
    return None
