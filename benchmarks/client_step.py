"""What a client's step costs: adversarial training against an ordinary PEFT step on the same batches.

    python benchmarks/client_step.py --out docs/results/client_step                   # CPU, one thread
    python benchmarks/client_step.py --out OUT --quick                                # smallest sizes, in a minute
    python benchmarks/client_step.py --out OUT --device cuda --model-shape mistral-7b # or gemma-2b

Weights are random: cost does not depend on them. All contestants train on the same examples in turn, round after
round, and each is reported as the median over rounds of its time over that of the ordinary step next to it: what else
the machine does then hits both. On the CPU, times are CPU seconds of one thread. Memory is the rise of the peak
resident set over the idle process (Linux), or the accelerator's peak.

"ordinary" is what a training loop over PEFT does: labels passed to the model, logits at every position. "naive" is an
adversarial step as it is often written: embedding vectors in, logits at every position, parameter gradients in every
inner step, the adapter unmerged.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import tokenizers
import torch
import transformers
from torch import Tensor

from fedeat import objective, perturbation, variants
from fedeat.algorithm import LocalTraining, client_update
from fedeat.data import Batch, Encoded, length_grouped
from fedeat.engine.batched import Client, client_updates
from fedeat.model import AdaptedModel, Lora, ModelSource, loading
from fedeat.model.lora_paths import AscentWeights
from fedeat.perturbation import Ascent

hf: Any = transformers

SHAPES: dict[str, dict[str, Any]] = {
    "m3": {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8},
    "m2": {"vocab_size": 65536, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6},
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    "mistral-7b": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "gemma-2b": {"vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18},
}
"""m3's head is 17 % of its parameters, like Gemma-2B's; m2 has a vocabulary of 64 thousand."""
HEADS = {"m3": (6, 6), "m2": (4, 4), "tiny": (4, 4), "mistral-7b": (32, 8), "gemma-2b": (8, 1)}
TASKS = {"alpaca": (30, 36), "cls": (48, 1)}
"""Task -> mean tokens of a prompt and of its answer: about half or a fiftieth of the tokens is supervised."""


@dataclass(frozen=True)
class Row:
    """One contestant on one model and task.

    Attributes:
        model: shape.
        task: what the batches are like.
        contestant: name.
        seconds: of one pass over the examples, median.
        ratio: to the ordinary step's time, median of interleaved rounds.
        own: to the time of plain training with this contestant's base, median of interleaved rounds.
        tokens_per_s: real tokens trained on, padding not counted.
        peak_share: share of the device's measured bfloat16 matrix rate; None on the CPU.
        peak_bytes: memory beyond the idle model, the highest; None where the system does not tell.
    """

    model: str
    task: str
    contestant: str
    seconds: float
    ratio: float
    own: float
    tokens_per_s: float
    peak_share: float | None
    peak_bytes: int | None


def main() -> None:
    """Runs the grid and writes results.json and table.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for results.json and table.md")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few batches")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model-shape", choices=tuple(SHAPES), action="append", help="may be given more than once")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    parser.add_argument("--batches", type=int, default=4, help="batches a contestant and round")
    parser.add_argument("--batch-size", type=int, default=None, help="8 on the CPU, 16 on CUDA")
    parser.add_argument("--length", type=float, default=1.0, help="factor on the examples' lengths")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 3, 5, 10], help="K")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shapes = options.model_shape or (["tiny"] if options.quick else ["m3", "m2"])
    if options.quick:
        options.rounds, options.batches = min(options.rounds, 2), min(options.batches, 2)
    options.batch_size = options.batch_size or (16 if options.device == "cuda" else 8)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [row for shape in shapes for task in TASKS for row in measure(shape, task, options)]
    for shape in shapes:
        for size, length in ((1, 48), (4, 128)):
            rows += together(shape, size, length, options)
    record = {"environment": environment(options.device), "rows": [asdict(row) for row in rows]}
    (options.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "table.md").write_text(table(rows, record["environment"]))
    print((options.out / "table.md").read_text())


def environment(device: str) -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "cpu": next((line.split(":")[1].strip() for line in names if line.startswith("model name")), "unknown"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        found["accelerator"] = torch.cuda.get_device_name()
        found["bfloat16_matrix_rate"] = matrix_rate()
    return found


@functools.cache
def matrix_rate() -> float:
    """Multiplications and additions a second of a large bfloat16 matrix product on the accelerator."""
    size = 8192
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        began = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(times)


def network(shape: str, dtype: torch.dtype, device: str) -> Any:
    """A random model of that shape, as its class builds it."""
    heads, groups = HEADS[shape]
    common = {"num_attention_heads": heads, "num_key_value_heads": groups, "max_position_embeddings": 4096}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    options = {**SHAPES[shape], **common, **ends}
    if shape == "gemma-2b":
        config, maker = hf.GemmaConfig(**options, head_dim=256), hf.GemmaForCausalLM
    elif shape == "mistral-7b":
        config, maker = hf.MistralConfig(**options, sliding_window=None), hf.MistralForCausalLM
    else:
        config, maker = hf.LlamaConfig(**options), hf.LlamaForCausalLM
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            base = maker(config)
    finally:
        torch.set_default_dtype(before)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    return base


def tokenizer() -> Any:
    """A tokenizer of four tokens: examples are random numbers, so it has but to say what padding is."""
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="a"))
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="a"
    )


def adapted(shape: str, dtype: torch.dtype, device: str) -> AdaptedModel:
    """The random model with a LoRA adapter of rank 8 in all its linear layers."""
    base = network(shape, dtype, device)
    source = ModelSource(shape, template="plain", dtype=str(dtype).removeprefix("torch."), device=device)
    return AdaptedModel(loading.add_lora(base, Lora(rank=8), "causal-lm"), tokenizer(), source)


def examples(task: str, count: int, vocabulary: int, factor: float) -> list[Encoded]:
    """Random tokens, the lengths log-normal as those of instruction data are, about a threefold spread."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        spread = torch.exp(0.5 * torch.randn(2, generator=generator)).tolist()
        prompt, answer = (max(1, round(factor * mean * s)) for mean, s in zip(TASKS[task], spread, strict=True))
        if task == "cls":
            answer = 1
        ids = torch.randint(3, vocabulary, (prompt + answer,), generator=generator).tolist()
        found.append(Encoded(tuple(ids), (True,) * prompt + (False,) * answer, answer_start=prompt))
    return found


Contestant = Callable[[Sequence[Batch]], None]


def measure(shape: str, task: str, options: argparse.Namespace) -> Iterator[Row]:
    """All contestants on one shape and task."""
    device = options.device
    found = examples(task, options.batches * options.batch_size, SHAPES[shape]["vocab_size"], options.length)
    generator = torch.Generator().manual_seed(2)
    lengths = [len(item.input_ids) for item in found]
    order = torch.randperm(len(found), generator=generator).tolist()
    groups = length_grouped(lengths, options.batch_size, generator=generator)
    scattered = [order[i : i + options.batch_size] for i in range(0, len(order), options.batch_size)]
    models = {"bfloat16": adapted(shape, torch.bfloat16, device)}
    if device == "cpu":
        models["float32"] = adapted(shape, torch.float32, device)
    anchor = models.get("float32", models["bfloat16"])
    grouped = [anchor.collate([found[i] for i in group]) for group in groups]
    loose = [anchor.collate([found[i] for i in group]) for group in scattered]
    runs = contestants(models, options.steps)
    plain = {"float32": "plain", "bfloat16": "plain, bf16 base"}
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, int | None] = {}
    longest = max(grouped, key=lambda batch: batch.attention_mask.numel())
    for name, (_, run, uses_loose) in runs.items():
        peaks[name] = peak_of(functools.partial(run, loose if uses_loose else [longest]), device)
    for _, run, _ in runs.values():
        run([longest])
    for _ in range(options.rounds):
        for name, (_, run, uses_loose) in runs.items():
            times[name].append(timed(lambda run=run, b=loose if uses_loose else grouped: run(b), device))
    tokens = sum(lengths)
    size = sum(p.numel() for p in anchor.network.get_base_model().parameters() if not p.requires_grad)
    for name, (dtype, _, _) in runs.items():
        own = times[plain[dtype]] if plain[dtype] in times else times["plain, bf16 base"]
        seconds = statistics.median(times[name])
        share = None
        if device == "cuda":
            passes = runs[name][1].passes if hasattr(runs[name][1], "passes") else 0
            share = 4 * size * tokens * passes / seconds / matrix_rate() if passes else None
        row = Row(
            shape,
            task,
            name,
            seconds,
            statistics.median(a / b for a, b in zip(times[name], times["ordinary"], strict=True)),
            statistics.median(a / b for a, b in zip(times[name], own, strict=True)),
            tokens / seconds,
            share,
            peaks[name],
        )
        print(line(row), flush=True)
        yield row


def together(shape: str, size: int, length: int, options: argparse.Namespace) -> Iterator[Row]:
    """m clients at once against the same clients one by one, at batches of that many samples of at most `length`."""
    model = adapted(shape, torch.float32 if options.device == "cpu" else torch.bfloat16, options.device)
    attack = functools.partial(perturbation.pgd, radius=0.05 * model.embedding_unit("l2"), steps=3)
    training = LocalTraining(1, attack, objective.adversarial, functools.partial(torch.optim.AdamW, lr=1e-6))
    found = examples("alpaca", 64, SHAPES[shape]["vocab_size"], length / 90)
    short = [item for item in found if len(item.input_ids) <= length]
    name = f"{size} x {length} tokens"
    for m in (4, 16) if options.quick else (1, 4, 8, 16):
        batches = [
            [model.collate([short[(c * 7 + size * s + i) % len(short)] for i in range(size)]) for s in range(2)]
            for c in range(m)
        ]
        clients = [Client(c, 1, functools.partial(lambda b, epoch: b, batches[c])) for c in range(m)]
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
        peaks = {key: peak_of(run, options.device) for key, run in runs.items()}
        times: dict[str, list[float]] = {key: [] for key in runs}
        for _ in range(options.rounds):
            for key, run in runs.items():
                times[key].append(timed(run, options.device))
        tokens = sum(int(batch.attention_mask.sum()) for own in batches for batch in own)
        base = times[f"{m} clients, one by one"]
        for key, measured in times.items():
            ratio = statistics.median(a / b for a, b in zip(measured, base, strict=True))
            seconds = statistics.median(measured)
            row = Row(shape, name, key, seconds, ratio, ratio, tokens / seconds, None, peaks[key])
            print(line(row), flush=True)
            yield row


@dataclass(frozen=True)
class Ours:
    """This package's client on a list of batches.

    Attributes:
        model: on which.
        training: how.
        passes: forward and backward runs a step.
    """

    model: AdaptedModel
    training: LocalTraining
    passes: float

    def __call__(self, batches: Sequence[Batch]) -> None:
        client_update(
            self.model,
            self.model.adapter(),
            lambda epoch: batches,
            client_id=0,
            num_examples=1,
            training=self.training,
            generator=torch.Generator(device=self.model.device),
        )


def contestants(models: dict[str, AdaptedModel], steps: Sequence[int]) -> dict[str, tuple[str, Contestant, bool]]:
    """Name -> its base's dtype, what runs it, and whether its batches are padded at random."""
    first = "float32" if "float32" in models else "bfloat16"
    model = models[first]
    radius = 0.05 * model.embedding_unit("l2")
    base = LocalTraining(
        1,
        perturb=None,
        objective=objective.adversarial,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-6),
    )

    def ours(model: AdaptedModel, passes: float, **changes: Any) -> Ours:
        values = {name: getattr(base, name) for name in base.__dataclass_fields__}
        return Ours(model, LocalTraining(**{**values, **changes}), passes)

    def pgd(k: int) -> perturbation.Perturb:
        return functools.partial(perturbation.pgd, radius=radius, steps=k)

    unmerged = view(model, merge=False)
    runs: dict[str, tuple[str, Contestant, bool]] = {
        "ordinary": (first, functools.partial(ordinary, model), False),
        "ordinary, random batches": (first, functools.partial(ordinary, model), True),
        "naive K=3": (first, functools.partial(naive, model, radius, 3), False),
        "naive K=3, random batches": (first, functools.partial(naive, model, radius, 3), True),
    }
    if first == "float32":
        runs["plain"] = (first, ours(model, 1), False)
        runs["K=3, unmerged"] = (first, ours(unmerged, 4, perturb=pgd(3)), False)
        for k in steps:
            runs[f"K={k}"] = (first, ours(model, k + 1, perturb=pgd(k)), False)
        small = view(model, dtype=torch.bfloat16)
        runs["K=3, bf16 ascent"] = (first, ours(small, 4, perturb=pgd(3)), False)
    mixed = functools.partial(objective.mixed, weight=1.0)
    ascent = Ascent(radius, 3)
    runs["FreeLB K=3"] = (first, ours(model, 3, variant=functools.partial(variants.freelb, ascent=ascent)), False)
    runs["mixed K=3"] = (first, ours(model, 5, perturb=pgd(3), objective=mixed), False)
    harvest = functools.partial(variants.harvested, ascent=ascent, weight=1.0)
    runs["mixed K=3, harvested"] = (first, ours(model, 4, variant=harvest), False)
    yopo = functools.partial(variants.yopo, ascent=Ascent(radius, 2), inner=3, objective=objective.adversarial)
    runs["YOPO 2 x 3"] = (first, ours(model, 3, variant=yopo), False)
    half = models["bfloat16"]
    runs["plain, bf16 base"] = ("bfloat16", ours(half, 1), False)
    runs["K=3, unmerged, bf16 base"] = ("bfloat16", ours(view(half, merge=False), 4, perturb=pgd(3)), False)
    for k in steps if first == "bfloat16" else [3]:
        runs[f"K={k}, bf16 base"] = ("bfloat16", ours(half, k + 1, perturb=pgd(k)), False)
    return runs


def view(model: AdaptedModel, *, merge: bool = True, dtype: torch.dtype | None = None) -> AdaptedModel:
    """The same network, ascending in another way."""
    other = AdaptedModel(model.network, model.tokenizer, model.source)
    layers = other._plain if merge else []
    other._ascent = AscentWeights(other._base, layers, other.adapter_parameters().values(), dtype)
    return other


def ordinary(model: AdaptedModel, batches: Sequence[Batch]) -> None:
    """Steps as a training loop over PEFT takes them."""
    parameters = list(model.adapter_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    for batch in batches:
        loss = model.network(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels_of(batch)
        ).loss
        finish(loss, parameters, optimizer)


def naive(model: AdaptedModel, radius: float, steps: int, batches: Sequence[Batch]) -> None:
    """Adversarial steps as they are often written."""
    parameters = list(model.adapter_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    for batch in batches:
        labels = labels_of(batch)
        vectors = model.network.get_input_embeddings()(batch.input_ids).detach()
        keep = batch.perturbable.unsqueeze(-1)
        delta = torch.zeros_like(vectors)
        for _ in range(steps):
            delta.requires_grad_(True)
            loss = model.network(inputs_embeds=vectors + delta, attention_mask=batch.attention_mask, labels=labels).loss
            loss.backward()
            assert delta.grad is not None
            gradient = delta.grad * keep
            length = gradient.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            delta = (delta + 2.5 * radius / steps * gradient / length).detach()
            delta = delta * (radius / delta.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp(max=1.0)
        optimizer.zero_grad()
        loss = model.network(inputs_embeds=vectors + delta, attention_mask=batch.attention_mask, labels=labels).loss
        finish(loss, parameters, optimizer)


def labels_of(batch: Batch) -> Tensor:
    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.rows + 1] = batch.targets
    return labels


def finish(loss: Tensor, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def timed(run: Callable[[], None], device: str) -> float:
    """Seconds: of this thread's CPU, or of the clock with the accelerator awaited."""
    if device == "cpu":
        began = time.process_time()
        run()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_of(run: Callable[[], None], device: str) -> int | None:
    """The most memory a run holds beyond what was held before; None where the system does not tell.

    On the CPU it runs in a forked process, so that what earlier runs left in the allocator is not counted as free.
    """
    gc.collect()
    if device == "cuda":
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS")
            run()
            os.write(send, str(max(resident("VmHWM") - before, 0)).encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return int(told) if told else None


def resident(name: str) -> int:
    """Bytes that the system counts for this process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(entry.split()[1]) * 1024 for entry in status if entry.startswith(name))


def line(row: Row) -> str:
    return f"{row.model:10s} {row.task:7s} {row.contestant:28s} {row.ratio:6.2f} {row.own:6.2f} {row.seconds:8.3f} s"


def table(rows: Sequence[Row], found: dict[str, Any]) -> str:
    """A table a model and task, and what it was measured on."""
    text = [f"`{found['command']}`", ""]
    text.append(", ".join(f"{key} {value}" for key, value in found.items() if key != "command") + ".")
    for model, task in dict.fromkeys((row.model, row.task) for row in rows):
        text += ["", f"## {model}, {task}", ""]
        text.append("| step | of ordinary | of own plain | tokens/s | share of bf16 rate | peak memory |")
        text.append("| --- | ---: | ---: | ---: | ---: | ---: |")
        for row in rows:
            if (row.model, row.task) != (model, task):
                continue
            share = "" if row.peak_share is None else f"{row.peak_share:.0%}"
            memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB"
            text.append(
                f"| {row.contestant} | {row.ratio:.2f} | {row.own:.2f} | {row.tokens_per_s:.0f} | {share} | {memory} |"
            )
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
