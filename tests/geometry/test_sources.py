"""Updates held by mappings: tensors they keep are read where they lie, tensors they make when asked while they live."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from fedeat import geometry
from fedeat.aggregation import aggregate
from fedeat.errors import UpdateError
from fedeat.geometry import products
from fedeat.geometry.sources import open_updates

NAMES = ("a", "b", "c", "d")


class Stored(Mapping[str, Tensor]):
    """Half-precision tensors, served in float32; counts how many of these are alive at once."""

    alive = 0
    most = 0

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        made = self._tensors[name].float()
        Stored.alive += 1
        Stored.most = max(Stored.most, Stored.alive)
        weakref.finalize(made, self._gone)
        return made

    @staticmethod
    def _gone() -> None:
        Stored.alive -= 1

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Detached(Stored):
    """The mapping's own tensors, each time as a new view."""

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].detach()


def drawn(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(100_000, generator=generator).half() for name in NAMES}


def test_a_mapping_that_makes_its_tensors_when_asked_gives_what_a_dict_gives() -> None:
    stored = [drawn(seed) for seed in range(4)]
    expected = aggregate([{name: tensor.float() for name, tensor in update.items()} for update in stored])
    Stored.alive = Stored.most = 0
    result = aggregate([Stored(update) for update in stored])
    torch.testing.assert_close(result.weights, expected.weights, atol=1e-12, rtol=0)
    for name in NAMES:
        torch.testing.assert_close(result.value[name], expected.value[name], atol=1e-6, rtol=0)
    assert Stored.most <= 2 * len(stored)  # one tensor of all clients, not all of them


@pytest.mark.skipif(not products.COMPILED, reason="installed without a compiler")
def test_only_tensors_that_a_mapping_keeps_are_read_where_they_lie() -> None:
    updates = [{name: tensor.float() for name, tensor in drawn(seed).items()} for seed in range(2)]
    expected = {name: [update[name].data_ptr() for update in updates] for name in NAMES}
    assert open_updates(updates).addresses() == expected
    assert open_updates([Detached(update) for update in updates]).addresses() == expected
    assert open_updates([updates[0], Stored(updates[1])]).addresses() == expected
    assert open_updates([updates[0], Stored(drawn(1))]).addresses() == {}


def test_the_tensors_behind_known_addresses_live_as_long_as_the_source() -> None:
    updates = [{"a": torch.ones(5)}, {"a": torch.zeros(5)}]
    source = open_updates(updates)
    source.addresses()
    first = weakref.ref(updates[0]["a"])
    for update in updates:
        update.clear()
    assert first() is not None


@pytest.mark.parametrize("weights", [torch.tensor(0.25).expand(4), torch.full((8,), 0.25)[::2], torch.full((4,), 0.25)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_any_stride_and_dtype_combine_alike(weights: Tensor, dtype: torch.dtype) -> None:
    updates = [{"a": torch.randn(200_000, generator=torch.Generator().manual_seed(seed))} for seed in range(4)]
    value = geometry.combine(updates, weights.to(dtype))
    assert isinstance(value, dict)
    torch.testing.assert_close(value["a"], torch.stack([update["a"] for update in updates]).mean(0))


def test_weights_that_are_not_one_an_update_are_refused() -> None:
    for count in (3, 5):
        with pytest.raises(UpdateError, match="weights must be 4"):
            geometry.combine(torch.ones(4, 2), torch.ones(count))
