"""How small a minority could have turned a round's geometric median around, from the distances on record."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from fedeat.aggregation import turning_share
from fedeat.records import table
from fedeat.report.reading import Run
from fedeat.report.values import Record, client_ids, number


def spreads(run: Run) -> dict[int, float]:
    """Round -> how far its accepted updates lie from the aggregate, in lengths of that; without rounds of no record.

    By the lower median of distances: where all are honest it is about the root mean square distance from their mean
    that `turning_share` speaks of. Attackers raise it by shortening the aggregate.
    """
    found: dict[int, list[float]] = {}
    for line in run.clients:
        distance = number(line.get("distance"))
        if distance is not None:
            found.setdefault(int(line["round"]), []).append(distance)
    lengths = {int(line["round"]): number(line.get("update_norm")) for line in run.rounds}
    return {
        index: statistics.median_low(distances) / length
        for index, distances in found.items()
        if (length := lengths.get(index))
    }


def turning_number(spread: float, line: Record) -> int:
    """The least number of clients of one mind that turns the median of a round's accepted updates around."""
    return math.floor(turning_share(spread) * len(client_ids(line.get("accepted")))) + 1


def weakest_round(runs: Sequence[Run]) -> str:
    """A sentence on the round in which the fewest could have turned a geometric median around, "" without any.

    Rounds with clients that are known to be malicious tell nothing: these have shortened the aggregate already. Nor do
    runs whose median goes by other distances than those on record: behind steps, in product space, layer by layer.
    """
    found: list[tuple[float, float, Run, Record]] = []
    for run in runs:
        section: Mapping[str, object] = table(run.config, "aggregation")
        plain = section.get("space", "factors") == "factors" and section.get("grouping", "model") == "model"
        if section.get("rule") == "geometric_median" and plain and not section.get("before"):
            known = spreads(run)
            for line in run.rounds:
                spread = known.get(int(line["round"]))
                accepted = len(client_ids(line.get("accepted")))
                if spread is not None and accepted and not client_ids(line.get("malicious")):
                    found.append((turning_number(spread, line) / accepted, spread, run, line))
    if not found:
        return ""
    _, spread, run, line = min(found, key=lambda item: (item[0], -item[1]))
    where = f"in round {line['round']}" if len(runs) == 1 else f"in round {line['round']} of {run.name}"
    return (
        f"What the geometric median withstands depends on how far clients agree: {where} half of the updates lay "
        f"{spread:.1f} times as far from their median as that is long, or farther, and "
        f"{turning_number(spread, line)} of {len(client_ids(line.get('accepted')))} clients of one mind could turn it "
        "around."
    )
