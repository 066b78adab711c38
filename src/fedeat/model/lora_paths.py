"""Ways through a LoRA layer that cost less than PEFT's own and compute the same.

PEFT's forward casts the input to the adapter's float32, runs both factors, scales and adds (N, o) numbers in passes of
their own, and casts back. `fused` scales the r-wide middle instead and adds in the second product. `ascending` goes on
the base weight plus the adapter, kept in a buffer of its own and swapped in by pointer: PEFT's merging in place would
leave rounding errors behind in the base.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.functional import linear

Forward = Callable[..., Tensor]

_MERGED_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Numbers of a weight that are float32 at a time while it is merged in another dtype: on a processor as many as stay in
its cache, on CUDA many more, for each part is several calls; on other devices the whole weight."""


def plain_layers(network: nn.Module) -> list[Any]:
    """The LoRA layers that hold one ordinary adapter over weights that can be added to.

    Quantised layers, variants such as DoRA, and layers of other kinds are not among them; they keep PEFT's forward.
    """
    layers: list[Any] = list(network.modules())
    return [
        layer
        for layer in layers
        if type(layer) in (lora.Linear, lora.Embedding)
        and list(_factors(layer)[0]) == ["default"] == layer.active_adapters
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and layer.base_layer.weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not layer.base_layer.weight.is_meta
    ]


@contextlib.contextmanager
def routed(forwards: Mapping[Any, Forward]) -> Iterator[None]:
    """Within it, each layer's forward is another; what was there before is put back."""
    before = [layer.__dict__.get("forward") for layer in forwards]
    try:
        for layer, forward in forwards.items():
            layer.__dict__["forward"] = forward  # not by assignment: a module so assigned becomes a child
        yield
    finally:
        for layer, own in zip(forwards, before, strict=True):
            layer.__dict__.pop("forward", None)
            if own is not None:
                layer.__dict__["forward"] = own


def can_fuse(layer: Any) -> bool:
    """Whether `fused` serves a plain layer: a linear one, in a dtype whose small gradients do not vanish."""
    return isinstance(layer, lora.Linear) and layer.base_layer.weight.dtype != torch.float16


def fused(layer: lora.Linear) -> Forward:
    """Forward of a LoRA layer in training: base(x) + (s A x) B^T, added within the second product."""
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    dropout, scaling = layer.lora_dropout["default"], layer.scaling["default"]

    def forward(x: Tensor) -> Tensor:
        result: Tensor = layer.base_layer(x)
        # The adapter's products run in the base's dtype; its weights and their gradients stay float32.
        a, b = down.weight.to(result.dtype), up.weight.to(result.dtype)
        low = linear(dropout(x.to(result.dtype)), a) * scaling
        flat = torch.addmm(result.flatten(0, -2), low.flatten(0, -2), b.t())
        return flat.view(result.shape)

    return forward


class AscentWeights:
    """The weights an ascent runs on: the base's with the adapter added, where wished in a smaller dtype.

    Attributes:
        layers: the LoRA layers whose adapter is merged; the others run as they are.
        dtype: of all frozen weights while the ascent runs; None for the base's own.
    """

    def __init__(
        self, base: nn.Module, layers: Sequence[Any], adapter: Iterable[nn.Parameter], dtype: torch.dtype | None
    ) -> None:
        self.layers = layers
        self.dtype = dtype
        self._base = base
        self._adapter = {id(parameter) for parameter in adapter}
        self._buffers: dict[int, nn.Parameter] = {}

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within it, the base's modules point at the ascent's weights; base and adapter are untouched."""
        swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            with torch.no_grad():
                for layer in self.layers:
                    own = layer.base_layer.weight
                    merged = self._buffer(id(layer), own)
                    _add(own, layer, merged)
                    swapped.append((layer.base_layer, "weight", own))
                    layer.base_layer._parameters["weight"] = merged
                if self.dtype is not None:
                    for module, name, own in self._others():
                        swapped.append((module, name, own))
                        module._parameters[name] = self._copy(own)
            with routed({layer: _base_alone(layer) for layer in self.layers}):
                yield
        finally:
            for module, name, own in swapped:
                module._parameters[name] = own

    def _others(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """Frozen weights beside the merged ones: norms, embeddings, heads; tied ones in each of their places."""
        merged = {id(layer.base_layer._parameters["weight"]) for layer in self.layers}
        return [
            (module, name, parameter)
            for module in self._base.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
            and id(parameter) not in merged
            and parameter.is_floating_point()
            and id(parameter) not in self._adapter
        ]

    def _buffer(self, key: int, like: Tensor) -> nn.Parameter:
        if key not in self._buffers or self._buffers[key].device != like.device:
            self._buffers[key] = nn.Parameter(
                torch.empty_like(like, dtype=self.dtype or like.dtype), requires_grad=False
            )
        return self._buffers[key]

    def _copy(self, own: nn.Parameter) -> nn.Parameter:
        fresh = id(own) not in self._buffers
        copy = self._buffer(id(own), own)
        if fresh:
            copy.copy_(own)
        return copy


def _base_alone(layer: Any) -> Forward:
    return lambda x: layer.base_layer(x)  # called, so that hooks on it act


def _add(own: Tensor, layer: Any, out: Tensor) -> None:
    """out <- own + adapter, computed in float32 and rounded once."""
    if isinstance(layer, lora.Linear) and not layer.fan_in_fan_out:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        scaling = layer.scaling["default"]
        if own.dtype == out.dtype == torch.float32:
            torch.addmm(own, b, a, alpha=scaling, out=out)
            return
        rows = max(1, _MERGED_AT_ONCE.get(own.device.type, own.numel()) // own.shape[1])
        for part, weight, up in zip(*(torch.split(whole, rows) for whole in (out, own, b)), strict=True):
            part.copy_(torch.addmm(weight.float(), up, a, alpha=scaling))
    else:
        out.copy_(own.float() + layer.get_delta_weight("default"))


def _factors(layer: Any) -> tuple[Any, Any]:
    if isinstance(layer, lora.Embedding):
        return layer.lora_embedding_A, layer.lora_embedding_B
    return layer.lora_A, layer.lora_B
