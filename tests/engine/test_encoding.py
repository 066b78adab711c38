"""Updates in fewer bytes: what is lost, what is not, and what a killed run remembers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedeat import experiment
from fedeat.config import load
from fedeat.engine.encoding import Encoding, Residuals, decode, encode, encode_update, encoded_clients, expected, nbytes
from fedeat.errors import RecordError
from fedeat.updates import Adapter, ClientUpdate, norm

ENCODINGS: tuple[Encoding, ...] = ("float32", "float16", "bfloat16", "int8")
BITS = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 1 / 127}


def adapter(seed: int = 0, scale: float = 1e-3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.lora_A.weight": (4, 300), "b.lora_B.weight": (300, 4), "head": (3,), "zero": (2, 2), "empty": (0, 4)}
    found = {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**found, "zero": torch.zeros(2, 2)}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
def test_what_is_lost_is_a_fraction_of_the_largest_number_nearby(encoding: Encoding, scale: float) -> None:
    delta = adapter(scale=scale)
    found = decode(encode(delta, encoding, torch.Generator().manual_seed(1)), delta, encoding)
    for name, tensor in delta.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        error = float((found[name] - tensor).abs().max()) if tensor.numel() else 0.0
        assert error <= 1.01 * BITS[encoding] * largest
    assert not found["zero"].any()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_server_knows_what_tensors_to_expect(encoding: Encoding) -> None:
    delta = adapter()
    encoded, known = encode(delta, encoding, torch.Generator()), expected(delta, encoding)
    assert [(n, t.shape, t.dtype) for n, t in encoded.items()] == [(n, t.shape, t.dtype) for n, t in known.items()]


def test_bytes_halve_and_quarter() -> None:
    delta = {"w": torch.randn(1024, 64)}
    sizes = [nbytes(encode(delta, encoding, torch.Generator())) for encoding in ENCODINGS]
    assert sizes[0] == 4 * 1024 * 64
    assert sizes[1] == sizes[0] // 2 + 4
    assert sizes[2] == sizes[0] // 2
    assert sizes[3] == sizes[0] // 4 + 4 * 1024 * 64 // 256


def test_int8_is_right_on_average() -> None:
    delta = {"w": torch.linspace(-1, 1, 257)}
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([decode(encode(delta, "int8", generator), delta, "int8")["w"] for _ in range(2000)])
    # A step is at most 1/127; the mean of 2000 roundings has a standard error of a hundredth of that.
    assert float((draws.mean(0) - delta["w"]).abs().max()) < 5 / 127 / 2 / 2000**0.5


def still(adapter: Adapter, cohort: Sequence[int], index: int) -> list[ClientUpdate]:
    """Clients whose every update is the same, with numbers far too small for int8 beside a large one."""
    delta = {"w": torch.cat([torch.ones(1), torch.full((255,), 1e-3)])}
    return [ClientUpdate(client, delta, 1, {}) for client in cohort]


def test_error_feedback_lets_no_error_pile_up(tmp_path: Path) -> None:
    reference, total = {"w": torch.zeros(256)}, {}
    for feedback in (True, False):
        store = Residuals(tmp_path) if feedback else None
        run = encoded_clients(still, encoding="bfloat16" if not feedback else "int8", residuals=store, seed=0)
        total[feedback] = sum((run(reference, [0], index)[0].delta["w"] for index in range(20)), torch.zeros(256))
    exact = 20 * still(reference, [0], 0)[0].delta["w"]
    # What is missing after 20 rounds is one round's rounding, however many there were.
    assert float((total[True] - exact).abs().max()) <= 2 / 127


def test_a_round_that_is_run_again_takes_what_was_left_before_it(tmp_path: Path) -> None:
    reference = {"w": torch.zeros(256)}
    run = encoded_clients(still, encoding="int8", residuals=Residuals(tmp_path), seed=0)
    first = [run(reference, [0], index)[0].delta["w"] for index in range(4)]
    assert torch.equal(run(reference, [0], 3)[0].delta["w"], first[3])
    assert sorted(path.name for path in (tmp_path / "client-0000").iterdir()) == [
        "round-0002.safetensors",
        "round-0003.safetensors",
    ]


def test_a_residual_of_other_shapes_is_not_added(tmp_path: Path) -> None:
    store, small, large = Residuals(tmp_path), {"w": torch.linspace(0, 1, 8)}, {"w": torch.linspace(0, 1, 24)}
    encode_update(ClientUpdate(0, small, 1), 0, encoding="int8", residuals=store, seed=0)
    found = encode_update(ClientUpdate(0, large, 1), 1, encoding="int8", residuals=store, seed=0)
    alone = encode_update(ClientUpdate(0, large, 1), 1, encoding="int8", residuals=None, seed=0)
    assert all(torch.equal(found[0][name], alone[0][name]) for name in alone[0])


def test_a_broken_residual_is_named(tmp_path: Path) -> None:
    Residuals(tmp_path).keep(3, 0, {"w": torch.zeros(2)})
    (tmp_path / "client-0003" / "round-0000.safetensors").write_bytes(b"no")
    with pytest.raises(RecordError, match=r"client-0003/round-0000\.safetensors cannot be read"):
        Residuals(tmp_path).before(3, 1)


def test_a_run_records_its_bytes_and_what_rounding_cost(make_config: Callable[..., Path], tmp_path: Path) -> None:
    import json

    seen: dict[str, Any] = {}
    for encoding in ("float32", "int8"):
        config = load(make_config(communication={"encoding": encoding}, evaluation={"data": []}))
        experiment.run(config, tmp_path / encoding)
        lines = map(json.loads, (tmp_path / encoding / "metrics.jsonl").read_text().splitlines())
        seen[encoding] = [line for line in lines if line["kind"] == "client"]
    plain, small = seen["float32"][0], seen["int8"][0]
    assert plain["upload_bytes"] == plain["download_bytes"] == small["download_bytes"]
    assert small["upload_bytes"] < plain["upload_bytes"]
    assert "encoding_error" not in plain
    assert 0 < small["encoding_error"] < 0.1


def test_the_error_reported_is_the_error_made(tmp_path: Path) -> None:
    delta = adapter(3)
    update = ClientUpdate(0, delta, 1, {})
    run = encoded_clients(lambda *arguments: [update], encoding="bfloat16", residuals=None, seed=0)
    found = run(delta, [0], 0)[0]
    error = norm({name: found.delta[name] - delta[name] for name in delta}) / norm(delta)
    assert found.metrics["encoding_error"] == pytest.approx(error)
