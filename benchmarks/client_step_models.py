"""What the client's benchmarks run on: random models of several shapes, random examples, and how a run is measured."""

from __future__ import annotations

import functools
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import tokenizers
import torch
import transformers

from fedeat.data import Encoded
from fedeat.model import AdaptedModel, Lora, ModelSource, loading

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


def adapted(shape: str, dtype: torch.dtype, device: str, **options: Any) -> AdaptedModel:
    """The random model with a LoRA adapter of rank 8 in all its linear layers."""
    base = network(shape, dtype, device)
    named = str(dtype).removeprefix("torch.")
    source = ModelSource(shape, template="plain", dtype=named, device=device, **options)
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
            torch.set_num_threads(1)  # a pool of threads does not survive the fork, and waiting for it never ends
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
