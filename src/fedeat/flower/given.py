"""What a client with fresh noise has given: a round that is asked for again gets the same update again.

Noise pays for one look at a client's data a round, and the server's epsilon counts one. A server that was killed asks
its last round anew; trained anew, with other noise, a second update would tell as much again and not be counted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from fedeat.errors import RecordError, UpdateError
from fedeat.updates import Adapter, ClientUpdate


class Given:
    """The newest update of each client of a run, as it was trained."""

    def __init__(self, directory: Path | None) -> None:
        """Nothing was given yet, but for what the directory holds.

        Args:
            directory: the run's, made with its first update; None keeps updates in memory, until the process ends.
        """
        self._directory = directory
        self._held: dict[int, tuple[int, str, ClientUpdate]] = {}

    def update(self, client: int, index: int, adapter: Adapter, train: Callable[[], ClientUpdate]) -> ClientUpdate:
        """A client's update of a round: the one that it gave before, else a new one, kept before anybody sees it.

        Args:
            client: who.
            index: the round.
            adapter: the round's global adapter.
            train: gives a new update.

        Raises:
            UpdateError: the round is over, or was answered for another adapter.
            RecordError: the file of the newest update cannot be read.
        """
        question = _digest(adapter)
        last, asked, update = self._newest(client)
        if index < last or (index == last and asked != question):
            raise UpdateError(
                f"answered round {last} before, and is asked for round {index} from another adapter: fresh noise pays "
                "for one update a round (privacy.noise_multiplier). Begin a new run, in a directory of its own."
            )
        if index == last and update is not None:
            return update
        fresh = train()
        self._keep(fresh, index, question)
        return fresh

    def _newest(self, client: int) -> tuple[int, str, ClientUpdate | None]:
        """The newest update's round, the digest of the adapter it began from, and itself; -1 where there is none."""
        if self._directory is None:
            return self._held.get(client, (-1, "", None))
        path = self._path(self._directory, client)
        if not path.exists():
            return -1, "", None
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["facts"])
                delta = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            update = ClientUpdate(client, delta, facts["num_examples"], facts["metrics"])
            return facts["round"], facts["adapter"], update
        except Exception as error:
            raise RecordError(
                f"{path} cannot be read: {error}. It keeps this client from answering a round twice with fresh noise; "
                "remove it, and count the epsilon of one round more."
            ) from None

    def _keep(self, update: ClientUpdate, index: int, question: str) -> None:
        if self._directory is None:
            self._held[update.client_id] = (index, question, update)
            return
        path = self._path(self._directory, update.client_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        metrics = dict(update.metrics)
        facts = {"round": index, "adapter": question, "num_examples": update.num_examples, "metrics": metrics}
        fresh = path.with_suffix(".new")
        tensors = {name: tensor.contiguous() for name, tensor in update.delta.items()}
        save_file(tensors, fresh, metadata={"facts": json.dumps(facts)})
        os.replace(fresh, path)

    @staticmethod
    def _path(directory: Path, client: int) -> Path:
        return directory / f"client-{client:04d}" / "given.safetensors"


def _digest(adapter: Adapter) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(adapter.items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
