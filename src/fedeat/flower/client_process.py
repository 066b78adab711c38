"""The process that carries one message to a node's worker, in the place of Flower's `flwr-clientapp`.

Flower would unpack the code that came with the run and import the ClientApp from it. A node of this package runs what
is installed on it and nothing else: the code is not even unpacked, whoever sent it.
"""

from __future__ import annotations

from typing import Any


def main() -> None:
    """Runs Flower's own process with this package's ClientApp."""
    from flwr.supernode.cli import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    from fedeat.flower.client_app import app

    def nothing(*arguments: Any, **options: Any) -> None:
        return None

    replaced: Any = run_clientapp
    replaced.install_from_fab = nothing
    replaced.get_project_dir = nothing
    replaced.get_load_client_app_fn = lambda **options: lambda *run: app
    flwr_clientapp()


if __name__ == "__main__":
    main()
