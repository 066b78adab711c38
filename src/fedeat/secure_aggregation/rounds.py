"""A round of Algorithm 2 in which the server sees sums alone: the geometric median over secure sums."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedeat import seeding
from fedeat.aggregation.secure import (
    Contribution,
    SecureMedian,
    Weighted,
    require_weight,
    secure_geometric_median,
    secure_mean,
)
from fedeat.algorithm import Round, RunClients
from fedeat.errors import QuorumError
from fedeat.secure_aggregation.messages import Answer, Ask, Request, Sketch, Sketched, payload
from fedeat.secure_aggregation.server import Sums
from fedeat.updates import Adapter, ClientUpdate, Rejection, apply, norm, validate

_ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class SecureRounds:
    """Plays the rounds of a federation whose updates stay with the clients.

    Attributes:
        train: as `RunClients`, but the updates come without tensors: the clients keep them.
        ask: (round, requests) -> answers, from the clients that keep them.
        quorum: >= 1, updates that a round's aggregate must hold.
        norm_bound: > 0, longest update; clients shorten theirs to it.
        tolerance: > 0, certified relative gap at which the median stops.
        max_sums: most sums of a round.
        sketch_width: 0 for none; else one sum suffices, and the server sees that many linear functions of each update.
        mean: whether the mean is asked for in place of the median.
        seed: of the sketches.
    """

    train: RunClients
    ask: Callable[[int, Mapping[int, Request]], Mapping[int, Answer | str]]
    quorum: int
    norm_bound: float
    tolerance: float
    max_sums: int
    sketch_width: int
    mean: bool
    seed: int

    def __call__(self, adapter: Adapter, cohort: Sequence[int], index: int) -> Round:
        """One round: train the cohort, then aggregate what it keeps.

        Raises:
            QuorumError: fewer than the quorum trained or stayed, or than a secure sum needs; names each and its reason.
            UpdateError: the sums cannot be right, because some client did not follow the protocol.
        """
        trained, rejected = validate(self.train(adapter, cohort, index), {}, cohort)
        self._require(len(trained), index, rejected)
        down = dict.fromkeys(cohort, sum(tensor.nbytes for tensor in adapter.values()))
        up = dict.fromkeys(cohort, 0)
        ask = _counting(functools.partial(self.ask, index), down, up)
        clients = [update.client_id for update in trained]
        sums = Sums(ask, clients, norm_bound=self.norm_bound, sums=1 if self._one_sum else self.max_sums)
        longest = self.norm_bound * math.sqrt(sum(tensor.numel() for tensor in adapter.values()))
        found = self._aggregate(sums, ask, index, longest)
        counted = [
            replace(update, metrics={**update.metrics, "download_bytes": float(down[c]), "upload_bytes": float(up[c])})
            for update in trained
            if (c := update.client_id) in sums.counted
        ]
        rejected += [Rejection(client, sums.lost[client]) for client in clients if client not in sums.counted]
        self._require(len(counted), index, rejected)
        value = _like(adapter, found.value)
        return Round(
            index=index,
            adapter=apply(adapter, value),
            cohort=tuple(cohort),
            updates=tuple(counted),
            rejected=tuple(rejected),
            weights=self._weights(found, counted),
            iterations=found.sums,
            gap=found.gap,
            update_norm=norm(value),
        )

    @property
    def _one_sum(self) -> bool:
        return self.mean or self.sketch_width > 0

    def _aggregate(self, sums: Sums, ask: Ask, index: int, longest: float) -> SecureMedian:
        if self.mean:
            return secure_mean(sums)
        if self.sketch_width:
            sketches = self._sketches(sums, ask, index, longest)
            numbers = list(sketches)

            def numbered(contribution: Contribution) -> Tensor:
                """The median numbers its updates 0, 1, ...; here they have clients."""
                assert isinstance(contribution, Weighted)
                weights = {numbers[place]: weight for place, weight in contribution.weights.items()}
                total = sums(Weighted(weights))
                require_weight(float(total[-1]), sums.reasons())
                return total

            found = secure_geometric_median(numbered, sketches=list(sketches.values()))
            assert found.weights is not None
            kept = torch.zeros(max(numbers) + 1, dtype=torch.float64)
            kept[numbers] = found.weights
            return SecureMedian(found.value, found.sums, found.objective, found.gap, kept, found.converged)
        return secure_geometric_median(sums, tolerance=self.tolerance, max_sums=self.max_sums)

    def _sketches(self, sums: Sums, ask: Ask, index: int, longest: float) -> dict[int, Tensor]:
        """Client -> its sketch, at most as long as one can be; drawn only now that the clients hold their updates."""
        request = Sketch(self.sketch_width, seeding.derive(self.seed, "sketch", index))
        answers = ask(dict.fromkeys(sums.present, request))
        found = {}
        for client in sums.present:
            answer = answers.get(client, "did not answer")
            if not isinstance(answer, Sketched):
                sums.lost[client] = answer if isinstance(answer, str) else "sent no sketch"
            elif not float(torch.linalg.vector_norm(answer.values)) <= longest * _ROUNDING:
                sums.lost[client] = f"sent a sketch longer than {longest:g}, which no update within norm_bound has"
            else:
                found[client] = answer.values
        sums.keep(found)
        return found

    def _weights(self, found: SecureMedian, counted: Sequence[ClientUpdate]) -> dict[int, float]:
        """Client -> weight where the server knows it: equal in a mean, from sketches; else it knows none."""
        if self.mean:
            return {update.client_id: 1 / len(counted) for update in counted}
        if found.weights is None:
            return {}
        weights = {update.client_id: float(found.weights[update.client_id]) for update in counted}
        return {client: weight / sum(weights.values()) for client, weight in weights.items()}

    def _require(self, count: int, index: int, rejected: Sequence[Rejection]) -> None:
        if count < self.quorum:
            reasons = "".join(f"\n  - client {item.client_id}: {item.reason}" for item in rejected)
            raise QuorumError(
                f"round {index}: {count} usable updates, expected at least {self.quorum} (federation.quorum)."
                f" Rejected:{reasons or ' none'}"
            )


def _counting(ask: Ask, down: dict[int, int], up: dict[int, int]) -> Ask:
    """The same, adding up the bytes of what each client is sent and sends."""

    def asked(requests: Mapping[int, Request]) -> Mapping[int, Answer | str]:
        answers = ask(requests)
        for client, request in requests.items():
            down[client] += payload(request)
            up[client] += payload(answers.get(client, ""))
        return answers

    return asked


def _like(adapter: Adapter, values: Tensor) -> dict[str, Tensor]:
    """(d,) values as tensors of the adapter's names and shapes; `client.flattened` is the way there."""
    names = sorted(adapter)
    parts = torch.split(values, [adapter[name].numel() for name in names])
    found = {name: part.reshape(adapter[name].shape) for name, part in zip(names, parts, strict=True)}
    return {name: found[name] for name in adapter}
