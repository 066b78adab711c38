"""What a client's step costs: adversarial training against an ordinary PEFT step on the same batches.

    python benchmarks/client_step.py --out docs/results/client_step                   # CPU, one thread
    python benchmarks/client_step.py --out OUT --quick                                # smallest sizes, in a minute
    python benchmarks/client_step.py --out OUT --device cuda --model-shape mistral-7b # or gemma-2b

Weights are random: cost does not depend on them. All contestants train on the same batch in turn, round after round,
and each is reported as the median over rounds of its time over that of the ordinary step next to it, with the lowest
and the highest: what else the machine does then hits both. On the CPU, times are CPU seconds of one thread. Memory is
the rise of the peak resident set over the idle process (Linux), or the accelerator's peak.

"ordinary" is what a training loop over PEFT does: labels passed to the model, logits at every position. "naive" is an
adversarial step as it is often written: embedding vectors in, logits at every position, parameter gradients in every
inner step, the adapter unmerged. "reference manner" is that of published code. "epoch" rows run over all of a client's
examples, as random batches or as batches of like length, whose padding is packed away unless they say "padded";
"clients" rows train several clients at once.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import client_step_contestants as steps
import client_step_models as models
import torch

from fedeat import objective, perturbation
from fedeat.algorithm import LocalTraining, client_update
from fedeat.data import Batch, length_grouped
from fedeat.engine.batched import Client, client_updates
from fedeat.model import AdaptedModel


@dataclass(frozen=True)
class Row:
    """One contestant on one model and task.

    Attributes:
        model: shape.
        task: what the batches are like.
        contestant: name.
        seconds: of one run, median.
        ratio: to the ordinary step's time, median of interleaved rounds; in "clients" rows to one by one.
        own: to the time of plain training with this contestant's base, median of interleaved rounds.
        low: the lowest of the rounds' ratios.
        high: the highest.
        tokens_per_s: real tokens trained on, padding not counted.
        peak_share: share of the device's measured bfloat16 matrix rate; None on the CPU.
        peak_bytes: memory beyond the idle model, the highest; None where the system does not tell.
        compile_s: seconds on the clock until the compiled layers were there; None where nothing is compiled.
    """

    model: str
    task: str
    contestant: str
    seconds: float
    ratio: float
    own: float
    low: float
    high: float
    tokens_per_s: float
    peak_share: float | None
    peak_bytes: int | None
    compile_s: float | None = None


def main() -> None:
    """Runs the grid and writes results.json and table.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for results.json and table.md")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model-shape", choices=tuple(models.SHAPES), action="append", help="may be given repeatedly")
    parser.add_argument("--rounds", type=int, default=2, help="interleaved rounds")
    parser.add_argument("--batches", type=int, default=8, help="batches of an epoch")
    parser.add_argument("--batch-size", type=int, default=None, help="6 on the CPU, 16 on CUDA")
    parser.add_argument("--length", type=float, default=1.0, help="factor on the examples' lengths")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 3, 5, 10], help="K")
    parser.add_argument("--no-compile", action="store_true", help="leave out the rows with compiled layers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shapes = options.model_shape or (["tiny"] if options.quick else ["m3", "m2"])
    if options.quick:
        options.rounds, options.batches = min(options.rounds, 2), min(options.batches, 2)
    options.batch_size = options.batch_size or (16 if options.device == "cuda" else 6)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for shape in shapes:
        began = time.perf_counter()
        for task in models.TASKS:
            rows += shown(measure(shape, task, options))
        rows += shown(epoch(shape, options))
        for size, length in ((1, 48), (4, 128)):
            rows += shown(together(shape, size, length, options))
        print(f"{shape}: {time.perf_counter() - began:.0f} s", flush=True)
    met = criteria(rows)
    record = {
        "environment": models.environment(options.device),
        "rows": [asdict(row) for row in rows],
        "criteria": [asdict(criterion) for criterion in met],
    }
    (options.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "table.md").write_text(table(rows, met, record["environment"]))
    print((options.out / "table.md").read_text())


def measure(shape: str, task: str, options: argparse.Namespace) -> Iterator[Row]:
    """All contestants on one batch of one shape and task."""
    kept = networks(shape, options.device)
    anchor = next(iter(kept.values()))
    found = models.examples(task, 8 * options.batch_size, models.SHAPES[shape]["vocab_size"], options.length)
    lengths = [len(item.input_ids) for item in found]
    middle = sorted(range(len(found)), key=lengths.__getitem__)[len(found) // 2 :][: options.batch_size]
    batch = anchor.collate([found[i] for i in middle])
    runs = {name: entry for name, entry in steps.contestants(kept, options.steps).items() if task in entry.tasks}
    compile_s: dict[str, float] = {}
    if task == "alpaca" and not options.no_compile:
        added = steps.compiled(kept)
        with tempfile.TemporaryDirectory() as cache:  # an empty one, so that compiling is not found done
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            for name, entry in added.items():
                began = time.perf_counter()
                entry.run([batch])
                compile_s[name] = time.perf_counter() - began
        runs |= added
    peaks = {
        name: models.peak_of(functools.partial(entry.run, [batch]), options.device) for name, entry in runs.items()
    }
    times = interleaved({name: functools.partial(entry.run, [batch]) for name, entry in runs.items()}, options)
    tokens = int(batch.attention_mask.sum())
    size = sum(p.numel() for p in anchor.network.get_base_model().parameters() if not p.requires_grad)
    for name, entry in runs.items():
        seconds = statistics.median(times[name])
        share = None
        if options.device == "cuda" and isinstance(entry.run, steps.Ours):
            share = 4 * size * tokens * entry.run.passes / seconds / models.matrix_rate()
        own = times["plain" if entry.base == "float32" else "plain, bf16 base"]
        found_row = row(shape, task, name, times, "ordinary", tokens, own=own)
        yield Row(
            **{**asdict(found_row), "peak_share": share, "peak_bytes": peaks[name], "compile_s": compile_s.get(name)}
        )


def epoch(shape: str, options: argparse.Namespace) -> Iterator[Row]:
    """An epoch of mixed lengths: the naive step on random batches against ours on batches of like length."""
    for size in dict.fromkeys((options.batch_size, 16)):
        yield from epoch_in_batches(shape, size, options)


def epoch_in_batches(shape: str, size: int, options: argparse.Namespace) -> Iterator[Row]:
    """The same examples in batches of `size`."""
    kept = networks(shape, options.device)
    anchor = next(iter(kept.values()))
    found = models.examples(
        "alpaca", options.batches * options.batch_size, models.SHAPES[shape]["vocab_size"], options.length
    )
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(len(found), generator=generator).tolist()
    random = [order[i : i + size] for i in range(0, len(order), size)]
    alike = length_grouped([len(item.input_ids) for item in found], size, generator=generator)
    loose, grouped = ([anchor.collate([found[i] for i in group]) for group in groups] for groups in (random, alike))
    entries = steps.contestants(kept, [3])
    on_cpu = options.device == "cpu"
    ours = ["plain", "K=3, padded", "K=3", "K=3, bf16 ascent"] if on_cpu else ["plain, bf16 base", "K=3, bf16 base"]
    runs: dict[str, Callable[[], None]] = {
        name: functools.partial(entries[name].run, loose) for name in ("ordinary", "naive K=3")
    }
    runs |= {name: functools.partial(entries[name].run, grouped) for name in ours}
    times = interleaved(runs, options)
    tokens = sum(len(item.input_ids) for item in found)
    for name in runs:
        yield row(shape, f"epoch, {size} a batch", name, times, "ordinary", tokens, own=times[ours[0]])
    left = f"padding {padding(loose):.0%} in random batches, {padding(grouped):.0%} in those of like length"
    print(f"{shape}, {size} a batch: {left}", flush=True)


def together(shape: str, size: int, length: int, options: argparse.Namespace) -> Iterator[Row]:
    """m clients at once against the same clients one by one, at batches of that many samples of at most `length`."""
    model = models.adapted(shape, torch.float32 if options.device == "cpu" else torch.bfloat16, options.device)
    attack = functools.partial(perturbation.pgd, radius=0.05 * model.embedding_unit("l2"), steps=3)
    training = LocalTraining(1, attack, objective.adversarial, functools.partial(torch.optim.AdamW, lr=1e-6))
    found = models.examples("alpaca", 64, models.SHAPES[shape]["vocab_size"], length / 90)
    short = [item for item in found if len(item.input_ids) <= length]
    several = (4,) if options.quick or size > 1 else (1, 4, 8, 16)
    for m in several:
        batches = [model.collate([short[(c * 7 + i) % len(short)] for i in range(size)]) for c in range(m)]
        clients = [Client(c, 1, functools.partial(lambda b, epoch: [b], batches[c])) for c in range(m)]
        adapter = model.adapter()

        def one_by_one(clients: list[Client] = clients, adapter: Any = adapter) -> None:
            for client in clients:
                client_update(
                    model,
                    adapter,
                    client.batches,
                    client_id=client.client_id,
                    num_examples=1,
                    training=training,
                    generator=torch.Generator(device=model.device),
                )

        def at_once(clients: list[Client] = clients, adapter: Any = adapter) -> None:
            client_updates(model, adapter, clients, training=training)

        runs = {f"{m} clients, one by one": one_by_one, f"{m} clients at once": at_once}
        peaks = {name: models.peak_of(run, options.device) for name, run in runs.items()}
        times = interleaved(runs, options)
        tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
        for name in runs:
            found_row = row(shape, f"clients, {size} x {length}", name, times, f"{m} clients, one by one", tokens)
            yield Row(**{**asdict(found_row), "peak_bytes": peaks[name]})


def networks(shape: str, device: str) -> dict[str, AdaptedModel]:
    """dtype -> a model; float32 first, where there is one."""
    dtypes = [torch.float32, torch.bfloat16] if device == "cpu" else [torch.bfloat16]
    return {str(dtype).removeprefix("torch."): models.adapted(shape, dtype, device) for dtype in dtypes}


def interleaved(runs: dict[str, Callable[[], None]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each run in each round, the runs in turn, after one that is not counted."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            times[name].append(models.timed(run, options.device))
    return times


def row(
    shape: str,
    task: str,
    name: str,
    times: dict[str, list[float]],
    anchor: str,
    tokens: int,
    *,
    own: Sequence[float] | None = None,
) -> Row:
    """What the rounds tell of one contestant."""
    ratios = [a / b for a, b in zip(times[name], times[anchor], strict=True)]
    owns = [a / b for a, b in zip(times[name], times[anchor] if own is None else own, strict=True)]
    seconds = statistics.median(times[name])
    ratio, to_own = statistics.median(ratios), statistics.median(owns)
    return Row(shape, task, name, seconds, ratio, to_own, min(ratios), max(ratios), tokens / seconds, None, None)


def padding(batches: Sequence[Batch]) -> float:
    """Share of positions that hold no token."""
    return 1 - sum(int(b.attention_mask.sum()) for b in batches) / sum(b.attention_mask.numel() for b in batches)


@dataclass(frozen=True)
class Criterion:
    """A bound that the step is held to.

    Attributes:
        model: shape.
        what: in words.
        found: the measured figure.
        bound: what it is compared with.
        met: whether it is on the right side.
    """

    model: str
    what: str
    found: float
    bound: str
    met: bool


def criteria(rows: Sequence[Row]) -> list[Criterion]:
    """Each bound of each shape of which the rows are there."""
    seen = {(r.model, r.task, r.contestant): r for r in rows}
    found: list[Criterion] = []

    def hold(shape: str, task: str, contestant: str, what: str, value: Callable[[Row], float], bound: float) -> None:
        one = seen.get((shape, task, contestant))
        if one is not None:
            found.append(Criterion(shape, what, value(one), f"at most {bound}", value(one) <= bound))

    def faster(shape: str, what: str, slow: Row | None, fast: Row | None, bound: float) -> None:
        if slow is not None and fast is not None:
            value = slow.ratio / fast.ratio
            found.append(Criterion(shape, what, value, f"at least {bound}", value >= bound))

    for shape in dict.fromkeys(r.model for r in rows):
        for task in models.TASKS:
            hold(shape, task, "K=3", f"K=3 over one's own plain step, float32, {task}", lambda r: r.own, 3.8)
            hold(shape, task, "K=3, bf16 base", f"K=3 over one's own plain step, bf16, {task}", lambda r: r.own, 3.3)
        hold(shape, "alpaca", "K=10", "K=10 over one's own plain step, float32", lambda r: r.own, 9.8)
        for end in ("", ", compiled"):
            what = f"K=3 with a bf16 ascent{end and ' and compiled layers'} over the ordinary step, alpaca"
            hold(shape, "alpaca", f"K=3, bf16 ascent{end}", what, lambda r: r.ratio, 1.9)
        for task in dict.fromkeys(r.task for r in rows if r.model == shape and r.task.startswith("epoch")):
            naive = seen.get((shape, task, "naive K=3"))
            for name in ("K=3", "K=3, bf16 ascent", "K=3, bf16 base"):
                faster(shape, f"naive K=3 over our {name}, an {task}", naive, seen.get((shape, task, name)), 2.3)
        task = "clients, 1 x 48"
        pair = (seen.get((shape, task, f"8 clients{end}")) for end in (", one by one", " at once"))
        faster(shape, "8 clients one by one over at once, b = 1, T <= 48", *pair, 1.8)
    return found


def shown(rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, printed as they come."""
    for r in rows:
        print(
            f"{r.model:10s} {r.task:16s} {r.contestant:28s} {r.ratio:6.2f} {r.own:6.2f} {r.seconds:8.3f} s", flush=True
        )
        yield r


def table(rows: Sequence[Row], met: Sequence[Criterion], environment: dict[str, Any]) -> str:
    """The bounds, a table a model and task, and what it was measured on."""
    text = [f"`{environment['command']}`", ""]
    text.append(", ".join(f"{key} {value}" for key, value in environment.items() if key != "command") + ".")
    text += ["", "## Bounds", "", "| model | what | found | bound | |", "| --- | --- | ---: | --- | --- |"]
    text += [f"| {c.model} | {c.what} | {c.found:.2f} | {c.bound} | {'met' if c.met else 'not met'} |" for c in met]
    for model, task in dict.fromkeys((r.model, r.task) for r in rows):
        several = task.startswith("clients")
        text += ["", f"## {model}, {task}", ""]
        anchor = "one by one" if several else "ordinary"
        heads = ["step", f"of {anchor}", "lowest to highest", "of own plain", "tokens/s", "bf16 rate"]
        text.append(f"| {' | '.join([*heads, 'peak memory', 'compiling'])} |")
        text.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for r in (r for r in rows if (r.model, r.task) == (model, task)):
            cells = [
                r.contestant,
                f"{r.ratio:.2f}",
                f"{r.low:.2f} to {r.high:.2f}",
                "" if several else f"{r.own:.2f}",
                f"{r.tokens_per_s:.0f}",
                "" if r.peak_share is None else f"{r.peak_share:.0%}",
                "" if r.peak_bytes is None else f"{r.peak_bytes / 2**20:.0f} MiB",
                "" if r.compile_s is None else f"{r.compile_s:.0f} s",
            ]
            text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
