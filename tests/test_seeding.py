"""Streams: named, independent, equal everywhere, and apart from the global generators."""

from __future__ import annotations

import random

import numpy as np
import torch

from fedeat.seeding import derive, generator


def test_stream_is_the_same_on_every_machine() -> None:
    assert derive(0, "cohort", 3) == 1940773744370067784  # the first 63 bits of SHA-256 of "0/cohort/3"
    assert 0 <= derive(1, "x") < 2**63


def test_streams_of_different_names_differ() -> None:
    names = [(0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1), (0, "a", 1, 1), (0, "a", 11)]
    assert len({derive(*name) for name in names}) == len(names)


def test_generator_starts_anew_each_time() -> None:
    first, second = (torch.randn(5, generator=generator(3, "x", 1)) for _ in range(2))
    assert torch.equal(first, second)


def test_global_generators_are_left_alone() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[union-attr,index]
    torch.randn(3, generator=generator(0, "x"))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]  # type: ignore[union-attr,index]
