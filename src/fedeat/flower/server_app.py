"""The ServerApp: a federation's run from its configuration to its report, with clients reached through Flower.

It reads two keys of Flower's run configuration: `config`, the configuration as TOML text or the path of a file, and
`directory`, the run's directory on this machine. A directory that holds a run which was stopped goes on with it.
"""

from __future__ import annotations

import json
import os
import secrets
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from fedeat import experiment, records, report
from fedeat.config import Config, parse, to_toml
from fedeat.errors import ConfigError, FedeatError, RecordError
from fedeat.experiment.federation import Elsewhere, Progress, silent
from fedeat.flower.engine import connect

NODES = "FEDEAT_NODES"
"""Environment variable with the file in which `fedeat serve` keeps its registered nodes, in the order of clients."""
FAILURE = "failure.json"
"""In the run's directory while its last attempt ended with an error that a person can act on."""
NAME = "name.json"
"""In the run's directory: the random name by which clients know the run again when it goes on."""
_INFO = 20

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the federation that the run configuration describes."""
    settings: Any = context.run_config
    text, directory = str(settings.get("config", "")), str(settings.get("directory", ""))
    if not text:
        raise ConfigError(
            ["config is empty: give a configuration's text or path, as --run-config 'config=\"my.toml\"'"]
        )
    if "\n" not in text and text.endswith(".toml"):
        text = Path(text).read_text(encoding="utf-8")
    run(grid, text, Path(directory or f"runs/flower-{context.run_id}"))


def run(grid: Grid, text: str, directory: Path, *, progress: Progress = silent) -> list[Any]:
    """Runs a federation over Flower's nodes to its end, from its newest checkpoint where the directory has one.

    Args:
        grid: Flower's.
        text: the configuration, as TOML.
        directory: the run's.
        progress: told about clients trained and texts evaluated.

    Returns:
        The rows of the results table.

    Raises:
        FedeatError: as `experiment.run`; the message is also left in the run's directory.
    """
    failure = directory / FAILURE
    try:
        failure.unlink(missing_ok=True)
        listing = os.environ.get(NODES)
        registered = None if listing is None else read_nodes(Path(listing))
        config = server_config(_parsed(text), deployed=registered is not None)

        def link(config: Config) -> Elsewhere:
            return connect(config, grid=grid, text=to_toml(config), name=_name(directory), nodes=registered)

        rows = experiment.run(config, directory, progress=progress, connect=link)
        page = report.write_report(directory)
    except FedeatError as error:  # whoever started this shows it; another process reads the file
        records.make_directory(directory)
        records.write_json(failure, {"error": str(error)})
        raise
    log(_INFO, "adapter %s, report %s", directory / "adapter", page)
    return list(rows)


def _name(directory: Path) -> str:
    """The run's, drawn the first time; the configuration cannot tell it from another run of the same."""
    file = directory / NAME
    if not file.is_file():
        records.write_json(file, {"name": secrets.token_hex(16)})
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(
            f"{file} cannot be read: {error}. Remove it; clients then take the run for a new one."
        ) from None


def _parsed(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"it is not valid TOML: {error}."], source="the run configuration") from None


def server_config(raw: Mapping[str, Any], *, deployed: bool) -> Config:
    """The configuration a server runs.

    Args:
        raw: as TOML has it.
        deployed: whether clients hold their own data, so that the server needs none of it.

    Raises:
        ConfigError: with every problem found.
    """
    if not deployed:
        return parse(raw, source="the run configuration")
    if raw.get("attack", {}).get("kind") in ("label_flip", "backdoor"):
        raise ConfigError(
            [f'attack.kind = "{raw["attack"]["kind"]}" works through data, and nodes train on their own. Simulate it.']
        )
    own = {"data": {**raw.get("data", {}), "train": []}, "partition": {"kind": "file"}}
    return parse({**raw, **own}, source="the run configuration")


def read_nodes(path: Path) -> dict[int, int]:
    """Client -> registered node, as `fedeat serve` wrote them.

    Raises:
        ConfigError: the file is not there, or names no node.
    """
    try:
        listed = [int(entry["node_id"]) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            [f"{path} cannot be read: {error}. Expected the nodes that fedeat serve registers."]
        ) from None
    if not listed:
        raise ConfigError([f"{path} names no node. Register some: fedeat keys, and then fedeat serve."])
    return dict(enumerate(listed))
