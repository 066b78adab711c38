"""fedeat on Flower: its aggregation rules as strategies for anybody's app, and its federations on many machines.

arrays       tensors to Flower's arrays and back, believing nothing
strategy     the aggregation rules as Flower strategies
"""

from __future__ import annotations

try:
    import flwr as _flwr  # noqa: F401
except ImportError as error:
    raise ImportError('fedeat.flower needs Flower 1.41: pip install "fedeat[flower]"') from error

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
