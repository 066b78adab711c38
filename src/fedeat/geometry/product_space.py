"""Inner products of the true updates of LoRA adapters, `s_i B_i A_i - s_g B_g A_g`, without forming any of them.

A LoRA pair (A (r, k), B (d, r)) means the matrix `s B A`. Its factors are not unique: `B M` and `M^-1 A` mean the same.
Distances between factors depend on that choice, distances between products do not, and
`<B_i A_i, B_j A_j> = sum((B_i' B_j) * (A_i A_j'))` costs O((d + k) r^2) where the matrix has d k entries.

With updates `dA_i, dB_i` about the global pair, client i's product moved by `dB_i A_i + B_g dA_i`: two terms of the
size of the update, so nothing cancels however large the global product is. Clients of another rank or scaling than
the global adapter send whole adapters; there products are differences of larger ones, and `Geometry.sizes` tells by how
much. All are formed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedeat.errors import UpdateError
from fedeat.geometry.gram_matrix import Geometry, require_finite
from fedeat.geometry.layout import FACTOR, Layout, UpdateSource
from fedeat.updates import Adapter

_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Pair:
    """Names of the two factors of one adapted module: a (r, k) and b (d, r)."""

    a: str
    b: str


@dataclass(frozen=True)
class Lora:
    """How LoRA factors are to be understood.

    Attributes:
        reference: the round's global adapter, None for zero.
        reference_scaling: its alpha / r.
        scaling: (n,) numbers, each client's alpha / r.
        whole: whether clients sent whole adapters; else differences to `reference`.
    """

    reference: Adapter | None
    reference_scaling: float
    scaling: Sequence[float]
    whole: bool


def pairs(layout: Layout) -> tuple[list[Pair], list[str]]:
    """LoRA pairs of an adapter, and the names of all other tensors.

    Raises:
        UpdateError: a factor lacks its partner or is no matrix.
    """
    factors: dict[str, dict[str, str]] = {}
    others = []
    for name in layout:
        match = FACTOR.match(name)
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
        if any(len(layout[name].shape) < 2 for name in sides.values()):
            raise UpdateError(f"{sides['A']!r} and {sides['B']!r} are no LoRA pair: expected (r, k) and (d, r)")
        found.append(Pair(sides["A"], sides["B"]))
    return found, others


def product_gram(source: UpdateSource, lora: Lora) -> Geometry:
    """Inner products of the clients' true updates: products for LoRA pairs, plain for all other tensors.

    Args:
        source: n updates.
        lora: how to understand their factors.

    Raises:
        UpdateError: factors without partner, of ranks that do not fit, a reference of another layout, updates that hold
            NaN or infinity, products that overflow float64.
    """
    count = len(source.labels)
    found, others = pairs(source.layout)
    _check(source, found, lora)
    total, subtracted = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for pair in found:
        products, sizes = _pair_gram(source, pair, lora)
        total += products.cpu()
        subtracted += sizes.cpu()
    for name in others:
        base = lora.reference[name].detach().reshape(-1) if lora.whole and lora.reference is not None else None
        for start in range(0, source.layout[name].numel, 65536):
            part = slice(start, start + 65536)
            rows = torch.stack([source.one(i, name).detach().reshape(-1)[part].double() for i in range(count)])
            if base is not None:
                rows -= base[part].double()
            total += (rows @ rows.T).cpu()
    broken = torch.nonzero(~torch.isfinite(total.diagonal())).flatten().tolist()
    require_finite(source, broken)
    if broken:
        names = ", ".join(source.labels[client] for client in broken)
        raise UpdateError(f"products of LoRA factors overflow float64: {names}; leave out, or rescale all updates")
    return Geometry((total + total.T) / 2, None, 1.0, 2.0**-53, 1, total.diagonal() + subtracted)


def as_matrix(tensor: Tensor) -> Tensor:
    """A factor as a float64 matrix; convolution kernels are flattened behind their first axis."""
    return tensor.detach().flatten(1).double()


def _pair_gram(source: UpdateSource, pair: Pair, lora: Lora) -> tuple[Tensor, Tensor]:
    """(n, n) inner products of one module's true updates, and the (n,) squared lengths lost in their differences."""
    count = len(source.labels)
    factors_a = [source.one(client, pair.a) for client in range(count)]
    factors_b = [source.one(client, pair.b) for client in range(count)]
    if lora.reference is not None:
        factors_a.append(lora.reference[pair.a])
        factors_b.append(lora.reference[pair.b])
    scales = torch.tensor([*lora.scaling, lora.reference_scaling], dtype=torch.float64)[: len(factors_a)]
    gram_a = _row_products(factors_a, transpose=False)
    gram_b = _row_products(factors_b, transpose=True)
    owner = torch.repeat_interleave(
        torch.arange(len(factors_a)), torch.tensor([factor.shape[0] for factor in factors_a])
    ).to(gram_a.device)
    if lora.whole or lora.reference is None:
        wholes = _sum_blocks(gram_a * gram_b, owner, len(factors_a)) * (scales[:, None] * scales[None, :]).to(
            owner.device
        )
        if lora.reference is None:
            return wholes, wholes.new_zeros(count)
        column, norm = wholes[:count, count], wholes[count, count]
        products = wholes[:count, :count] - column[:, None] - column[None, :] + norm
        return products, wholes.diagonal()[:count] + norm
    # Rows n * r and on belong to the global pair. With A_i = A_g + dA_i client i's update is dB_i A_i + B_g dA_i.
    rank = len(factors_a[-1])
    own, top = slice(0, count * rank), slice(count * rank, None)
    a_da = gram_a[own, own] + gram_a[top, own].repeat(count, 1)
    a_a = a_da + gram_a[own, top].repeat(1, count) + gram_a[top, top].repeat(count, count)
    mixed = gram_b[own, top].repeat(1, count) * a_da
    both = gram_b[own, own] * a_a + mixed + mixed.T + gram_b[top, top].repeat(count, count) * gram_a[own, own]
    products = _sum_blocks(both, owner[own], count) * lora.scaling[0] ** 2
    return products, products.new_zeros(count)


def _row_products(factors: Sequence[Tensor], *, transpose: bool) -> Tensor:
    """(R, R) float64 inner products of all rows of the factors, or of all their columns, by chunks of coordinates."""
    matrices = [as_matrix_view(factor, transpose=transpose) for factor in factors]
    rows, width = sum(len(matrix) for matrix in matrices), matrices[0].shape[1]
    total = torch.zeros(rows, rows, dtype=torch.float64, device=matrices[0].device)
    chunk = max(64, _CHUNK_BYTES // (8 * rows))
    for start in range(0, width, chunk):
        part = torch.cat([matrix[:, start : start + chunk].double() for matrix in matrices])
        total.addmm_(part, part.T)
    return total


def as_matrix_view(factor: Tensor, *, transpose: bool) -> Tensor:
    """A factor as rows of coordinates, one row for each of its r ranks."""
    matrix = factor.detach().flatten(1)
    return matrix.T if transpose else matrix


def _sum_blocks(products: Tensor, owner: Tensor, count: int) -> Tensor:
    """(count, count) sums over the rows and columns of each owner."""
    rows = torch.zeros(count, products.shape[1], dtype=products.dtype, device=products.device)
    rows.index_add_(0, owner, products)
    both = torch.zeros(count, count, dtype=products.dtype, device=products.device)
    return both.index_add_(1, owner, rows)


def _check(source: UpdateSource, found: Sequence[Pair], lora: Lora) -> None:
    """Refuses factors and a reference that do not fit together, naming the client."""
    ranks: dict[str, set[int]] = {}
    for pair in found:
        for client, label in enumerate(source.labels):
            a, b = source.one(client, pair.a).shape, source.one(client, pair.b).shape
            if a[0] != b[1]:
                raise UpdateError(
                    f"{label}: {pair.a!r} {tuple(a)} and {pair.b!r} {tuple(b)} are no LoRA pair: expected (r, k) and "
                    f"(d, r)"
                )
            ranks.setdefault(pair.a, set()).add(a[0])
    if lora.reference is None:
        return
    if not lora.whole and (len(set(lora.scaling)) > 1 or any(len(seen) > 1 for seen in ranks.values())):
        raise UpdateError(
            "clients of different rank or scaling cannot send differences to one global adapter: send whole adapters "
            "and pass whole=True"
        )
    free = {name for pair in found for name in (pair.a, pair.b)} if lora.whole else set()
    for name, spec in source.layout.items():
        if name not in lora.reference:
            raise UpdateError(f"the reference misses tensor {name!r} that the updates have")
        got = tuple(lora.reference[name].shape)
        if got != spec.shape and not (name in free and len(got) == len(spec.shape)):
            raise UpdateError(f"the reference's tensor {name!r} has shape {got}, the updates' {spec.shape}")
        if not bool(torch.isfinite(lora.reference[name]).all()):
            raise UpdateError(f"the reference's tensor {name!r} holds a NaN or an infinity")
    if not 0 < abs(lora.reference_scaling) < float("inf"):
        raise UpdateError(f"the reference's scaling must be finite and not zero, got {lora.reference_scaling!r}")
