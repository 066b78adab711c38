"""Files as records keep them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fedeat import records


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with records.RunDirectory(tmp_path) as home:
        home.append_metrics([{"gap": math.nan, "nested": {"list": [math.inf, 1.5, (-math.inf,)]}, "text": "NaN"}])
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "gap": None,
        "nested": {"list": [None, 1.5, [None]]},
        "text": "NaN",
    }
    records.write_json(tmp_path / "value.json", {"x": math.nan})
    assert json.loads((tmp_path / "value.json").read_text()) == {"x": None}
