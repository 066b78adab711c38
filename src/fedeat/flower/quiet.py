"""Flower and Ray told to call nobody, install nothing, listen on this machine alone and run like any other process.

They read these from the environment when they are imported, so this module imports neither.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

from fedeat.errors import FedeatError

SETTINGS: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray listens on all interfaces unless it takes this machine for one of these.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray runs clients at niceness 15, where a busy machine hardly runs them at all, and rounds miss their deadline.
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def require_insecure_or(given: bool, insecure: bool, option: str) -> None:
    """Checks that plaintext was asked for where what TLS needs was not given, and not asked for where it was.

    Raises:
        FedeatError: it was not, or it was.
    """
    if not given and not insecure:
        raise FedeatError(
            f"{option} is missing: TLS and the authentication of nodes are on by default. Make keys with fedeat keys, "
            "or give --insecure, and then anybody who reaches the port can read all adapters and join as a client."
        )
    if given and insecure:
        raise FedeatError(f"{option} and --insecure contradict each other. Leave one of them out.")


def hush() -> None:
    """Applies the settings to this process and those it will start.

    Raises:
        FedeatError: Flower is not installed.
    """
    os.environ.update(SETTINGS)
    if importlib.util.find_spec("flwr") is None:
        raise FedeatError('this needs Flower 1.41, which is not installed: pip install "fedeat[flower]"')
