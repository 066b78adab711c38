"""Arrays from elsewhere: read exactly, or refused with a reason."""

from __future__ import annotations

import io
import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from fedeat.errors import UpdateError
from fedeat.flower.arrays import ArraySpec, from_record, read_array, to_record

SPEC = ArraySpec((2, 3), "float32")


def npy(value: Any, version: tuple[int, int] = (1, 0)) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(value), version=version, allow_pickle=False)
    return buffer.getvalue()


def array(data: bytes, shape: tuple[int, ...] = (2, 3), dtype: str = "float32", stype: str = "numpy.ndarray") -> Array:
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


GOOD = npy(np.arange(6, dtype=np.float32).reshape(2, 3))
FLAT = npy(np.arange(6, dtype=np.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int64, torch.bool])
def test_tensors_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    tensors = {
        "a": torch.randn(3, 4).to(dtype),
        "transposed": torch.randn(3, 4).to(dtype).T,
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.zeros(0, 2, dtype=dtype),
    }
    found = from_record(to_record(tensors), tensors)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (array(GOOD, stype="pickle"), "serialised as 'pickle'"),
        (array(GOOD, shape=(3, 2)), r"has shape \(3, 2\)"),
        (array(GOOD, dtype="float64"), "has dtype 'float64'"),
        (array(GOOD[:-1]), "holds 23 bytes of data, expected 24"),
        (array(GOOD + b"x"), "holds 25 bytes of data, expected 24"),
        (array(b""), "does not begin"),
        (array(npy(np.zeros((2, 3), np.float32), (2, 0))), "does not begin"),
        (array(npy(np.zeros((2, 3), np.float64))), "announces .*float64"),
        (array(npy(np.zeros((2, 3), ">f4"))), "announces"),
        (array(npy(np.zeros((1 << 40, 0), np.float32))), "announces"),
        (array(npy(np.zeros((3, 2), np.float32).T)), "stored by columns"),
        (array(GOOD.replace(b"(2, 3)", b"open()")), "unreadable header"),
        (array(GOOD + b"x" * 20_000), "bytes, expected 24 and a header"),
    ],
)
def test_what_is_not_as_expected_is_refused_with_a_reason(bad: Array, reason: str) -> None:
    with pytest.raises(UpdateError, match=reason):
        read_array(bad, SPEC)


def test_an_announced_terabyte_is_refused_before_it_is_allocated() -> None:
    header = GOOD.replace(b"(2, 3), }            ", b"(1099511627776, 3), }")
    assert header != GOOD
    with pytest.raises(UpdateError, match="announces"):
        read_array(array(header), SPEC)


def test_tensors_of_several_dtypes_travel_as_one_array_each_whatever_their_order() -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "c": torch.tensor([7], dtype=torch.int8), "a": torch.tensor([9.0])}
    record = to_record(tensors)
    assert {name: array.shape for name, array in record.items()} == {"float32": (7,), "int8": (1,)}
    found = from_record(record, dict(sorted(tensors.items())))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_names_and_values_are_checked() -> None:
    expected = {"a": torch.zeros(2), "b": torch.zeros(3)}
    for other in ({"a": torch.zeros(2)}, {**expected, "c": torch.zeros(1)}):
        with pytest.raises(UpdateError, match=r"array 'float32' has shape \([26],\), expected \(5,\)"):
            from_record(to_record(other), expected)
    for other in ({}, {**expected, "c": torch.zeros(1).int()}):
        with pytest.raises(UpdateError, match=r"holds arrays called .*, expected \['float32'\]"):
            from_record(to_record(other), expected)
    with pytest.raises(UpdateError, match="tensor 'a' holds a NaN"):
        from_record(to_record({**expected, "a": torch.tensor([1.0, torch.inf])}), expected)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_are_refused_or_read_as_numpy_would(data: st.DataObject) -> None:
    bad = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    _refused_or_equal(array(bytes(bad)))


def _refused_or_equal(candidate: Array) -> None:
    try:
        value = read_array(candidate, SPEC)
    except UpdateError:
        return
    assert value.shape == SPEC.shape
    assert value.dtype == np.float32
    assert value.tobytes() == candidate.data[-SPEC.nbytes :]


def test_damaged_replies_are_refused_or_of_the_expected_shape() -> None:
    """Every field of a reply damaged at random: bytes, header, shape, dtype, serialisation, names.

    FEDEAT_FUZZ=1000000 is the long run, two minutes of one core.
    """
    count = int(os.environ.get("FEDEAT_FUZZ", "20000"))
    chance = random.Random(0)
    expected = {"a": torch.zeros(2, 3)}
    accepted = 0
    for _ in range(count):
        data, shape, dtype, stype, name = bytearray(FLAT), (6,), "float32", "numpy.ndarray", "float32"
        kind = chance.randrange(8)
        if kind < 3:
            data[chance.randrange(len(data))] = chance.randrange(256)
        elif kind == 3:
            data[chance.randrange(10, 80)] = chance.choice(b"(){}'<>fi48,0123456789OV ")
        elif kind == 4:
            data = data[: chance.randrange(len(data) + 1)] + bytes(chance.randrange(3))
        elif kind == 5:
            shape = tuple(chance.randrange(-2, 1 << 40) for _ in range(chance.randrange(4)))
        elif kind == 6:
            dtype, stype = chance.choice(["float16", "object", "", "O", ">f4"]), chance.choice(["numpy.ndarray", ""])
        else:
            name = chance.choice(["a", "", "int8", "a" * 1000])
        try:
            found = from_record({name: array(bytes(data), shape, dtype, stype)}, expected)
        except UpdateError:
            continue
        accepted += 1
        assert found["a"].shape == (2, 3)
        assert bool(torch.isfinite(found["a"]).all())
    assert 0 < accepted < count / 2  # some damage is only to values, which no format can see


def test_a_record_is_flowers() -> None:
    assert isinstance(to_record({"a": torch.zeros(1)}), ArrayRecord)
