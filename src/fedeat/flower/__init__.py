"""fedeat on Flower: its aggregation rules as strategies for anybody's app, and its federations on many machines.

strategy     the aggregation rules as Flower strategies; `replies` is what they make of a round's replies
arrays       tensors to Flower's arrays and back, believing nothing
messages     what travels between server and clients
client       a client's side: carries out orders over its own data; `client_app` is the ClientApp around it
engine       reaches clients through Flower's grid; `server_app` is the ServerApp around it
simulation   a whole federation on this machine, on Flower's simulation
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedeat.flower.strategy import (
        CoordinateMedian,
        GeometricMedian,
        Krum,
        Mean,
        MultiKrum,
        RuleStrategy,
        TrimmedMean,
    )

__all__ = ["CoordinateMedian", "GeometricMedian", "Krum", "Mean", "MultiKrum", "RuleStrategy", "TrimmedMean"]


def __getattr__(name: str) -> Any:
    """A strategy, imported once it is asked for: Flower reads its settings when it is imported, and may be absent."""
    if name not in __all__:
        raise AttributeError(f"module 'fedeat.flower' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module("fedeat.flower.strategy"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "flwr":
            raise
        raise ImportError('fedeat.flower needs Flower 1.41: pip install "fedeat[flower]"') from error
