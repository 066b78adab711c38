"""Client updates as rows that are read block by block, whatever holds them.

A rule needs the updates twice: once for their inner products, once for their combination. Both readings go
through an `UpdateSource`, which yields blocks of coordinates, so that no (n, d) copy is ever made.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from fedeat.errors import UpdateError
from fedeat.geometry import products
from fedeat.geometry.layout import Layout, Piece, Segment, Spec, UpdateSource, agree, blame, title
from fedeat.geometry.products import PIECE, Stretches, in_place, length
from fedeat.geometry.safetensors_files import FileSource, open_files
from fedeat.updates import Adapter

Updates: TypeAlias = Tensor | Sequence[Tensor] | Sequence[Adapter] | Sequence[str | Path]
"""A float tensor (n, d); n tensors of one shape; n mappings name -> tensor; or n paths of safetensors files."""

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BLOCK_BYTES = 4 << 20
"""Largest size of one (n, c) float32 block, which stays in the cache between being gathered and being multiplied."""


def open_updates(updates: Updates | UpdateSource, *, any_rank: bool = False) -> UpdateSource:
    """Source that reads `updates`.

    Args:
        updates: n updates, or a source already.
        any_rank: whether LoRA factors of different ranks fit together.

    Raises:
        UpdateError: there is no client or no coordinate, or updates differ in names, shapes or dtypes, or a dtype
            is not a float; the message names each client at fault.
    """
    if isinstance(updates, Tensor):
        return _matrix(updates)
    if isinstance(updates, MatrixSource | AdapterSource | FileSource):
        return updates
    if isinstance(updates, str | bytes | Mapping) or not isinstance(updates, Sequence):
        raise UpdateError(
            f"updates must be a float tensor (n, d) or a list with one update a client, got {type(updates).__name__}"
        )
    if not updates:
        raise UpdateError("no client update to aggregate: expected at least one, got an empty list")
    kinds = [_kind(update) for update in updates]
    kind = Counter(kinds).most_common(1)[0][0]
    faults = {index: f"is a {found}, others are a {kind}" for index, found in enumerate(kinds) if found != kind}
    blame(faults, _names(len(kinds)))
    if kind == "tensor":
        rows = [{"": tensor} for tensor in cast(Sequence[Tensor], updates)]
        return _adapters(rows, plain=True, any_rank=False)
    if kind == "mapping":
        return _adapters(cast(Sequence[Adapter], updates), plain=False, any_rank=any_rank)
    if kind == "path":
        return open_files(cast(Sequence[str | Path], updates), any_rank=any_rank)
    raise UpdateError(f"an update must be a tensor, a mapping or a path, got {type(updates[0]).__name__}")


def pieces(source: UpdateSource, *, double: bool = False) -> Iterator[tuple[Sequence[Segment], Tensor | Stretches]]:
    """Yields every coordinate once: as stretches what can be read in place, a segment each, the rest in `blocks`.

    Args:
        source: the updates.
        double: whether to yield float64 blocks whatever the dtype.
    """
    left = {name: spec for name, spec in source.layout.items() if spec.numel > 0}
    if not double:
        whole = [Segment(name, 0, left[name].numel) for name in _readable(source) if name in left]
        if whole:
            yield whole, _stretches(source, whole)
        for segment in whole:
            del left[segment.name]
        for name in [name for name, spec in left.items() if spec.dtype == torch.float32]:
            start = 0
            for piece in source.split(name, left[name].numel):
                read = in_place(piece)
                if read is None:
                    break
                yield [Segment(name, start, start + length(piece))], read
                start += length(piece)
            else:
                del left[name]
    if left:
        yield from blocks(source if len(left) == len(source.layout) else source.restrict(list(left)), double=double)


def sample(source: UpdateSource, segments: Sequence[Segment]) -> Iterator[Tensor | Stretches]:
    """Yields the coordinates of these short segments: as stretches what can be read in place, the rest as float32 rows.

    Args:
        source: the updates.
        segments: none of them empty.
    """
    readable = _readable(source)
    direct = [segment for segment in segments if segment.name in readable]
    if direct:
        yield _stretches(source, direct)
    waiting: list[Piece] = []
    most = BLOCK_BYTES // (4 * len(source.labels))
    for segment in segments:
        if segment.name not in readable:
            waiting.append(source.piece(segment))
            if sum(map(length, waiting)) >= most:
                yield as_rows(waiting, torch.float32)
                waiting.clear()
    if waiting:
        yield as_rows(waiting, torch.float32)


def _readable(source: UpdateSource) -> Mapping[str, Sequence[int]]:
    return source.addresses() if products.COMPILED else {}


def _stretches(source: UpdateSource, segments: Sequence[Segment]) -> Stretches:
    """The coordinates of segments of tensors that can be read in place."""
    addresses, starts = source.addresses(), np.array([segment.start for segment in segments])
    lengths = np.array([segment.stop for segment in segments]) - starts
    return Stretches(np.array([addresses[segment.name] for segment in segments]) + 4 * starts[:, None], lengths, source)


def blocks(source: UpdateSource, *, double: bool = False) -> Iterator[tuple[Sequence[Segment], Tensor]]:
    """Yields every coordinate once, as ((segments of c coordinates in all), (n, c) block).

    Blocks are float64 where `double` is set or the tensor is float64, else float32. Small tensors share a block, for a
    block costs as much time as ten thousand coordinates. A block is only valid until the next one is asked for, and
    must not be written to.

    Args:
        source: the updates.
        double: whether to yield float64 whatever the dtype.
    """
    count = len(source.labels)
    width = PIECE * max(1, min(16, BLOCK_BYTES // (4 * count * PIECE)))
    buffers: dict[torch.dtype, Tensor] = {}
    waiting: list[tuple[Segment, Piece]] = []
    size, kind = 0, torch.float32

    def gathered() -> tuple[Sequence[Segment], Tensor]:
        if kind not in buffers and not (len(waiting) == 1 and _is_rows(waiting[0][1], kind)):
            buffers[kind] = torch.empty(count * width, dtype=kind, device=source.device)
        block = as_rows([piece for _, piece in waiting], kind, buffers.get(kind))
        return [segment for segment, _ in waiting], block

    for name, spec in source.layout.items():
        if spec.numel == 0:
            continue
        dtype = torch.float64 if double or spec.dtype == torch.float64 else torch.float32
        start = 0
        for piece in source.split(name, width):
            stop = start + length(piece)
            if waiting and (size + stop - start > width or dtype != kind):
                yield gathered()
                waiting, size = [], 0
            waiting.append((Segment(name, start, stop), piece))
            size, kind, start = size + stop - start, dtype, stop
    if waiting:
        yield gathered()


def as_rows(pieces: Sequence[Piece], dtype: torch.dtype, buffer: Tensor | None = None) -> Tensor:
    """(n, c) coordinates of all clients in a dtype: the piece itself where it is one and is that, else a copy.

    Args:
        pieces: coordinates of all clients, to be put side by side.
        dtype: wanted.
        buffer: vector of that dtype to copy into, where there is one large enough.
    """
    if len(pieces) == 1 and _is_rows(pieces[0], dtype):
        return cast(Tensor, pieces[0])
    count = len(pieces[0])
    parts = list(pieces[0]) if len(pieces) == 1 else [piece[client] for client in range(count) for piece in pieces]
    if buffer is None:
        return torch.cat(parts).view(count, -1).to(dtype)
    return torch.cat(parts, out=buffer[: count * sum(len(piece[0]) for piece in pieces)]).view(count, -1)


def _is_rows(piece: Piece, dtype: torch.dtype) -> bool:
    return isinstance(piece, Tensor) and piece.dtype == dtype


@dataclass(frozen=True)
class MatrixSource:
    """Rows of one (n, d) tensor."""

    rows: Tensor
    labels: Sequence[str]

    @cached_property
    def layout(self) -> Layout:
        return {"": Spec((self.rows.shape[1],), self.rows.dtype)}

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def split(self, name: str, width: int) -> Iterator[Piece]:
        return iter(torch.split(self.rows, width, dim=1))

    def piece(self, segment: Segment) -> Piece:
        return self.rows[:, segment.start : segment.stop]

    def addresses(self) -> Mapping[str, Sequence[int]]:
        return self._addresses

    @cached_property
    def _addresses(self) -> dict[str, list[int]]:
        found = in_place(self.rows)
        return {} if found is None else {"": found.addresses[0].tolist()}

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

    def restrict(self, names: Sequence[str]) -> UpdateSource:
        return self

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

    def split(self, name: str, width: int) -> Iterator[Piece]:
        flats = self._flat(name)
        if len(flats[0]) <= width:
            return iter([flats])
        # Like `split`, without its checks, which cost more than the copy of a small block.
        return iter(zip(*(flat.unsafe_split(width) for flat in flats), strict=True))

    def piece(self, segment: Segment) -> Piece:
        part = slice(segment.start, segment.stop)
        return [flat[part] for flat in self._flat(segment.name)]

    def _flat(self, name: str) -> list[Tensor]:
        """All clients' tensor of this name as vectors; a strided one is laid out anew."""
        return [adapter[name].detach().reshape(-1) for adapter in self.adapters]

    def addresses(self) -> Mapping[str, Sequence[int]]:
        return self._addresses

    @cached_property
    def _addresses(self) -> dict[str, list[int]]:
        return {name: [tensor.data_ptr() for tensor in tensors] for name, tensors in self._lying.items()}

    @cached_property
    def _lying(self) -> dict[str, list[Tensor]]:
        """The tensors that can be read where they lie, held for as long as their addresses are known."""
        if self.device.type != "cpu":
            return {}
        kept = {name: _kept(self.adapters, name, spec) for name, spec in self.layout.items()}
        return {name: tensors for name, tensors in kept.items() if tensors is not None}

    def one(self, client: int, name: str) -> Tensor:
        return self.adapters[client][name].detach()

    def select(self, clients: Sequence[int]) -> UpdateSource:
        labels = [self.labels[client] for client in clients]
        return AdapterSource([self.adapters[client] for client in clients], self.layout, labels, self.plain)

    def restrict(self, names: Sequence[str]) -> UpdateSource:
        return AdapterSource(self.adapters, {name: self.layout[name] for name in names}, self.labels, self.plain)

    def assemble(self, tensors: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        return tensors[""] if self.plain else tensors


def _matrix(updates: Tensor) -> UpdateSource:
    if updates.ndim != 2:
        raise UpdateError(f"updates must have shape (n, d), one row a client, got shape {tuple(updates.shape)}")
    if updates.shape[0] == 0 or updates.shape[1] == 0:
        raise UpdateError(f"no client update to aggregate: got an empty tensor of shape {tuple(updates.shape)}")
    if updates.dtype not in FLOAT_DTYPES or updates.layout != torch.strided:
        raise UpdateError(f"updates must be dense floats (float32, float64, float16, bfloat16), got {updates.dtype}")
    if updates.device.type == "meta":
        raise UpdateError("updates are on the meta device and hold no numbers")
    return MatrixSource(updates.detach(), _names(updates.shape[0]))


def _adapters(adapters: Sequence[Adapter], *, plain: bool, any_rank: bool) -> UpdateSource:
    shared = _shared_layout(adapters)
    if shared is not None:
        return AdapterSource(adapters, shared, _names(len(adapters)), plain)
    faults: dict[int, str] = {}
    layouts: list[Layout] = []
    devices = Counter(t.device for adapter in adapters for t in adapter.values() if isinstance(t, Tensor))
    device = devices.most_common(1)[0][0] if devices else torch.device("cpu")
    for index, adapter in enumerate(adapters):
        layout: dict[str, Spec] = {}
        for name, tensor in adapter.items():
            if not isinstance(tensor, Tensor):
                faults.setdefault(index, f"{title(name)} is a {type(tensor).__name__}, expected a float tensor")
            elif tensor.dtype not in FLOAT_DTYPES or tensor.layout != torch.strided:
                faults.setdefault(index, f"{title(name)} has dtype {tensor.dtype}, expected dense floats")
            elif tensor.device != device or device.type == "meta":
                faults.setdefault(index, f"{title(name)} is on device {tensor.device}, most tensors are on {device}")
            else:
                layout[name] = Spec(tuple(tensor.shape), tensor.dtype)
        layouts.append(layout)
    blame(faults, _names(len(adapters)))
    expected = agree(layouts, _names(len(layouts)), any_rank=any_rank)
    return AdapterSource(adapters, expected, _names(len(adapters)), plain)


def _kept(adapters: Sequence[Adapter], name: str, spec: Spec) -> list[Tensor] | None:
    """All clients' tensor of this name, if each is float32 without gaps and its mapping's own.

    None where a mapping makes it when asked. Such a tensor is gone with its last reference, and to hold them all would
    be a copy of the updates: they are read name by name.
    """
    tensors = []
    for adapter in adapters:
        tensor = adapter[name]
        if tensor.dtype != torch.float32 or tensor.shape != spec.shape or not tensor.is_contiguous():
            return None
        if adapter[name].data_ptr() != tensor.data_ptr():
            return None
        tensors.append(tensor)
    return tensors


def _shared_layout(adapters: Sequence[Adapter]) -> Layout | None:
    """The layout of all updates; None where they may differ, or one may be at fault, and must be looked at closely.

    Clients send hundreds of small tensors: this look takes a tenth of the time of a full comparison.
    """
    first = adapters[0]
    if not all(isinstance(tensor, Tensor) and tensor.dtype in FLOAT_DTYPES for tensor in first.values()):
        return None
    layout = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in first.items()}
    devices, strided = {tensor.device for tensor in first.values()}, torch.strided
    if len(devices) != 1 or torch.device("meta") in devices or not any(spec.numel for spec in layout.values()):
        return None
    device = devices.pop()
    expected = [(name, tensor.dtype, tensor.shape) for name, tensor in first.items()]
    for adapter in adapters:
        if adapter.keys() != first.keys():
            return None
        for name, dtype, shape in expected:
            tensor = adapter[name]
            if not isinstance(tensor, Tensor) or tensor.dtype is not dtype or tensor.shape != shape:
                return None
            if tensor.device != device or tensor.layout is not strided:
                return None
    return layout


def _kind(update: object) -> str:
    if isinstance(update, Tensor):
        return "tensor"
    if isinstance(update, Mapping):
        return "mapping"
    return "path" if isinstance(update, str | Path) else type(update).__name__


def _names(count: int) -> list[str]:
    return [f"client {index}" for index in range(count)]
