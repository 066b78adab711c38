"""Client updates as rows that are read block by block, whatever holds them.

A rule needs the updates twice: once for their inner products, once for their combination. Both readings go
through an `UpdateSource`, which yields blocks of coordinates, so that no (n, d) copy is ever made. A source also
settles who is at fault when updates do not fit together: the layout most clients agree on is taken as the
expected one, so a single malformed update is blamed on the client that sent it, wherever it stands in the list.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, cast

import torch
from torch import Tensor

from fedeat.errors import UpdateError
from fedeat.updates import Adapter

Updates: TypeAlias = Tensor | Sequence[Tensor] | Sequence[Adapter] | Sequence[str | Path]
"""A float tensor (n, d); n tensors of one shape; n mappings name -> tensor; or n paths of safetensors files."""

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BLOCK_BYTES = 1 << 20
"""Target size of one (n, c) float32 block: it stays in the cache between being gathered and being multiplied."""


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of one tensor of an update."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
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

    def view(self, segment: Segment) -> Tensor | None:
        """(n, c) coordinates of all clients without a copy, or None where only `gather` can bring them."""

    def gather(self, segment: Segment, out: Tensor) -> None:
        """Copies (n, c) coordinates of all clients into `out`, in its dtype."""

    def one(self, client: int, name: str) -> Tensor:
        """One client's tensor, in its own shape and dtype; the caller must not write to it."""

    def select(self, clients: Sequence[int]) -> UpdateSource:
        """The source restricted to these clients."""

    def assemble(self, tensors: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Tensors of the layout as a value of the kind one update has."""


def open_updates(updates: Updates | UpdateSource) -> UpdateSource:
    """Source that reads `updates`.

    Raises:
        UpdateError: there is no client or no coordinate, or updates differ in names, shapes or dtypes, or a dtype
            is not a float; the message names each client at fault.
    """
    if isinstance(updates, Tensor):
        return _matrix(updates)
    if isinstance(updates, MatrixSource | AdapterSource):
        return updates
    if isinstance(updates, str | bytes | Mapping) or not isinstance(updates, Sequence):
        raise UpdateError(
            f"updates must be a float tensor (n, d) or a list with one update a client, got {type(updates).__name__}"
        )
    if not updates:
        raise UpdateError("no client update to aggregate: expected at least one, got an empty list")
    kinds = [_kind(update) for update in updates]
    kind = Counter(kinds).most_common(1)[0][0]
    _blame({index: f"is a {found}, others are a {kind}" for index, found in enumerate(kinds) if found != kind})
    if kind == "tensor":
        rows = [{"": tensor} for tensor in cast(Sequence[Tensor], updates)]
        return _adapters(rows, plain=True)
    if kind == "mapping":
        return _adapters(cast(Sequence[Adapter], updates), plain=False)
    raise UpdateError(f"an update must be a tensor, a mapping or a path, got {type(updates[0]).__name__}")


def blocks(source: UpdateSource, *, double: bool = False, width: int | None = None) -> Iterator[tuple[Segment, Tensor]]:
    """Yields every coordinate once, as (segment, (n, c) block).

    Blocks are float64 where `double` is set or the tensor is float64, else float32. A block is only valid until
    the next one is asked for, and must not be written to.

    Args:
        source: the updates.
        double: whether to yield float64 whatever the dtype.
        width: most coordinates in a block; by default as many as fill `BLOCK_BYTES`.
    """
    count = len(source.labels)
    width = width or max(1024, min(65536, BLOCK_BYTES // (4 * count) // 1024 * 1024))
    buffers: dict[torch.dtype, Tensor] = {}
    for name, spec in source.layout.items():
        dtype = torch.float64 if double or spec.dtype == torch.float64 else torch.float32
        for start in range(0, spec.numel, width):
            segment = Segment(name, start, min(start + width, spec.numel))
            block = source.view(segment) if spec.dtype == dtype else None
            if block is None:
                if dtype not in buffers:
                    # Rows padded by a cache line: rows a power of two apart would share the same few cache sets.
                    buffers[dtype] = torch.empty(count, width + 16, dtype=dtype, device=source.device)
                block = buffers[dtype][:, : segment.stop - start]
                source.gather(segment, block)
            yield segment, block


@dataclass(frozen=True)
class MatrixSource:
    """Rows of one (n, d) tensor."""

    rows: Tensor
    labels: Sequence[str]

    @property
    def layout(self) -> Layout:
        return {"": Spec((self.rows.shape[1],), self.rows.dtype)}

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def view(self, segment: Segment) -> Tensor | None:
        return self.rows[:, segment.start : segment.stop]

    def gather(self, segment: Segment, out: Tensor) -> None:
        out.copy_(self.rows[:, segment.start : segment.stop])

    def one(self, client: int, name: str) -> Tensor:
        return self.rows[client]

    def select(self, clients: Sequence[int]) -> UpdateSource:
        # Rows are copied only when a client is left out on purpose; evenly spaced rows stay views.
        steps = {right - left for left, right in itertools.pairwise(clients)}
        if len(steps) <= 1 and min(steps, default=1) > 0:
            step = min(steps, default=1)
            rows = self.rows[clients[0] : clients[-1] + 1 : step]
            return MatrixSource(rows, [self.labels[client] for client in clients])
        singles = [{"": self.rows[client]} for client in clients]
        return AdapterSource(singles, self.layout, [self.labels[client] for client in clients], plain=True)

    def assemble(self, tensors: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        return tensors[""]


@dataclass(frozen=True)
class AdapterSource:
    """One mapping name -> tensor a client, in memory."""

    adapters: Sequence[Adapter]
    layout: Layout
    labels: Sequence[str]
    plain: bool

    @property
    def device(self) -> torch.device:
        return next(iter(self.adapters[0].values())).device

    def view(self, segment: Segment) -> Tensor | None:
        return None

    def gather(self, segment: Segment, out: Tensor) -> None:
        for row, adapter in zip(out.unbind(0), self.adapters, strict=True):
            row.copy_(_flat(adapter[segment.name], segment))

    def one(self, client: int, name: str) -> Tensor:
        return self.adapters[client][name].detach()

    def select(self, clients: Sequence[int]) -> UpdateSource:
        labels = [self.labels[client] for client in clients]
        return AdapterSource([self.adapters[client] for client in clients], self.layout, labels, self.plain)

    def assemble(self, tensors: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        return tensors[""] if self.plain else tensors


def _flat(tensor: Tensor, segment: Segment) -> Tensor:
    """Coordinates of one tensor as a vector; a strided tensor is laid out anew, alone and for a moment."""
    return tensor.detach().reshape(-1)[segment.start : segment.stop]


def _matrix(updates: Tensor) -> UpdateSource:
    if updates.ndim != 2:
        raise UpdateError(f"updates must have shape (n, d), one row a client, got shape {tuple(updates.shape)}")
    if updates.shape[0] == 0 or updates.shape[1] == 0:
        raise UpdateError(f"no client update to aggregate: got an empty tensor of shape {tuple(updates.shape)}")
    if updates.dtype not in FLOAT_DTYPES or updates.layout != torch.strided:
        raise UpdateError(f"updates must be dense floats (float32, float64, float16, bfloat16), got {updates.dtype}")
    return MatrixSource(updates.detach(), _names(updates.shape[0]))


def _adapters(adapters: Sequence[Adapter], *, plain: bool) -> UpdateSource:
    faults: dict[int, str] = {}
    layouts: list[Layout] = []
    for index, adapter in enumerate(adapters):
        layout: dict[str, Spec] = {}
        for name, tensor in adapter.items():
            title = _title(name)
            if not isinstance(tensor, Tensor):
                faults.setdefault(index, f"{title} is a {type(tensor).__name__}, expected a float tensor")
            elif tensor.dtype not in FLOAT_DTYPES or tensor.layout != torch.strided:
                faults.setdefault(index, f"{title} has dtype {tensor.dtype}, expected dense floats")
            else:
                layout[name] = Spec(tuple(tensor.shape), tensor.dtype)
        layouts.append(layout)
    _blame(faults)
    expected = agree(layouts, _names(len(layouts)))
    return AdapterSource(adapters, expected, _names(len(adapters)), plain)


def agree(layouts: Sequence[Layout], labels: Sequence[str]) -> Layout:
    """The layout most clients have, when all have it; the order of names is the first such client's.

    Raises:
        UpdateError: a client differs from it, or it holds no coordinate.
    """
    kinds = [frozenset(layout.items()) for layout in layouts]
    common = Counter(kinds).most_common(1)[0][0]
    expected = layouts[kinds.index(common)]
    faults = {i: _mismatch(layout, expected) for i, layout in enumerate(layouts) if kinds[i] != common}
    _blame(faults, labels)
    if not expected or all(spec.numel == 0 for spec in expected.values()):
        raise UpdateError(f"every update is empty: {len(layouts)} clients, no coordinate to aggregate")
    return expected


def _mismatch(layout: Layout, expected: Layout) -> str:
    """First way in which a layout is not the expected one."""
    missing, extra = [n for n in expected if n not in layout], [n for n in layout if n not in expected]
    if missing:
        return f"misses {len(missing)} of {len(expected)} tensors, first {missing[0]!r}"
    if extra:
        return f"has {len(extra)} unknown tensors, first {extra[0]!r}"
    name = next(name for name in expected if layout[name] != expected[name])
    return f"{_title(name)} has {layout[name]}, most clients have {expected[name]}"


def _kind(update: object) -> str:
    if isinstance(update, Tensor):
        return "tensor"
    if isinstance(update, Mapping):
        return "mapping"
    return "path" if isinstance(update, str | Path) else type(update).__name__


def _title(name: str) -> str:
    return f"tensor {name!r}" if name else "its tensor"


def _names(count: int) -> list[str]:
    return [f"client {index}" for index in range(count)]


def _blame(faults: Mapping[int, str], labels: Sequence[str] | None = None) -> None:
    """Raises one error that names every client at fault, if there is any."""
    if faults:
        lines = [f"{labels[i] if labels else f'client {i}'}: {reason}" for i, reason in sorted(faults.items())]
        remedy = "leave these clients out or repair their updates"
        raise UpdateError("\n  - ".join([f"{len(lines)} unusable client update(s), {remedy}:", *lines]))
