"""fedeat's aggregation rules as Flower strategies: in anybody's app one line changes, FedAvg to GeometricMedian.

What differs from Flower's own strategies besides the rule: a reply that is malformed, not finite or of another shape is
rejected by node and reason while the round goes on; nodes are drawn by a seed; sums do not depend on the order in which
replies arrive; waiting for nodes ends; and a client's claim about its number of examples weighs nothing unless asked.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import TypedDict, Unpack

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedeat import aggregation, seeding
from fedeat.aggregation import AnyRule
from fedeat.aggregation.resilience import unchained, unwrap
from fedeat.errors import QuorumError, UpdateError
from fedeat.flower.arrays import specs_of
from fedeat.flower.replies import Values, median_metrics, new_model, read_claim, read_reply, require_numbers

MetricsFunction = Callable[[list[RecordDict], str], MetricRecord]


class FedAvgOptions(TypedDict, total=False):
    """The options of Flower's FedAvg, which every strategy here takes with the same meaning."""

    fraction_train: float
    fraction_evaluate: float
    min_train_nodes: int
    min_evaluate_nodes: int
    min_available_nodes: int
    weighted_by_key: str
    arrayrecord_key: str
    configrecord_key: str
    train_metrics_aggr_fn: MetricsFunction
    evaluate_metrics_aggr_fn: MetricsFunction


class RuleOptions(FedAvgOptions, total=False):
    """The options that all strategies of this module share; `RuleStrategy` says what they mean."""

    seed: int
    quorum: int | None
    wait_s: float
    believe_examples: bool


@dataclass(frozen=True)
class RoundReport:
    """What became of one round's replies.

    Attributes:
        server_round: 1..T.
        weights: node -> how far its update was believed; empty where too few replies were fit.
        rejected: node -> why its reply was not used.
        gap: certified relative gap of the rule, NaN where it certifies nothing.
    """

    server_round: int
    weights: Mapping[int, float]
    rejected: Mapping[int, str]
    gap: float


class RuleStrategy(FedAvg):
    """Any rule of `fedeat.aggregation` as a Flower strategy, for any ArrayRecord.

    Floating-point arrays are aggregated as updates, reply minus what was sent; of integer and boolean arrays, such as
    counters, each element is the lower median of the replies. Options of the rule that count replies (`byzantine`,
    `selected`, `size`) shrink where replies are rejected. Metrics are each key's median over the replies that
    report it as a finite number, unless FedAvg's functions for them are given; of one that raises, the log has
    the name and the reason, and the round no metrics.

    Attributes:
        reports: one a round of training, oldest first.
    """

    def __init__(
        self,
        rule: AnyRule = aggregation.geometric_median,
        *,
        seed: int = 0,
        quorum: int | None = None,
        wait_s: float = 600.0,
        believe_examples: bool = False,
        **options: Unpack[FedAvgOptions],
    ) -> None:
        """What to aggregate with, and what to do about nodes.

        Args:
            rule: a rule on the Gram matrix or on coordinates, with its options through `functools.partial`.
            seed: of the nodes drawn in a round.
            quorum: >= 1, usable replies that a round needs, else the model stays; more than half of those asked by
                default.
            wait_s: > 0, seconds to wait for enough nodes before giving up.
            believe_examples: whether `weighted_by_key` weighs updates; a client may claim any number.
            options: FedAvg's.

        Raises:
            UpdateError: the rule is `trusted_reference`, with steps before it or not: no reply is the server's own.
        """
        if unwrap(unchained(rule)[1])[0] is aggregation.trusted_reference:
            raise UpdateError(
                "trusted_reference finds the trusted update by its place among the updates, and the place of a node's "
                "reply changes with every node that is not drawn, silent or rejected. Choose another rule, or train "
                "the trusted update on the server and hand it to fedeat.aggregate beside the replies, in a strategy of "
                "your own."
            )
        super().__init__(**options)
        self.rule = rule
        self.seed = seed
        self.quorum = quorum
        self.wait_s = wait_s
        self.believe_examples = believe_examples
        self.reports: list[RoundReport] = []
        # FedAvg puts its own weighted mean where none was given, which one odd reply makes fail.
        self.train_metrics_aggr_fn = options.get("train_metrics_aggr_fn") or median_metrics
        self.evaluate_metrics_aggr_fn = options.get("evaluate_metrics_aggr_fn") or median_metrics
        self._sent: ArrayRecord | None = None
        self._asked: list[Message] = []

    def summary(self) -> None:
        """Logs the rule, what it withstands, and FedAvg's settings."""
        nodes = max(self.min_train_nodes, self.min_available_nodes)
        log(INFO, "\t├──> fedeat settings:")
        log(INFO, "\t│\t├── Rule: %s", _name(self.rule))
        log(INFO, "\t│\t├── Withstands: %d of %d nodes", aggregation.tolerates(self.rule, nodes), nodes)
        log(INFO, "\t│\t├── Quorum: %s", self.quorum or "more than half of the nodes asked")
        log(INFO, "\t│\t├── Clients weigh: %s", f"by {self.weighted_by_key}" if self.believe_examples else "the same")
        log(INFO, "\t│\t└── Seed of the nodes drawn: %d", self.seed)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to the nodes drawn for a round of training.

        Raises:
            QuorumError: too few nodes are there after `wait_s` seconds.
            UpdateError: the model has an array that is neither a number nor a boolean.
        """
        require_numbers(arrays)
        self._sent = arrays
        if self.fraction_train == 0.0:
            self._asked = []
            return []
        return self._configure(
            MessageType.TRAIN, server_round, arrays, config, grid, self.fraction_train, self.min_train_nodes
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to the nodes drawn for a round of evaluation.

        Raises:
            QuorumError: too few nodes are there after `wait_s` seconds.
        """
        if self.fraction_evaluate == 0.0:
            self._asked = []
            return []
        return self._configure(
            MessageType.EVALUATE, server_round, arrays, config, grid, self.fraction_evaluate, self.min_evaluate_nodes
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new model and the round's metrics; None for both where replies are too few, or the rule gives up."""
        contents, rejected = self._sort(replies)
        if self._sent is None:
            raise UpdateError("aggregate_train came before configure_train: there is no model to compare with")
        specs = specs_of(self._sent)
        values: dict[int, Values] = {}
        claims: dict[int, float] = {}
        for node, content in contents.items():
            try:
                values[node] = read_reply(content, specs)
                if self.believe_examples:
                    claims[node] = read_claim(content, self.weighted_by_key)
            except UpdateError as error:
                values.pop(node, None)
                rejected[node] = str(error)
        for node, reason in sorted(rejected.items()):
            log(WARNING, "aggregate_train: node %d rejected: %s", node, reason)
        needed = self.quorum or len(self._asked) // 2 + 1
        if not values or len(values) < needed:
            log(WARNING, "aggregate_train: %d usable replies, %d needed; the model stays", len(values), needed)
            self.reports.append(RoundReport(server_round, {}, rejected, math.nan))
            return None, None
        nodes = sorted(values)
        prior = [claims[node] for node in nodes] if self.believe_examples else None
        try:
            model, weights, gap = new_model(self._sent, [values[node] for node in nodes], self.rule, prior)
        except UpdateError as error:
            # What the checks above let through must not end the run either.
            log(WARNING, "aggregate_train: %s cannot aggregate, the model stays: %s", _name(self.rule), error)
            self.reports.append(RoundReport(server_round, {}, rejected, math.nan))
            return None, None
        self.reports.append(RoundReport(server_round, dict(zip(nodes, weights, strict=True)), rejected, gap))
        return model, self._metrics(self.train_metrics_aggr_fn, [contents[node] for node in nodes])

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The metrics of a round of evaluation; None where no reply is usable."""
        contents, rejected = self._sort(replies)
        for node, reason in sorted(rejected.items()):
            log(WARNING, "aggregate_evaluate: node %d rejected: %s", node, reason)
        if not contents:
            return None
        return self._metrics(self.evaluate_metrics_aggr_fn, [contents[node] for node in sorted(contents)])

    def _configure(
        self,
        kind: str,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
        fraction: float,
        least: int,
    ) -> list[Message]:
        present = _wait_for_nodes(grid, max(self.min_available_nodes, least), self.wait_s)
        size = max(int(len(present) * fraction), least)
        order = torch.randperm(len(present), generator=seeding.generator(self.seed, kind, server_round))
        nodes = sorted(present[i] for i in order[:size].tolist())
        log(INFO, "configure_%s: drew %d nodes of %d", kind, len(nodes), len(present))
        config["server-round"] = server_round
        record = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        self._asked = list(self._construct_messages(record, nodes, kind))
        return self._asked

    def _metrics(self, function: MetricsFunction, contents: list[RecordDict]) -> MetricRecord | None:
        """What the function makes of the replies' metrics; None where it fails, which takes nothing from the model."""
        try:
            return function(contents, self.weighted_by_key)
        except Exception as error:  # whatever it is: a reply may hold anything, and the function is the user's
            problem = f"{type(error).__name__}: {error}"
            log(WARNING, "%s failed, the round has no metrics of it: %s", _name(function), problem, exc_info=error)
            return None

    def _sort(self, replies: Iterable[Message]) -> tuple[dict[int, RecordDict], dict[int, str]]:
        """Node -> content of its first reply, and node -> why there is none.

        A reply belongs to the node that was asked: an error's sender is the link, not the node.
        """
        asked = {message.metadata.message_id: message.metadata.dst_node_id for message in self._asked}
        contents: dict[int, RecordDict] = {}
        rejected: dict[int, str] = {}
        for reply in replies:
            node = asked.get(reply.metadata.reply_to_message_id)
            if node is None:
                log(WARNING, "a reply to a message that was not sent was ignored")
            elif reply.has_error():
                rejected.setdefault(node, f"failed with error {reply.error.code}: {str(reply.error.reason)[:200]}")
            elif node not in contents:
                contents[node] = reply.content
        silent = set(asked.values()) - contents.keys() - rejected.keys()
        return contents, {**rejected, **dict.fromkeys(silent, "did not answer")}


class GeometricMedian(RuleStrategy):
    """The geometric median, solved to a certified gap: withstands any minority of malicious nodes (Alg. 2)."""

    def __init__(self, *, tolerance: float = 1e-9, **options: Unpack[RuleOptions]) -> None:
        """As `RuleStrategy`; `tolerance`, 0..1, is the certified relative gap of the objective to its minimum."""
        super().__init__(functools.partial(aggregation.geometric_median, tolerance=tolerance), **options)


class Krum(RuleStrategy):
    """The one update nearest to its neighbours (Blanchard et al., 2017)."""

    def __init__(self, *, byzantine: int | None = None, **options: Unpack[RuleOptions]) -> None:
        """As `RuleStrategy`; `byzantine` malicious nodes are withstood, by default as many as can be."""
        super().__init__(functools.partial(aggregation.krum, byzantine=byzantine), **options)


class MultiKrum(RuleStrategy):
    """The mean of the updates that Krum ranks first."""

    def __init__(self, *, byzantine: int | None = None, **options: Unpack[RuleOptions]) -> None:
        """As `RuleStrategy`; `byzantine` malicious nodes are withstood, by default as many as can be."""
        super().__init__(functools.partial(aggregation.multi_krum, byzantine=byzantine), **options)


class TrimmedMean(RuleStrategy):
    """Of each coordinate the mean without the largest and smallest (Yin et al., 2018)."""

    def __init__(self, *, byzantine: int | None = None, **options: Unpack[RuleOptions]) -> None:
        """As `RuleStrategy`; `byzantine` values are cut off at either end, by default a quarter."""
        super().__init__(functools.partial(aggregation.trimmed_mean, byzantine=byzantine), **options)


class CoordinateMedian(RuleStrategy):
    """Of each coordinate the median (Yin et al., 2018)."""

    def __init__(self, **options: Unpack[RuleOptions]) -> None:
        """As `RuleStrategy`."""
        super().__init__(aggregation.coordinate_median, **options)


class Mean(RuleStrategy):
    """FedAvg with this module's checks: withstands no malicious node. All clients weigh the same unless asked."""

    def __init__(self, **options: Unpack[RuleOptions]) -> None:
        """As `RuleStrategy`."""
        super().__init__(aggregation.mean, **options)


def _wait_for_nodes(grid: Grid, least: int, wait_s: float) -> list[int]:
    """All nodes that are there, sorted, once they are enough."""
    deadline = time.monotonic() + wait_s
    while len(present := sorted(grid.get_node_ids())) < least:
        left = deadline - time.monotonic()
        if left <= 0:
            raise QuorumError(
                f"{len(present)} nodes are there after {wait_s:g} s, expected at least {least}. Start more SuperNodes, "
                "lower min_available_nodes, or wait longer (wait_s)."
            )
        log(INFO, "waiting for nodes: %d of %d are there, %.0f s left", len(present), least, left)
        time.sleep(min(1.0, left))
    return present


def _name(rule: AnyRule | MetricsFunction) -> str:
    """The name of a function, with the options that were bound to it."""
    if isinstance(rule, functools.partial):
        options = ", ".join(f"{key}={value!r}" for key, value in rule.keywords.items() if value is not None)
        return f"{_name(rule.func)}({options})"
    function = rule.apply if isinstance(rule, aggregation.CoordinateRule) else rule
    return str(getattr(function, "__name__", function)).lstrip("_")
