"""Adapters in safetensors files, read block by block.

The format is small enough to read with the standard library: eight bytes of header length, a JSON header with dtype,
shape and byte offsets of each tensor, then the bytes. Headers come from other machines and are believed in nothing:
each entry must lie inside the file and be exactly as long as its shape and dtype say. Reading plain blocks, instead of
mapping files into memory, keeps the resident memory of a server at the size of one block.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedeat.errors import UpdateError
from fedeat.geometry.layout import Layout, Piece, Segment, Spec, UpdateSource, agree, blame

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MOST_HEADER_BYTES = 100_000_000
_READ_BYTES = 4 << 20
"""Largest size of what is held of one tensor of all clients."""
_MOST_OPEN = 256
"""Files that are kept open from one reading to the next: a process may have a thousand, and opening one takes longer
than reading a small tensor."""


@dataclass(frozen=True)
class StoredAdapter:
    """One safetensors file.

    Attributes:
        path: of the file.
        layout: name -> shape and dtype.
        offsets: name -> first byte of the tensor in the file.
        kept: whether the file stays open between readings.
    """

    path: Path
    layout: Layout
    offsets: Mapping[str, int]
    kept: bool = False

    def read(self, segment: Segment) -> Tensor:
        """(c,) coordinates of one tensor, in its own dtype.

        Raises:
            UpdateError: the file cannot be read any more, or has been cut.
        """
        spec = self.layout[segment.name]
        values = torch.empty(segment.stop - segment.start, dtype=spec.dtype)
        view, done = values.view(torch.uint8).numpy().data, 0
        try:
            with nullcontext(self._file) if self.kept else self.path.open("rb", buffering=0) as file:
                file.seek(self.offsets[segment.name] + segment.start * spec.dtype.itemsize)
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise UpdateError(f"{self.path} ended while it was read: send it again")
                    done += count
        except OSError as error:
            raise UpdateError(f"{self.path} cannot be read: {error.strerror or error}") from error
        return values

    @cached_property
    def _file(self) -> FileIO:
        """The open file, closed with the last reference to this."""
        descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, descriptor)
        return FileIO(descriptor, closefd=False)


@dataclass(frozen=True)
class FileSource:
    """One safetensors file a client."""

    files: Sequence[StoredAdapter]
    layout: Layout
    labels: Sequence[str]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def split(self, name: str, width: int) -> Iterator[Piece]:
        numel = self.layout[name].numel
        width = min(width, max(1, _READ_BYTES // (len(self.files) * self.layout[name].dtype.itemsize)))
        for start in range(0, numel, width):
            yield self.piece(Segment(name, start, min(start + width, numel)))

    def piece(self, segment: Segment) -> Piece:
        return [file.read(segment) for file in self.files]

    def addresses(self) -> Mapping[str, Sequence[int]]:
        return {}

    def one(self, client: int, name: str) -> Tensor:
        spec = self.files[client].layout[name]
        return self.files[client].read(Segment(name, 0, spec.numel)).reshape(spec.shape)

    def select(self, clients: Sequence[int]) -> UpdateSource:
        labels = [self.labels[client] for client in clients]
        return FileSource([self.files[client] for client in clients], self.layout, labels)

    def restrict(self, names: Sequence[str]) -> UpdateSource:
        return FileSource(self.files, {name: self.layout[name] for name in names}, self.labels)

    def assemble(self, tensors: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        return tensors


def open_files(paths: Sequence[str | Path], *, any_rank: bool = False) -> FileSource:
    """Source that reads one safetensors file a client.

    Args:
        paths: n files.
        any_rank: whether LoRA factors of different ranks fit together.

    Raises:
        UpdateError: a file is missing or no safetensors file, or differs from the others; the message names each.
    """
    labels = [f"client {index} ({Path(path).name})" for index, path in enumerate(paths)]
    files, faults = [], {}
    for index, path in enumerate(paths):
        try:
            files.append(replace(read_header(Path(path)), kept=len(paths) <= _MOST_OPEN))
        except UpdateError as error:
            faults[index] = str(error)
    blame(faults, labels)
    return FileSource(files, agree([file.layout for file in files], labels, any_rank=any_rank), labels)


def read_header(path: Path) -> StoredAdapter:
    """What a safetensors file holds and where.

    Raises:
        UpdateError: it cannot be read or is no valid safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 0 < length <= min(size - 8, _MOST_HEADER_BYTES):
                raise UpdateError("is no safetensors file: expected a header length that fits into the file")
            header = json.loads(file.read(length).decode("utf-8"))
    except OSError as error:
        raise UpdateError(f"cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UpdateError):
            raise
        raise UpdateError("is no safetensors file: its header is no JSON") from error
    if not isinstance(header, dict):
        raise UpdateError("is no safetensors file: its header is no JSON object")
    layout, offsets = {}, {}
    for name, entry in header.items():
        if name != "__metadata__":
            layout[name], offsets[name] = _entry(name, entry, 8 + length, size)
    return StoredAdapter(path, layout, offsets)


def _entry(name: str, entry: Any, base: int, size: int) -> tuple[Spec, int]:
    """Layout and offset of one tensor, checked against the size of the file."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        raise UpdateError(f"tensor {name!r} has no dtype, shape and data_offsets") from error
    if not sound:
        raise UpdateError(f"tensor {name!r} has a shape or offsets that are no counts")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UpdateError(f"tensor {name!r} has dtype {dtype!r}, expected one of {', '.join(_DTYPES)}")
    if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize or base + end > size:
        raise UpdateError(f"tensor {name!r} does not lie inside the file as its header says: send it again")
    return Spec(shape, _DTYPES[dtype]), base + begin
