"""The strategies: the rule's result, whatever a minority of replies holds, in Flower's own loop."""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

import fedeat
from fedeat import aggregation
from fedeat.errors import QuorumError, UpdateError
from fedeat.flower import CoordinateMedian, GeometricMedian, Krum, Mean, MultiKrum, RuleStrategy, TrimmedMean

Reply = Callable[..., Message]
Grid = Any

AMOUNTS = (0.011, 0.02, 0.03, 0.041, 0.053, 0.066, 0.072)  # no two alike, nor their differences: nothing ties
START = {"w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), "b": np.float32([[0.5]])[0, 0:1]}


def record(values: dict[str, np.ndarray[Any, Any]]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in values.items()})


def shifted(message: Message, by: float) -> dict[str, np.ndarray[Any, Any]]:
    """What a client that moved every number by `by` would send."""
    sent = message.content["arrays"]
    return {name: array.numpy() + np.float32(by) for name, array in sent.items()}


@pytest.fixture
def nodes(reply: Reply) -> dict[int, Callable[[Message], Message | None]]:
    """Seven honest nodes, numbered from 10, each of which moves the model by its own small amount."""

    def node(by: float) -> Callable[[Message], Message]:
        def answer(message: Message) -> Message:
            metrics = MetricRecord({"num-examples": 10, "loss": by})
            return reply(message, arrays=record(shifted(message, by)), metrics=metrics)

        return answer

    return {10 + i: node(amount) for i, amount in enumerate(AMOUNTS)}


def one_round(strategy: RuleStrategy, grid: Grid, start: dict[str, np.ndarray[Any, Any]] = START) -> Any:
    return strategy.start(grid, record(start), num_rounds=1, timeout=1)


def values(model: ArrayRecord) -> torch.Tensor:
    return torch.cat([torch.from_numpy(array.numpy().copy()).flatten().double() for array in model.values()])


def test_the_result_is_the_rules(nodes: Any, local_grid: Any) -> None:
    updates = torch.tensor(AMOUNTS, dtype=torch.float64)[:, None] * torch.ones(7, dtype=torch.float64)
    start = values(record(START))
    rules = [
        (GeometricMedian(), fedeat.geometric_median),
        (Krum(), fedeat.krum),
        (MultiKrum(), fedeat.multi_krum),
        (TrimmedMean(), fedeat.trimmed_mean),
        (CoordinateMedian(), fedeat.coordinate_median),
        (Mean(), fedeat.mean),
        (RuleStrategy(fedeat.mean_around_median), fedeat.mean_around_median),
    ]
    for strategy, rule in rules:
        found = values(one_round(strategy, local_grid(nodes)).arrays)
        expected = start + fedeat.aggregate(updates, rule=rule).value
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_three_malicious_nodes_of_seven_move_the_mean_but_not_the_median(nodes: Any, local_grid: Any) -> None:
    def far(message: Message) -> Message:
        content = RecordDict({"arrays": record(shifted(message, 1e6)), "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    attacked = {**nodes, 14: far, 15: far, 16: far}
    start = values(record(START))
    assert float((values(one_round(GeometricMedian(), local_grid(attacked)).arrays) - start).abs().max()) < 0.1
    assert float((values(one_round(Mean(), local_grid(attacked)).arrays) - start).abs().max()) > 1e5


def lie(kind: str, message: Message, reply: Reply) -> Message | None:
    """A reply that is wrong in one way."""
    good = shifted(message, 0.01)
    metrics = MetricRecord({"num-examples": 10, "loss": 0.01})
    if kind == "silent":
        return None
    if kind == "error":
        raise RuntimeError("no disk")
    if kind == "two records":
        return reply(message, arrays=record(good), more=record(good), metrics=metrics)
    if kind == "no arrays":
        return reply(message, metrics=metrics)
    wrong: dict[str, dict[str, np.ndarray[Any, Any]]] = {
        "nan": {**good, "w": good["w"] * np.float32(np.nan)},
        "infinity": {**good, "w": good["w"] / np.float32(0)},
        "rank": {**good, "w": good["w"][:1]},
        "dtype": {**good, "w": good["w"].astype(np.float64)},
        "missing": {"w": good["w"]},
        "unknown": {**good, "x": good["b"]},
    }
    return reply(message, arrays=record(wrong[kind]), metrics=metrics)


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("silent", "did not answer"),
        ("error", "failed with error 1: .*no disk"),
        ("two records", "holds 2 ArrayRecords"),
        ("no arrays", "holds 0 ArrayRecords"),
        ("nan", "tensor 'w' holds a NaN or an infinity"),
        ("infinity", "tensor 'w' holds a NaN or an infinity"),
        ("rank", r"tensor 'w' has shape \(1, 3\), expected \(2, 3\)"),
        ("dtype", "tensor 'w' has dtype 'float64', expected float32"),
        ("missing", "1 of 2 tensors are missing, first 'b'"),
        ("unknown", "1 unknown tensors, first 'x'"),
    ],
)
def test_a_bad_reply_is_rejected_by_node_and_the_round_goes_on(
    kind: str, reason: str, nodes: Any, local_grid: Any, reply: Reply
) -> None:
    strategy = GeometricMedian()
    attacked = {**nodes, 12: lambda message: lie(kind, message, reply)}
    result = one_round(strategy, local_grid(attacked))
    without = {node: answer for node, answer in nodes.items() if node != 12}
    assert torch.equal(values(result.arrays), values(one_round(GeometricMedian(), local_grid(without)).arrays))
    (report,) = strategy.reports
    assert list(report.rejected) == [12]
    assert re.search(reason, report.rejected[12])
    assert sorted(report.weights) == sorted(without)
    assert sum(report.weights.values()) == pytest.approx(1)
    assert 0 <= report.gap <= 1e-9


def test_an_odd_metric_neither_ends_the_run_nor_moves_the_median(nodes: Any, local_grid: Any, reply: Reply) -> None:
    def odd(message: Message) -> Message:
        metrics = MetricRecord({"num-examples": 10, "loss": math.nan, "extra": 1.0, "list": [1.0]})
        return reply(message, arrays=record(shifted(message, 0.01)), metrics=metrics)

    result = one_round(GeometricMedian(), local_grid({**nodes, 10: odd}))
    assert dict(result.train_metrics_clientapp[1]) == {"loss": pytest.approx(0.047)}


def test_below_the_quorum_the_model_stays(nodes: Any, local_grid: Any) -> None:
    def silent(message: Message) -> None:
        return None

    grid = local_grid({**nodes, **dict.fromkeys([10, 11, 12, 13], silent)})
    strategy = GeometricMedian()
    messages = list(strategy.configure_train(1, record(START), ConfigRecord(), grid))
    assert strategy.aggregate_train(1, grid.send_and_receive(messages)) == (None, None)
    assert strategy.reports[0].weights == {}
    assert len(strategy.reports[0].rejected) == 4


def test_the_order_of_arrival_changes_no_bit(nodes: Any, local_grid: Any) -> None:
    forward, backward = local_grid(nodes), local_grid(dict(reversed(nodes.items())))
    backward.pull_messages = lambda ids: [backward._waiting.pop(name) for name in ids]
    found = [values(one_round(Mean(), grid).arrays) for grid in (forward, backward)]
    assert torch.equal(*found)


def test_nodes_are_drawn_by_the_seed(nodes: Any, local_grid: Any) -> None:
    def drawn(seed: int) -> list[int]:
        grid = local_grid(nodes)
        GeometricMedian(fraction_train=0.5, min_train_nodes=3, seed=seed).start(
            grid, record(START), num_rounds=3, timeout=1
        )
        return [m.metadata.dst_node_id for m in grid.sent if m.metadata.message_type == "train"]

    assert drawn(0) == drawn(0)
    assert len(drawn(0)) == 9
    assert drawn(0) != drawn(1)


def test_waiting_for_nodes_ends_with_a_remedy(nodes: Any, local_grid: Any) -> None:
    strategy = GeometricMedian(min_available_nodes=8, wait_s=0.01)
    with pytest.raises(QuorumError, match=r"7 nodes are there after 0.01 s, expected at least 8.*wait_s"):
        one_round(strategy, local_grid(nodes))


def test_every_kind_of_array_keeps_its_dtype_and_shape(local_grid: Any, reply: Reply) -> None:
    start = {
        "half": np.ones((2, 2), np.float16),
        "double": np.ones(3),
        "scalar": np.float32(1.5),
        "counter": np.int64(7),
        "mask": np.array([True, False]),
        "empty": np.zeros((0, 4), np.float32),
    }

    def node(steps: int) -> Callable[[Message], Message]:
        def answer(message: Message) -> Message:
            found = {name: array.numpy() for name, array in message.content["arrays"].items()}
            found["counter"] = np.int64(7 + steps)
            found["double"] = found["double"] + steps
            return reply(message, arrays=record(found))

        return answer

    result = one_round(GeometricMedian(), local_grid({1: node(1), 2: node(1), 3: node(9)}), start)
    for name, value in start.items():
        assert result.arrays[name].dtype == str(np.asarray(value).dtype)
        assert tuple(result.arrays[name].shape) == np.shape(value)
    assert result.arrays["counter"].numpy() == 8
    assert result.arrays["double"].numpy().tolist() == [2.0, 2.0, 2.0]


def test_a_model_of_anything_but_numbers_is_refused_before_training(nodes: Any, local_grid: Any) -> None:
    with pytest.raises(UpdateError, match=r"'text' \(<U1\)"):
        one_round(GeometricMedian(), local_grid(nodes), {"text": np.array(["a"])})


def test_examples_weigh_only_where_asked_and_lies_about_them_are_rejected(
    nodes: Any, local_grid: Any, reply: Reply
) -> None:
    def boaster(claim: Any) -> Callable[[Message], Message]:
        return lambda message: reply(
            message, arrays=record(shifted(message, 1.0)), metrics=MetricRecord({"num-examples": claim})
        )

    plain = values(one_round(Mean(), local_grid({**nodes, 10: boaster(10)})).arrays)
    assert torch.equal(plain, values(one_round(Mean(), local_grid({**nodes, 10: boaster(10**9)})).arrays))
    believed = Mean(believe_examples=True)
    moved = values(one_round(believed, local_grid({**nodes, 10: boaster(10**9)})).arrays) - values(record(START))
    assert float(moved.min()) > 0.99
    for claim in (0, -5, math.nan, [1, 2]):
        strategy = Mean(believe_examples=True)
        one_round(strategy, local_grid({**nodes, 10: boaster(claim)}))
        assert "num-examples" in strategy.reports[0].rejected[10]


def test_a_rule_told_to_withstand_many_goes_on_when_some_were_rejected(nodes: Any, local_grid: Any) -> None:
    strategy = TrimmedMean(byzantine=3)
    one_round(strategy, local_grid({**nodes, 10: lambda message: None, 11: lambda message: None}))
    assert len(strategy.reports[0].weights) == 5


def withholding(message: Message) -> None:
    """A node that never answers."""


@pytest.mark.parametrize(
    "rule",
    [
        aggregation.chain(
            functools.partial(aggregation.nearest_neighbour_mixing, byzantine=3),
            rule=functools.partial(aggregation.krum, byzantine=2),
        ),
        aggregation.chain(
            functools.partial(aggregation.bucketing, generator=torch.Generator().manual_seed(0), size=7),
            functools.partial(aggregation.nearest_neighbour_mixing, byzantine=0),
            rule=functools.partial(aggregation.multi_krum, selected=1),
        ),
        functools.partial(aggregation.multi_krum, selected=7),
        aggregation.chain(rule=functools.partial(aggregation.minimum_diameter, byzantine=3)),
    ],
    ids=["mixing", "buckets", "selected", "no steps"],
)
def test_no_option_of_a_rule_or_of_a_step_lets_one_silent_node_end_the_run(
    rule: Any, nodes: Any, local_grid: Any
) -> None:
    strategy = RuleStrategy(rule)
    result = one_round(strategy, local_grid({**nodes, 10: withholding}))
    assert sorted(strategy.reports[0].weights) == sorted(nodes.keys() - {10})
    assert bool((values(result.arrays) > values(record(START))).all())


@pytest.mark.parametrize("size", [1e101, 1e200, 1.7e308, -1.7e308])
def test_a_reply_beyond_what_can_be_squared_is_rejected_by_node(size: float, local_grid: Any, reply: Reply) -> None:
    def node(by: float) -> Callable[[Message], Message]:
        return lambda message: reply(message, arrays=record({"w": message.content["arrays"]["w"].numpy() + by}))

    strategy, start = GeometricMedian(), {"w": np.zeros(4)}
    result = one_round(strategy, local_grid({1: node(0.1), 2: node(0.2), 3: node(0.4), 4: node(size)}), start)
    assert strategy.reports[0].rejected == {4: "tensor 'w' holds numbers beyond 1e+100"}
    assert values(result.arrays).tolist() == pytest.approx([0.2] * 4)
    strategy = GeometricMedian()
    one_round(strategy, local_grid({1: node(0.1), 2: node(0.2), 3: node(0.4), 4: node(1e100)}), start)
    assert not strategy.reports[0].rejected


def test_a_rule_that_cannot_aggregate_leaves_the_model_and_the_log_says_why(
    nodes: Any, local_grid: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def gives_up(gram: torch.Tensor, prior_weights: torch.Tensor) -> Any:
        raise UpdateError("it gave up after 7 branches")

    strategy, logger = RuleStrategy(gives_up), logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    try:
        strategy.start(local_grid(nodes), record(START), num_rounds=2, timeout=1)
    finally:
        logger.removeHandler(caplog.handler)
    assert [report.weights for report in strategy.reports] == [{}, {}]
    assert "gives_up cannot aggregate, the model stays: it gave up after 7 branches" in caplog.text


@pytest.mark.parametrize("option", ["train_metrics_aggr_fn", "evaluate_metrics_aggr_fn"])
def test_a_metrics_function_that_fails_is_named_and_costs_the_round_its_metrics_alone(
    option: Any, nodes: Any, local_grid: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def best_loss(contents: list[RecordDict], weight_key: str) -> MetricRecord:
        return MetricRecord({"best": min(content["metrics"]["lost"] for content in contents)})

    strategy, logger = GeometricMedian(**{option: best_loss}), logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    try:
        result = strategy.start(local_grid(nodes), record(START), num_rounds=2, timeout=1)
    finally:
        logger.removeHandler(caplog.handler)
    usual = GeometricMedian().start(local_grid(nodes), record(START), num_rounds=2, timeout=1)
    assert torch.equal(values(result.arrays), values(usual.arrays))
    assert "best_loss failed, the round has no metrics of it: KeyError: 'lost'" in caplog.text
    failed = option.removesuffix("_aggr_fn")
    assert getattr(result, f"{failed}_clientapp") == {}
    for metrics in {"train_metrics", "evaluate_metrics"} - {failed}:
        assert getattr(result, f"{metrics}_clientapp") == getattr(usual, f"{metrics}_clientapp") != {}


def test_a_trusted_update_is_refused_for_no_reply_is_the_servers_own() -> None:
    trusted = functools.partial(aggregation.trusted_reference, reference=0)
    behind = aggregation.chain(aggregation.norm_clipping, rule=aggregation.chain(rule=trusted))
    for rule in (trusted, behind):
        with pytest.raises(UpdateError, match=r"place of a node's reply changes.*Choose another rule"):
            RuleStrategy(rule)


def test_a_node_that_repeats_a_metric_in_many_records_counts_once(nodes: Any, local_grid: Any, reply: Reply) -> None:
    def loud(message: Message) -> Message:
        many = {f"metrics {i}": MetricRecord({"num-examples": 10, "loss": 1e6}) for i in range(20)}
        return reply(message, arrays=record(shifted(message, 0.1)), **many)

    result = one_round(GeometricMedian(), local_grid({**nodes, 16: loud}))
    assert dict(result.train_metrics_clientapp[1]) == {"loss": pytest.approx(AMOUNTS[3])}


def test_summary_names_the_rule_and_what_it_withstands(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    try:
        MultiKrum(byzantine=2, min_train_nodes=7).summary()
        TrimmedMean().summary()
    finally:
        logger.removeHandler(caplog.handler)
    assert "multi_krum(byzantine=2)" in caplog.text
    assert "Withstands: 2 of 7 nodes" in caplog.text
    assert "trimmed_mean" in caplog.text


def test_every_strategy_is_a_fedavg_and_takes_its_options() -> None:
    for make in (GeometricMedian, Krum, MultiKrum, TrimmedMean, CoordinateMedian, Mean):
        strategy = make(fraction_train=0.5, min_available_nodes=4, weighted_by_key="n", arrayrecord_key="model")
        assert isinstance(strategy, FedAvg)
        assert strategy.arrayrecord_key == "model"
