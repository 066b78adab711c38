"""Tensors to Flower's arrays and back, believing nothing that another machine says about itself.

Flower serialises an array in NumPy's `.npy` format. `numpy.load` trusts the header of such a buffer and allocates what
it announces; here the header must be the expected one and the buffer exactly as long as it says, before any of it is
read. Nothing is ever unpickled.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedeat.errors import UpdateError

_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER_BYTES = 10_000
"""Longest header that is parsed; NumPy's own limit."""


@dataclass(frozen=True)
class ArraySpec:
    """What an array must be: its shape and its dtype as NumPy writes it, such as "float32"."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Length of its data."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def header(self) -> bytes:
        """What NumPy writes before its data."""
        return _header(self.shape, self.dtype)


@functools.lru_cache(maxsize=4096)
def _header(shape: tuple[int, ...], dtype: str) -> bytes:
    buffer = io.BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, facts)
    return buffer.getvalue()


def specs_of(record: Mapping[str, Array]) -> dict[str, ArraySpec]:
    """What each array of a record, of one's own, says it is."""
    return {name: ArraySpec(tuple(array.shape), array.dtype) for name, array in record.items()}


def read_array(array: Array, expected: ArraySpec) -> np.ndarray[Any, Any]:
    """The values of an array from elsewhere, read-only.

    Raises:
        UpdateError: it is not exactly what was expected; the message says in what.
    """
    if array.stype != "numpy.ndarray":
        raise UpdateError(f"is serialised as {_shown(array.stype)}, expected numpy.ndarray")
    if tuple(array.shape) != expected.shape:
        raise UpdateError(f"has shape {_shown(tuple(array.shape))}, expected {expected.shape}")
    if array.dtype != expected.dtype:
        raise UpdateError(f"has dtype {_shown(array.dtype)}, expected {expected.dtype}")
    data = array.data
    if not isinstance(data, bytes) or len(data) > expected.nbytes + _HEADER_BYTES:
        raise UpdateError(f"has {len(data)} bytes, expected {expected.nbytes} and a header")
    # The header that an honest sender writes needs no parsing; any other that says the same will do as well.
    if len(data) == len(expected.header) + expected.nbytes and data.startswith(expected.header):
        values = np.frombuffer(data, dtype=expected.dtype, offset=len(expected.header))
        return values.reshape(expected.shape)
    if not data.startswith(_MAGIC):
        raise UpdateError("does not begin as NumPy's format 1.0 does")
    buffer = io.BytesIO(data)
    buffer.seek(len(_MAGIC))
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(buffer, max_header_size=_HEADER_BYTES)
    except Exception as error:  # whatever a hostile header makes the parser raise
        raise UpdateError(f"has an unreadable header ({type(error).__name__})") from None
    wanted = np.dtype(expected.dtype)
    if shape != expected.shape or dtype != wanted or dtype.byteorder not in "=|<" or dtype.hasobject:
        raise UpdateError(f"announces {_shown(shape)} {_shown(dtype)} within, expected {expected.shape} {wanted}")
    if fortran and len(expected.shape) > 1:
        raise UpdateError("is stored by columns, expected by rows")
    if len(data) - buffer.tell() != expected.nbytes:
        raise UpdateError(f"holds {len(data) - buffer.tell()} bytes of data, expected {expected.nbytes}")
    return np.frombuffer(data, dtype=wanted, offset=buffer.tell()).reshape(expected.shape)


def read_arrays(record: Mapping[str, Array], expected: Mapping[str, ArraySpec]) -> dict[str, np.ndarray[Any, Any]]:
    """The values of a record from elsewhere, in the expected order of names.

    Raises:
        UpdateError: names, shapes, dtypes or lengths are not the expected ones, or a float is not finite; the message
            names the first array at fault.
    """
    missing, extra = [n for n in expected if n not in record], [n for n in record if n not in expected]
    if missing:
        raise UpdateError(f"{len(missing)} of {len(expected)} tensors are missing, first {_shown(missing[0])}")
    if extra:
        raise UpdateError(f"{len(extra)} unknown tensors, first {_shown(extra[0])}")
    values = {}
    for name, spec in expected.items():
        try:
            value = read_array(record[name], spec)
        except UpdateError as error:
            raise UpdateError(f"tensor {name!r} {error}") from None
        if value.dtype.kind == "f" and not bool(np.isfinite(value).all()):
            raise UpdateError(f"tensor {name!r} holds a NaN or an infinity")
        values[name] = value
    return values


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as a record of one array a dtype: all their values, in the order of the tensors' names.

    Flower sends each array by requests of its own, however small it is; an adapter has hundreds of tensors. Any dtype
    will do that NumPy has, which bfloat16 is not.
    """
    together = {
        dtype: torch.cat([tensors[name].detach().cpu().flatten() for name in names])
        for dtype, names in _by_dtype(tensors).items()
    }
    return ArrayRecord({dtype: Array(values.numpy()) for dtype, values in together.items()})


def from_record(record: Mapping[str, Array], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A record from elsewhere, as `to_record` makes it, as tensors of the expected names, shapes and dtypes.

    Args:
        record: what arrived.
        expected: tensors that it must resemble; their values do not matter.

    Raises:
        UpdateError: it has not an array of the right length of each dtype and no other, or a float is not finite; the
            message names what is at fault.
    """
    groups = _by_dtype(expected)
    if set(record) != set(groups):
        raise UpdateError(f"holds arrays called {_shown(sorted(record))}, expected {sorted(groups)}")
    found: dict[str, Tensor] = {}
    for dtype, names in groups.items():
        sizes = [expected[name].numel() for name in names]
        try:
            values = read_array(record[dtype], ArraySpec((sum(sizes),), dtype))
        except UpdateError as error:
            raise UpdateError(f"array {dtype!r} {error}") from None
        for name, end, size in zip(names, itertools.accumulate(sizes), sizes, strict=True):
            part = values[end - size : end].reshape(tuple(expected[name].shape))
            if part.dtype.kind == "f" and not bool(np.isfinite(part).all()):
                raise UpdateError(f"tensor {name!r} holds a NaN or an infinity")
            found[name] = torch.from_numpy(part.copy())
    return {name: found[name] for name in expected}


def _by_dtype(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """NumPy's name of a dtype -> the names of its tensors, sorted, so that all machines agree on their order."""
    found: dict[str, list[str]] = {}
    for name in sorted(tensors):
        found.setdefault(str(tensors[name].dtype).removeprefix("torch."), []).append(name)
    return found


def _shown(value: object) -> str:
    """What another machine said, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
