"""What a run was made with: versions, processor, threads, command."""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fedeat import __version__

ENVIRONMENT = "environment.json"


def environment(threads: int) -> dict[str, Any]:
    """Versions, processor, threads and command of this process."""
    packages = ("torch", "transformers", "peft", "numpy")
    return {
        "fedeat": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "platform": platform.platform(),
        "cpu": _processor(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": threads,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def threads_before(path: Path) -> int:
    """Threads that a run was started with, 0 where that is not known: other sums, in another order, differ."""
    try:
        threads = json.loads((path / ENVIRONMENT).read_text(encoding="utf-8"))["threads"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return threads if isinstance(threads, int) else 0


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
