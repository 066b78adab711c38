"""What client updates look like: names, shapes and dtypes, and who is at fault when they do not fit together.

The layout most clients agree on is taken as the expected one, so a single malformed update is blamed on the client
that sent it, wherever it stands in the list.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from fedeat.errors import UpdateError

FACTOR = re.compile(r"^(?P<module>.*)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<rest>\..*)?$")
"""PEFT's names of LoRA factors: `*.lora_A.weight` (r, k) and `*.lora_B.weight` (d, r), and their variants."""


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of one tensor of an update."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @cached_property
    def numel(self) -> int:
        """Number of coordinates."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"shape {self.shape} and dtype {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Segment:
    """Coordinates `start:stop` of the flattened tensor `name`."""

    name: str
    start: int
    stop: int


Layout: TypeAlias = Mapping[str, Spec]
Piece: TypeAlias = Tensor | Sequence[Tensor]
"""Coordinates of all clients in their own dtype: rows (n, c) where they lie like that, else n vectors (c,)."""


class UpdateSource(Protocol):
    """n updates of one layout.

    Attributes:
        labels: what each client is called in messages, for example "client 3".
        layout: name -> shape and dtype of every tensor, in the order of reading.
        device: where the tensors are.
    """

    @property
    def labels(self) -> Sequence[str]: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def device(self) -> torch.device: ...

    def split(self, name: str, width: int) -> Iterator[Piece]:
        """A tensor of all clients, at most `width` coordinates at a time."""

    def piece(self, segment: Segment) -> Piece:
        """Some coordinates of one tensor of all clients."""

    def addresses(self) -> Mapping[str, Sequence[int]]:
        """Where each client's tensor lies, for those that are float32 without gaps in main memory, and stay there."""

    def one(self, client: int, name: str) -> Tensor:
        """One client's tensor, in its own shape and dtype; the caller must not write to it."""

    def select(self, clients: Sequence[int]) -> UpdateSource:
        """The source restricted to these clients."""

    def restrict(self, names: Sequence[str]) -> UpdateSource:
        """The source restricted to these tensors."""

    def assemble(self, tensors: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Tensors of the layout as a value of the kind one update has."""


def agree(layouts: Sequence[Layout], labels: Sequence[str], *, any_rank: bool = False) -> Layout:
    """The layout most clients have, when all have it; the order of names is the first such client's.

    Args:
        layouts: one a client.
        labels: what each client is called.
        any_rank: whether LoRA factors of different ranks fit together.

    Raises:
        UpdateError: a client differs from it, or it holds no coordinate.
    """
    compared = [_without_ranks(layout) for layout in layouts] if any_rank else layouts
    kinds = [frozenset(layout.items()) for layout in compared]
    first = kinds.index(Counter(kinds).most_common(1)[0][0])
    faults = {i: _mismatch(layout, compared[first]) for i, layout in enumerate(compared) if kinds[i] != kinds[first]}
    blame(faults, labels)
    if all(spec.numel == 0 for spec in layouts[first].values()):
        raise UpdateError(f"every update is empty: {len(layouts)} clients, no coordinate to aggregate")
    return layouts[first]


def _without_ranks(layout: Layout) -> Layout:
    """The layout with every LoRA rank written as zero."""
    changed = {}
    for name, spec in layout.items():
        match = FACTOR.match(name)
        if match is not None and len(spec.shape) > 1:
            shape = (0, *spec.shape[1:]) if match["side"] == "A" else (spec.shape[0], 0, *spec.shape[2:])
            spec = replace(spec, shape=shape)
        changed[name] = spec
    return changed


def _mismatch(layout: Layout, expected: Layout) -> str:
    """First way in which a layout is not the expected one."""
    missing, extra = [n for n in expected if n not in layout], [n for n in layout if n not in expected]
    if missing:
        return f"misses {len(missing)} of {len(expected)} tensors, first {missing[0]!r}"
    if extra:
        return f"has {len(extra)} unknown tensors, first {extra[0]!r}"
    name = next(name for name in expected if layout[name] != expected[name])
    return f"{title(name)} has {layout[name]}, most clients have {expected[name]}"


def title(name: str) -> str:
    """What a tensor is called in messages."""
    return f"tensor {name!r}" if name else "its tensor"


def blame(faults: Mapping[int, str], labels: Sequence[str]) -> None:
    """Raises one error that names every client at fault, if there is any.

    Raises:
        UpdateError: there is one.
    """
    if faults:
        lines = [f"{labels[index]}: {reason}" for index, reason in sorted(faults.items())]
        remedy = "leave these clients out or repair their updates"
        raise UpdateError("\n  - ".join([f"{len(lines)} unusable client update(s), {remedy}:", *lines]))
