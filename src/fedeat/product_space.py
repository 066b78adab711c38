"""Inner products of the true updates of LoRA adapters, `s_i B_i A_i - s_g B_g A_g`, without forming any of them.

A LoRA pair (A (r, k), B (d, r)) means the matrix `s B A`. Its factors are not unique: `B M` and `M^-1 A` mean the same.
Distances between factors depend on that choice, distances between products do not, and
`<B_i A_i, B_j A_j> = sum((B_i' B_j) * (A_i A_j'))` costs O((d + k) r^2) where the matrix has d k entries.

With updates `dA_i, dB_i` about the global pair, client i's product moved by `dB_i A_i + B_g dA_i`: two terms of the
size of the update, so nothing cancels however large the global product is. All products are formed in float64.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedeat.errors import UpdateError
from fedeat.geometry import Geometry, require_finite
from fedeat.sources import Layout, UpdateSource
from fedeat.updates import Adapter

_FACTOR = re.compile(r"^(?P<module>.*)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<rest>\..*)?$")


@dataclass(frozen=True)
class Pair:
    """Names of the two factors of one adapted module."""

    a: str
    b: str


def pairs(layout: Layout) -> tuple[list[Pair], list[str]]:
    """LoRA pairs of an adapter, and the names of all other tensors.

    Raises:
        UpdateError: a factor lacks its partner, or their ranks differ.
    """
    factors: dict[str, dict[str, str]] = {}
    others = []
    for name in layout:
        match = _FACTOR.match(name)
        if match is None:
            others.append(name)
            continue
        key = f"{match['module']}.lora_{match['embedding'] or ''}{match['rest'] or ''}"
        factors.setdefault(key, {})[match["side"]] = name
    found = []
    for sides in factors.values():
        if len(sides) < 2:
            lone = next(iter(sides.values()))
            raise UpdateError(f"tensor {lone!r} has no partner: product space needs both lora_A and lora_B of a module")
        a, b = layout[sides["A"]].shape, layout[sides["B"]].shape
        if len(a) < 2 or len(b) < 2 or a[0] != b[1]:
            raise UpdateError(f"{sides['A']!r} {a} and {sides['B']!r} {b} are no LoRA pair: expected (r, k) and (d, r)")
        found.append(Pair(sides["A"], sides["B"]))
    return found, others


def product_gram(source: UpdateSource, reference: Adapter | None, scaling: Sequence[float]) -> Geometry:
    """Inner products of the clients' true updates: products for LoRA pairs, plain for all other tensors.

    Args:
        source: n updates, differences to `reference`, or whole adapters where that is None.
        reference: the global adapter, of the same names and shapes; None for zero.
        scaling: n finite numbers, each client's alpha / r.

    Raises:
        UpdateError: factors without partner, a reference of another layout, updates that hold NaN or infinity,
            products that overflow float64.
    """
    count = len(source.labels)
    found, others = pairs(source.layout)
    if reference is not None:
        _check_reference(reference, source.layout)
        if len(set(scaling)) > 1:
            raise UpdateError("differences to one global adapter need one scaling for all clients: send whole adapters")
    scales = torch.tensor(scaling, dtype=torch.float64)
    total = torch.zeros(count, count, dtype=torch.float64)
    for pair in found:
        a = torch.stack([_matrix(source.one(client, pair.a)) for client in range(count)])
        b = torch.stack([_matrix(source.one(client, pair.b)).T for client in range(count)])
        if reference is not None:
            global_a, global_b = _matrix(reference[pair.a]), _matrix(reference[pair.b]).T
            # dB_i (A_g + dA_i) + B_g dA_i, as one product of twice the rank.
            a, b = torch.cat([a + global_a, a], 1), torch.cat([b, global_b.expand_as(b)], 1)
        total += (_block_products(a, b) * scales[:, None] * scales[None, :]).cpu()
    for name in others:
        for start in range(0, source.layout[name].numel, 65536):
            rows = torch.stack([_piece(source.one(client, name), start) for client in range(count)])
            total += (rows @ rows.T).cpu()
    broken = torch.nonzero(~torch.isfinite(total.diagonal())).flatten().tolist()
    require_finite(source, broken)
    if broken:
        names = ", ".join(source.labels[client] for client in broken)
        raise UpdateError(f"products of LoRA factors overflow float64: {names}; leave out, or rescale all updates")
    return Geometry((total + total.T) / 2, None, 1.0, 2.0**-53, 1)


def _block_products(a: Tensor, b: Tensor) -> Tensor:
    """(n, n) inner products of `b_i' a_i` for factors a (n, r, k) and b (n, r, d)."""
    count, rank = a.shape[:2]
    flat_a, flat_b = a.flatten(0, 1), b.flatten(0, 1)
    both = (flat_a @ flat_a.T).mul_(flat_b @ flat_b.T)
    return both.reshape(count, rank, count, rank).sum((1, 3))


def _matrix(tensor: Tensor) -> Tensor:
    """A factor as a float64 matrix; convolution kernels are flattened behind their first axis."""
    return tensor.detach().flatten(1).double()


def _piece(tensor: Tensor, start: int) -> Tensor:
    return tensor.detach().reshape(-1)[start : start + 65536].double()


def _check_reference(reference: Mapping[str, Tensor], layout: Layout) -> None:
    for name, spec in layout.items():
        if name not in reference:
            raise UpdateError(f"the reference misses tensor {name!r} that the updates have")
        if tuple(reference[name].shape) != spec.shape:
            got = tuple(reference[name].shape)
            raise UpdateError(f"the reference's tensor {name!r} has shape {got}, the updates' {spec.shape}")
        if not bool(torch.isfinite(reference[name]).all()):
            raise UpdateError(f"the reference's tensor {name!r} holds a NaN or an infinity")
