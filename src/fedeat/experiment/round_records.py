"""What the records say of a round and of the clients' data, as values that JSON can hold."""

from __future__ import annotations

import math
import resource
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from fedeat.algorithm import Round
from fedeat.data import Encoded, Example, partition, truncation
from fedeat.evaluation import Row
from fedeat.experiment.inputs import group_name
from fedeat.updates import norm


def round_lines(result: Round, *, malicious: Collection[int], epsilon: float | None = None) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl for a round: one for the server, one for each accepted client.

    The round's loss is the plain mean of what its accepted clients report, whatever weights the rule gave them.

    Args:
        result: the round's.
        malicious: the run's malicious clients.
        epsilon: what privacy has cost each client by then at most; None without privacy.
    """
    private = {} if epsilon is None else {"epsilon": epsilon}
    losses = [update.metrics.get("loss", math.nan) for update in result.updates]
    summary = {
        "kind": "round",
        "round": result.index,
        "cohort": list(result.cohort),
        "accepted": [update.client_id for update in result.updates],
        "malicious": [client for client in result.cohort if client in malicious],
        "weights": {str(client): weight for client, weight in result.weights.items()},
        "iterations": result.iterations,
        "gap": result.gap,
        "loss": sum(losses) / len(losses),
        "update_norm": result.update_norm,
        "rejected": [{"client": item.client_id, "reason": item.reason} for item in result.rejected],
        **private,
    }
    clients = [
        {
            "kind": "client",
            "round": result.index,
            "client": update.client_id,
            "malicious": update.client_id in malicious,
            "num_examples": update.num_examples,
            **update.metrics,
            # As received, not as claimed; nobody knows it of an update that stayed with its client.
            **({"update_norm": norm(update.delta)} if update.delta else {}),
            **({"distance": result.distances[update.client_id]} if update.client_id in result.distances else {}),
            **private,
        }
        for update in result.updates
    ]
    return [summary, *clients]


def evaluation_lines(index: int, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl for the accuracies after a round."""
    return [
        {"kind": "evaluation", "round": index, "task": row["task"], "accuracy": row["accuracy"], "n": row["benign"]}
        for row in rows
    ]


def timing_line(index: int, seconds: float) -> dict[str, Any]:
    """Line of timings.jsonl for a round: its seconds, and the most memory this process ever held, in bytes."""
    # Linux counts in KiB, macOS in bytes.
    factor = 1 if sys.platform == "darwin" else 1024
    line = {
        "round": index,
        "seconds": seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor,
    }
    if torch.cuda.is_available():
        line["peak_accelerator_bytes"] = torch.cuda.max_memory_allocated()
    return line


def client_shares(
    examples: Sequence[Example], split: partition.Partition, shards: Mapping[int, Sequence[Encoded]]
) -> dict[int, dict[str, Any]]:
    """Client -> how many examples it has, how many of them were cut, how many of each label or category."""
    return {client: client_share([examples[i] for i in part], shards[client]) for client, part in enumerate(split)}


def client_share(examples: Sequence[Example], shard: Sequence[Encoded]) -> dict[str, Any]:
    """What partition.json says of one client."""
    counts = Counter(group_name(example, "label" if example.group is None else "column") for example in examples)
    return {**truncation(shard), "counts": dict(sorted(counts.items()))}
