"""Hooks that make any Hugging Face model perturbable and cheap, without code for any architecture.

The perturbation is added by a forward hook on the embedding module while token ids are passed as usual, so position
embeddings, embedding scales and attention masks stay the model's own business. The output head is given the supervised
rows alone by a hook before it; what follows it (soft-capping, scaling) acts row by row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fedeat.errors import ModelError


@contextlib.contextmanager
def added_to_embeddings(base: Any, delta: Tensor | None) -> Iterator[None]:
    """Within it, `delta` (B, T, H) is added to what the embedding module returns; None adds nothing.

    Raises:
        ModelError: the module did not fire exactly once, or returned another shape.
    """
    if delta is None:
        yield
        return
    calls = 0

    def add(module: nn.Module, args: object, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if output.shape != delta.shape:
            raise _unservable(base, f"returned shape {tuple(output.shape)}, expected {tuple(delta.shape)}")
        return output + delta.to(output)

    with _hooked(base.get_input_embeddings().register_forward_hook(add)):
        yield
    if calls != 1:
        raise _unservable(base, f"was called {calls} times in one forward pass, expected exactly once")


@contextlib.contextmanager
def head_on_rows(base: Any, rows: Tensor) -> Iterator[None]:
    """Within it, the output head sees the supervised rows alone, (1, N, H).

    Raises:
        ModelError: the head did not fire exactly once.
    """
    calls = 0

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1])[rows.to(hidden.device)].unsqueeze(0), *args[1:])

    with _hooked(base.get_output_embeddings().register_forward_pre_hook(keep)):
        yield
    if calls != 1:
        raise ModelError(
            f"{type(base).__name__} calls its output head {calls} times in one forward pass, expected "
            "exactly once. Such a model is not served."
        )


class Reached(Exception):
    """A forward pass came to the layer it was to stop behind."""


@contextlib.contextmanager
def seen_behind(layer: nn.Module, seen: list[Tensor], *, stop: bool) -> Iterator[None]:
    """Within it, what `layer` returns is appended to `seen`; with `stop`, the pass then ends there, quietly."""

    def look(module: nn.Module, args: object, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])
        if stop:
            raise Reached

    with _hooked(layer.register_forward_hook(look)), contextlib.suppress(Reached):
        yield


@contextlib.contextmanager
def modes(modules: list[nn.Module], *, training: bool) -> Iterator[None]:
    """Within it, these modules alone, not those inside them, are in train or eval mode."""
    before = [module.training for module in modules]
    for module in modules:
        module.training = training
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.training = value


@contextlib.contextmanager
def without_shares_dropped(modules: list[nn.Module]) -> Iterator[None]:
    """Within it, the shares that these modules drop by their own mode, as OPT's layers do, are zero."""
    found = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, float) and "drop" in name
    ]
    for module, name, _ in found:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in found:
            setattr(module, name, value)


@contextlib.contextmanager
def frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within it, these parameters take no gradient."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _hooked(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _unservable(base: Any, what: str) -> ModelError:
    return ModelError(
        f"{type(base).__name__} cannot be perturbed: its embedding module "
        f"({type(base.get_input_embeddings()).__name__}) {what}. Models with one token embedding at their "
        "entrance are served; for this one set perturbation.kind to none."
    )
