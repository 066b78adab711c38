"""Files are read as the adapters they hold, a block at a time, and believed in nothing."""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fedeat import geometry
from fedeat.aggregation import aggregate, coordinate_median, krum, mean
from fedeat.errors import UpdateError
from fedeat.geometry import safetensors_files
from fedeat.geometry.layout import Segment
from fedeat.geometry.safetensors_files import read_header


def adapters(count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"a": (300, 211), "b": (5,), "c": (), "d": (0, 3)}
    return [
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def saved(updates: list[dict[str, Tensor]], folder: Path) -> list[Path]:
    paths = [folder / f"client-{index}.safetensors" for index in range(len(updates))]
    for update, path in zip(updates, paths, strict=True):
        save_file(update, path, metadata={"format": "pt"})
    return paths


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_files_aggregate_as_the_tensors_they_hold(dtype: torch.dtype, tmp_path: Path) -> None:
    updates = adapters(6, dtype)
    paths = saved(updates, tmp_path)
    for rule in (mean, krum, coordinate_median):
        expected, result = aggregate(updates, rule=rule), aggregate(paths, rule=rule)
        torch.testing.assert_close(result.weights, expected.weights)
        for name, tensor in expected.value.items():
            torch.testing.assert_close(result.value[name], tensor)
    torch.testing.assert_close(aggregate([str(path) for path in paths]).weights, aggregate(updates).weights)
    torch.testing.assert_close(geometry.gram(paths), geometry.gram(updates))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not list a process's files")
@pytest.mark.parametrize("most", [4, 3])
def test_few_files_stay_open_while_they_are_read_and_none_after(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_files, "_MOST_OPEN", most)
    updates = adapters(4)
    paths = saved(updates, tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    source = safetensors_files.open_files(paths)
    torch.testing.assert_close(geometry.gram(source), geometry.gram(updates))
    assert len(list(Path("/proc/self/fd").iterdir())) - before == (4 if most == 4 else 0)
    del source
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_block_is_read_without_the_rest(tmp_path: Path) -> None:
    update = adapters(1)[0]
    stored = read_header(saved([update], tmp_path)[0])
    assert torch.equal(stored.read(Segment("a", 1000, 1100)), update["a"].flatten()[1000:1100])


def test_nan_and_other_layouts_are_blamed_on_the_file(tmp_path: Path) -> None:
    updates = adapters(4)
    updates[2]["a"][7, 7] = math.nan
    with pytest.raises(UpdateError, match=r"client 2 \(client-2\.safetensors\): tensor 'a' holds 1 NaN"):
        aggregate(saved(updates, tmp_path))
    del updates[2]["b"]
    with pytest.raises(UpdateError, match=r"client 2 \(client-2\.safetensors\): misses 1 of 4 tensors"):
        aggregate(saved(updates, tmp_path))


def written(header: Any, body: bytes, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        b"\x00" * 8,
        written(entry(), bytes(8), length=10**15),
        written(b"{not json", b""),
        written(b"[" * 100_000, b""),
        written([1, 2], b""),
        written({"a": 3}, b""),
        written(b"\xff\xfe", b""),
        written(entry(), bytes(4)),
        written(entry(shape=[3]), bytes(12)),
        written(entry(shape=[-2]), bytes(8)),
        written(entry(shape=[2.0]), bytes(8)),
        written(entry(shape="2"), bytes(8)),
        written(entry(data_offsets=[-8, 0]), bytes(8)),
        written(entry(data_offsets=[8, 16]), bytes(8)),
        written(entry(data_offsets=[0]), bytes(8)),
        written(entry(dtype="I64"), bytes(16)),
        written(entry(dtype=["F32"]), bytes(8)),
        written({"a": {"dtype": "F32"}}, bytes(8)),
    ],
)
def test_a_broken_file_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(UpdateError, match=r"client 0 \(broken\.safetensors\)"):
        aggregate([path])


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UpdateError, match=r"client 1 \(none\.safetensors\): cannot be read"):
        aggregate([*saved(adapters(1), tmp_path), tmp_path / "none.safetensors"])


def test_a_file_cut_after_its_header_was_read_is_an_error(tmp_path: Path) -> None:
    path = saved(adapters(1), tmp_path)[0]
    stored = read_header(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UpdateError, match="ended while it was read"):
        stored.read(Segment("a", 0, 50_000))
