"""How a pass computes attention, where several ways compute the same and one is faster.

On a processor, torch's fused attention has a slow backward pass in bfloat16. For short samples the plain products
("eager") are faster; for long ones they are slower and take more memory. `benchmarks/client_step.py` times both.
Over samples packed into one row, attention is computed sample by sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

SHORT = 256
"""Tokens of a sample up to which plain products are faster."""


class Attention:
    """A model's attention, chosen for each pass; the choice that a person made is kept.

    Attributes:
        free: whether there is a choice: nobody made one, transformers made "sdpa" of it, and can change it.
    """

    def __init__(self, base: Any, chosen: str | None, *, recomputes: bool) -> None:
        """Looks at a model.

        Args:
            base: the transformers model.
            chosen: the implementation a person asked for, None for none.
            recomputes: whether its layers run again in the backward pass, which is then outside of `faster`.
        """
        self._base = base
        self.free = (
            chosen is None
            and not recomputes
            and base.config._attn_implementation == "sdpa"
            and base._can_set_attn_implementation()
        )

    @contextlib.contextmanager
    def faster(self, length: int | None) -> Iterator[None]:
        """Within it, a pass over samples of `length` tokens runs the implementation that is faster there.

        None for samples of several lengths: nothing is chosen for them all.
        """
        weight = self._base.get_input_embeddings().weight  # of the ascent's dtype while one runs
        if length is None or not (self.free and _plain_is_faster(weight, length)):
            yield
            return
        self._base.set_attn_implementation("eager")
        try:
            yield
        finally:
            self._base.set_attn_implementation("sdpa")


class AttentionWithin(TorchFunctionMode):
    """Within it, attention over a row of samples is computed sample by sample, under the mask's blocks on its diagonal.

    The blocks beside the diagonal let nothing through; formed as well, they cost N^2 instead of the sum of squares.
    Attention that a model computes in another way than by torch's function is left as it is.
    """

    def __init__(self, lengths: Sequence[int], *, free: bool) -> None:
        """Attention over a row.

        Args:
            lengths: tokens of each sample, in the order of the row.
            free: whether plain products may be taken where they are faster, as `Attention.free`.
        """
        super().__init__()
        self._lengths = list(lengths)
        self._free = free

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every other function is called as it is."""
        if func is scaled_dot_product_attention:
            return self._each(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _each(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        total = sum(self._lengths)
        if attn_mask is None or {query.shape[-2], *attn_mask.shape[-2:]} != {total}:
            return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
        parts, start = [], 0
        for q, k, v in zip(*(torch.split(t, self._lengths, -2) for t in (query, key, value)), strict=True):
            length = q.shape[-2]
            block = attn_mask.narrow(-2, start, length).narrow(-1, start, length)
            if self._free and not dropout_p and _plain_is_faster(q, length):
                parts.append(_plain(q, k, v, block, **options))
            else:
                parts.append(scaled_dot_product_attention(q, k, v, block, dropout_p, **options))
            start += length
        return torch.cat(parts, -2)


def _plain_is_faster(like: Tensor, length: int) -> bool:
    return torch.is_grad_enabled() and length <= SHORT and like.dtype == torch.bfloat16 and like.device.type == "cpu"


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` as its products, the softmax in float32."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1, torch.float32).to(query.dtype) @ value
