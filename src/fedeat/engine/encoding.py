"""Updates in fewer bytes: half precision, or eight bits in blocks with stochastic rounding and error feedback.

Rounding is unbiased (int8) or to nearest (float16, bfloat16). With error feedback a client adds to its next update what
rounding took from the last one (Seide et al., 2014; Karimireddy et al., 2019), so that errors do not pile up over
rounds. Rules see the decoded updates.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedeat import seeding
from fedeat.algorithm import RunClients
from fedeat.errors import RecordError
from fedeat.updates import Adapter, ClientUpdate, norm

Encoding: TypeAlias = Literal["float32", "float16", "bfloat16", "int8"]
BLOCK = 256
"""Coordinates that share one scale in int8."""
SCALE = "/scale"
"""Ends the name of a tensor's scales; no parameter of a model has a slash in its name."""
_KEPT = 2
_ROUND = re.compile(r"round-(\d+)\.safetensors")


def encode(delta: Adapter, encoding: Encoding, generator: torch.Generator) -> dict[str, Tensor]:
    """An update as the tensors that travel.

    Args:
        delta: float32 tensors, finite.
        encoding: "float32" leaves them as they are. "bfloat16" travels as the int16 of the same bits, since Flower's
            arrays have no such type. "float16" and "int8" have scales beside them, float32, one a tensor or a block.
        generator: of int8's stochastic rounding.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in delta.items():
        if encoding == "float32":
            found[name] = tensor
        elif encoding == "bfloat16":
            found[name] = tensor.to(torch.bfloat16).view(torch.int16)
        elif encoding == "float16":
            largest = float(tensor.abs().max()) if tensor.numel() else 0.0
            # A power of two, so that scaling is exact; the largest then lies in 0.5..1, far from float16's limits.
            scale = 2.0 ** math.frexp(largest)[1] if largest > 0 else 1.0
            found[name] = (tensor / scale).to(torch.float16)
            found[name + SCALE] = torch.tensor([scale], dtype=torch.float32)
        else:
            blocks = _blocks(tensor)
            scales = blocks.abs().amax(1) / 127
            steps = blocks / torch.where(scales > 0, scales, 1.0)[:, None]
            drawn = torch.rand(steps.shape, generator=generator)
            found[name] = (steps + drawn).floor().clamp(-127, 127).to(torch.int8).flatten()[: tensor.numel()]
            found[name + SCALE] = scales
    return found


def expected(reference: Adapter, encoding: Encoding) -> dict[str, Tensor]:
    """Tensors of the names, shapes and dtypes that `encode` gives for an update of `reference`; without values."""
    found: dict[str, Tensor] = {}
    for name, tensor in reference.items():
        if encoding == "int8":
            found[name] = torch.empty(tensor.numel(), dtype=torch.int8, device="meta")
            found[name + SCALE] = torch.empty(-(-tensor.numel() // BLOCK), dtype=torch.float32, device="meta")
        else:
            dtype = {"float32": tensor.dtype, "float16": torch.float16, "bfloat16": torch.int16}[encoding]
            found[name] = torch.empty(tensor.shape, dtype=dtype, device="meta")
            if encoding == "float16":
                found[name + SCALE] = torch.empty(1, dtype=torch.float32, device="meta")
    return found


def decode(encoded: Mapping[str, Tensor], reference: Adapter, encoding: Encoding) -> dict[str, Tensor]:
    """The update that `encode` was given, but for rounding.

    Args:
        encoded: tensors of the names, shapes and dtypes that `expected` tells.
        reference: the adapter it is relative to, whose names, shapes and dtypes the result has.
        encoding: as `encode`.
    """
    found: dict[str, Tensor] = {}
    for name, like in reference.items():
        tensor = encoded[name]
        if encoding == "float32":
            found[name] = tensor
        elif encoding == "bfloat16":
            found[name] = tensor.view(torch.bfloat16).to(like.dtype)
        elif encoding == "float16":
            found[name] = (tensor.float() * encoded[name + SCALE]).to(like.dtype)
        else:
            values = _blocks(tensor.float()) * encoded[name + SCALE][:, None]
            found[name] = values.flatten()[: like.numel()].reshape(like.shape).to(like.dtype)
    return found


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors, names and headers not counted."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class Residuals:
    """What rounding took from each client's last update, on disk, so that a killed run goes on to the same bits.

    A round that is run again takes what was left before it: the two newest are kept.
    """

    def __init__(self, directory: Path) -> None:
        """A store that is made with its first residual."""
        self._directory = directory

    def before(self, client: int, index: int) -> dict[str, Tensor] | None:
        """The newest residual of a client from a round before `index`, None where it has none.

        Raises:
            RecordError: the file cannot be read.
        """
        earlier = [(number, path) for number, path in self._files(client) if number < index]
        if not earlier:
            return None
        try:
            return load_file(earlier[-1][1])
        except Exception as error:
            raise RecordError(f"{earlier[-1][1]} cannot be read: {error}. Remove it to go on without it.") from None

    def keep(self, client: int, index: int, residual: Adapter) -> None:
        """Stores a client's residual after a round, in one step."""
        place = self._place(client)
        place.mkdir(parents=True, exist_ok=True)
        fresh = place / ".new"
        save_file({name: tensor.contiguous() for name, tensor in residual.items()}, fresh)
        os.replace(fresh, place / f"round-{index:04d}.safetensors")
        for _, path in [item for item in self._files(client) if item[0] <= index][:-_KEPT]:
            path.unlink(missing_ok=True)

    def _place(self, client: int) -> Path:
        return self._directory / f"client-{client:04d}"

    def _files(self, client: int) -> list[tuple[int, Path]]:
        place = self._place(client)
        if not place.is_dir():
            return []
        matches = [(_ROUND.fullmatch(path.name), path) for path in place.iterdir()]
        return sorted((int(match[1]), path) for match, path in matches if match is not None)


def encode_update(
    update: ClientUpdate, index: int, *, encoding: Encoding, residuals: Residuals | None, seed: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What a client sends for its update, and what it reports of the loss.

    Args:
        update: as trained.
        index: the round.
        encoding: of the tensors.
        residuals: error feedback, None for none.
        seed: the run's; rounding draws from a stream of its own.

    Returns:
        The tensors that travel; "encoding_error", the length of the rounding error over that of what was encoded, where
        anything was rounded.
    """
    if encoding == "float32":
        return dict(update.delta), {}
    delta = dict(update.delta)
    left = None if residuals is None else residuals.before(update.client_id, index)
    # What another run left may have other shapes; it has no part in this one.
    if left is not None and _shapes(left) == _shapes(delta):
        delta = {name: tensor + left[name] for name, tensor in delta.items()}
    encoded = encode(delta, encoding, seeding.generator(seed, "encoding", index, update.client_id))
    decoded = decode(encoded, delta, encoding)
    residual = {name: tensor - decoded[name] for name, tensor in delta.items()}
    if residuals is not None:
        residuals.keep(update.client_id, index, residual)
    return encoded, {"encoding_error": norm(residual) / (norm(delta) or 1.0)}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def received(
    encoded: Mapping[str, Tensor], update: ClientUpdate, reference: Adapter, encoding: Encoding
) -> ClientUpdate:
    """The update as the server has it, with the bytes that travelled either way among its metrics."""
    traffic = {"download_bytes": float(nbytes(reference)), "upload_bytes": float(nbytes(encoded))}
    delta = decode(encoded, reference, encoding)
    return replace(update, delta=delta, metrics={**update.metrics, **traffic})


def encoded_clients(
    run_clients: RunClients, *, encoding: Encoding, residuals: Residuals | None, seed: int
) -> RunClients:
    """An engine of this process whose updates are encoded and decoded as if they travelled."""

    def run(adapter: Adapter, cohort: Sequence[int], index: int) -> list[ClientUpdate]:
        found = []
        for update in run_clients(adapter, cohort, index):
            encoded, facts = encode_update(update, index, encoding=encoding, residuals=residuals, seed=seed)
            sent = replace(update, metrics={**update.metrics, **facts})
            found.append(received(encoded, sent, adapter, encoding))
        return found

    return run


def _blocks(values: Tensor) -> Tensor:
    """(blocks, BLOCK) float, the flat values with zeros after the last."""
    flat: Any = values.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
