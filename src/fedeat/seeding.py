"""One independent random stream for each (seed, purpose, round, client).

A stream depends on nothing but its name, so a run that is resumed, reordered or spread over machines draws the
same numbers as one that is not. Nothing here touches the global generators of torch, numpy or random.
"""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *names: str | int) -> int:
    """Seed of the stream called `names` under the run's `seed`: 63 bits of SHA-256, equal on every machine."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Fresh generator for the stream called `names`, for example `generator(seed, "cohort", round)`."""
    return torch.Generator(device=device).manual_seed(derive(seed, *names))
