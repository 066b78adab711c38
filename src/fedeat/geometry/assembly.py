"""One update under construction: what is read block by block is computed block by block, and put together here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedeat.geometry.layout import Segment, UpdateSource


class Assembly:
    """Coordinates of a value of the kind, shapes and dtypes of one update.

    Args:
        source: the updates it is made from.
    """

    def __init__(self, source: UpdateSource) -> None:
        self._source, device = source, source.device
        self._flat = {
            name: torch.empty(spec.numel, dtype=spec.dtype, device=device) for name, spec in source.layout.items()
        }

    def parts(self, segments: Sequence[Segment]) -> list[Tensor]:
        """Memory (c,) of the coordinates of each segment, to be written to."""
        return [self._flat[segment.name][segment.start : segment.stop] for segment in segments]

    def write(self, segments: Sequence[Segment], coordinates: Tensor) -> None:
        """Copies the coordinates (c,) of all segments, one after the other, to where they belong."""
        sizes = [segment.stop - segment.start for segment in segments]
        for part, values in zip(self.parts(segments), torch.split(coordinates, sizes), strict=True):
            part.copy_(values)

    def value(self) -> Tensor | dict[str, Tensor]:
        """The whole, once every coordinate was written."""
        layout = self._source.layout
        return self._source.assemble({name: flat.reshape(layout[name].shape) for name, flat in self._flat.items()})
