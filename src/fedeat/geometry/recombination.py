"""Weighted sums of LoRA products as one adapter: by summing factors, exactly by stacking them, or at a chosen rank.

Summing factors, `(sum w_i B_i)(sum w_i A_i)`, is not the sum of products. The exact sum
`sum_i w_i s_i B_i A_i + (1 - sum w_i) s_g B_g A_g` has the factors side by side, and so the sum of the ranks;
the best adapter of a smaller rank follows from two thin QR factorisations and one small SVD (Eckart and Young, 1936).
The last two are whole adapters of scaling one: load them with `lora_alpha` equal to the rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedeat.errors import UpdateError
from fedeat.geometry.gram_matrix import combine
from fedeat.geometry.layout import FACTOR, UpdateSource
from fedeat.geometry.product_space import Lora, Pair, as_matrix, pairs
from fedeat.updates import Adapter

_WHOLE = 1e-12
"""How far weights may sum from one by rounding."""


def recombine(
    source: UpdateSource, weights: Tensor, lora: Lora, *, rank: int | None = None
) -> tuple[dict[str, Tensor], float]:
    """The weighted sum of the clients' products as one whole adapter of scaling one.

    Args:
        source: n updates.
        weights: (n,) float64, of the clients' products about the global one.
        lora: how to understand the factors.
        rank: >= 1, rank of the result; None for the sum of ranks, which is exact.

    Returns:
        The adapter, in the names, dtypes and outer shapes of the updates; the discarded share of the squared Frobenius
        norm of all modules' products, in 0..1.

    Raises:
        UpdateError: `rank` is no positive integer.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise UpdateError(f"rank must be a positive integer, got {rank!r}")
    found, others = pairs(source.layout)
    value: dict[str, Tensor] = {}
    lost = total = 0.0
    for pair in found:
        a, b = _stacked(source, weights, lora, pair)
        if rank is not None:
            a, b, energies = _truncated(a, b, rank)
            total += float(energies.sum())
            lost += float(energies[rank:].sum())
        for name, factor, axis in ((pair.a, a, 0), (pair.b, b, 1)):
            shape = list(source.layout[name].shape)
            shape[axis] = factor.shape[axis]
            value[name] = factor.reshape(shape).to(source.layout[name].dtype)
    for name in others:
        value[name] = _plain(source, weights, lora, name)
    ordered = {name: value[name] for name in source.layout}
    return ordered, lost / total if total > 0 else 0.0


def sum_factors(source: UpdateSource, weights: Tensor, lora: Lora) -> Tensor | dict[str, Tensor]:
    """The weighted sum of the clients' factors, of the kind of their updates and of their scaling.

    Of whole adapters, weights that sum to less than one leave the rest to the reference, as differences to it would.

    Args:
        source: n updates of one rank.
        weights: (n,) float64.
        lora: how to understand the factors; one scaling for all clients.

    Raises:
        UpdateError: the reference takes part and has another rank.
    """
    value, rest = combine(source, weights), 1 - float(weights.sum())
    if not lora.whole or lora.reference is None or abs(rest) <= _WHOLE or not isinstance(value, dict):
        return value
    relative = {pair.b: lora.reference_scaling / lora.scaling[0] for pair in pairs(source.layout)[0]}
    for name, tensor in value.items():
        base = lora.reference[name].detach()
        if base.shape != tensor.shape:
            raise UpdateError(
                f"the weights sum to {1 - rest:.6g}, and the reference, which takes the rest, has {name!r} of shape "
                f"{tuple(base.shape)} where updates have {tuple(tensor.shape)}: choose combine='stacked' or "
                f"'recompressed'"
            )
        value[name] = (tensor.double() + rest * relative.get(name, 1.0) * base.double()).to(tensor.dtype)
    return value


def of_one_rank(adapter: Adapter) -> dict[str, Tensor]:
    """The same adapter with factors filled up by zeros to the largest rank, so that it loads as one of that rank.

    Groups of modules may stack different numbers of clients, and clients' modules may differ in rank.
    """
    matches = {name: FACTOR.match(name) for name in adapter}
    axes = {name: 0 if match["side"] == "A" else 1 for name, match in matches.items() if match is not None}
    rank = max((adapter[name].shape[axis] for name, axis in axes.items()), default=0)
    value = dict(adapter)
    for name, axis in axes.items():
        shape = list(value[name].shape)
        shape[axis] = rank - shape[axis]
        if shape[axis] > 0:
            value[name] = torch.cat([value[name], value[name].new_zeros(shape)], axis)
    return value


def _stacked(source: UpdateSource, weights: Tensor, lora: Lora, pair: Pair) -> tuple[Tensor, Tensor]:
    """Factors a (R, k) and b (d, R) in float64 whose product is the exact weighted sum."""
    base = None if lora.reference is None else (as_matrix(lora.reference[pair.a]), as_matrix(lora.reference[pair.b]))
    parts_a, parts_b = [], []
    for client, weight in enumerate(weights.tolist()):
        if weight != 0:
            a, b = as_matrix(source.one(client, pair.a)), as_matrix(source.one(client, pair.b))
            if base is not None and not lora.whole:
                a, b = a + base[0], b + base[1]
            parts_a.append(a)
            parts_b.append(weight * lora.scaling[client] * b)
    rest = 1 - float(weights.sum())
    if base is not None and (abs(rest) > _WHOLE or not parts_a):
        parts_a.append(base[0])
        parts_b.append(rest * lora.reference_scaling * base[1])
    if not parts_a:
        parts_a, parts_b = [as_matrix(source.one(0, pair.a))], [as_matrix(source.one(0, pair.b)) * 0]
    return torch.cat(parts_a), torch.cat(parts_b, 1)


def _truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best factors of a rank, with zeros where the product has a smaller one, and all squared singular values."""
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.T)
    u, singular, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    root = singular[:rank].sqrt()
    small_a, small_b = root[:, None] * (v[:rank] @ right.T), (left @ u[:, :rank]) * root
    missing = rank - len(root)
    if missing > 0:
        small_a = torch.cat([small_a, small_a.new_zeros(missing, small_a.shape[1])])
        small_b = torch.cat([small_b, small_b.new_zeros(len(small_b), missing)], 1)
    return small_a, small_b, singular**2


def _plain(source: UpdateSource, weights: Tensor, lora: Lora, name: str) -> Tensor:
    """The weighted sum of a tensor that is no factor, as part of a whole adapter."""
    spec, reference = source.layout[name], lora.reference
    total = torch.zeros(spec.shape, dtype=torch.float64, device=source.device)
    for client, weight in enumerate(weights.tolist()):
        if weight != 0:
            total += weight * source.one(client, name).detach().double()
    if reference is not None:
        total += (1 - float(weights.sum()) if lora.whole else 1.0) * reference[name].detach().double()
    return total.to(spec.dtype)
