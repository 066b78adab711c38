"""The command line's whole way through Flower's simulation, with Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MakeConfig = Callable[..., Path]


@pytest.mark.slow
def test_a_simulation_leaves_the_bytes_of_a_run_in_one_process(make_config: MakeConfig, tmp_path: Path) -> None:
    """With secure sums, whose messages are all that others have and more."""
    file = make_config(
        partition={"clients": 3},
        federation={"rounds": 1},
        client={"clients_per_batch": 1},
        secure_aggregation={"enabled": True, "max_sums": 4},
    )
    for engine in ("in-process", "flower-simulation"):
        command = [sys.executable, "-m", "fedeat", "run", str(file), "--out", str(tmp_path / engine)]
        done = subprocess.run(
            [*command, "--engine", engine], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl", "partition.json"):
        files = [tmp_path / engine / name for engine in ("in-process", "flower-simulation")]
        assert files[0].read_bytes() == files[1].read_bytes()
