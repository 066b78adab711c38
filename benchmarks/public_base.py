"""A base model that has seen the tasks: MiniLM-L6 tuned in one place on a public part of the GLUE train files.

    python benchmarks/public_base.py --shared ../shared --out runs/advglue

The paper federates models that were instruction-tuned before, so that its clients do not teach the tasks from nothing.
This is the like for an encoder. Each train file is split once: `PUBLIC` rows tune the encoder here, all weights but the
word embeddings, with four heads that are then thrown away; the other rows are written for the clients. Dev
files are not read.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

FIELDS = {
    "sst2": ("sentence", None, 2),
    "qqp": ("question1", "question2", 2),
    "qnli": ("question", "sentence", 2),
    "mnli": ("premise", "hypothesis", 3),
}
"""Task -> first text, second text, number of classes."""

PUBLIC = {"sst2": 20000, "qqp": 7000, "qnli": 6500, "mnli": 9000}
"""Rows of each train file that tune the base."""

PASSES = {"sst2": 1, "qqp": 2, "qnli": 2, "mnli": 3}
"""How often the base sees each of them."""

HELD_OUT = 400
"""Rows of each train file that measure the base; neither it nor a client trains on them."""

LEAST_WORDS = {"sst2": 10}
"""Words that a client's row has at least: most of SST-2's train rows are fragments, its dev file is of sentences."""

BATCH = 16
LEARNING_RATE = 1.5e-4
MAX_LENGTH = 64
SEED = 0


def split(shared: Path, out: Path) -> dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Task -> (public rows, held-out rows); the rest is written to OUT/data/<task>.jsonl for the clients."""
    parts = {}
    (out / "data").mkdir(parents=True, exist_ok=True)
    for task in FIELDS:
        with gzip.open(shared / "data" / f"{task}_train.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        random.Random(f"{SEED} {task}").shuffle(rows)
        end = PUBLIC[task] + HELD_OUT
        parts[task] = rows[: PUBLIC[task]], rows[PUBLIC[task] : end]
        least = LEAST_WORDS.get(task, 0)
        held = [row for row in rows[end:] if len(row[FIELDS[task][0]].split()) >= least]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in held]
        (out / "data" / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    return parts


def tune(shared: Path, out: Path) -> None:
    """Writes OUT/base (encoder and tokenizer) and OUT/base/public_base.json (what it took and what came of it)."""
    parts = split(shared, out)
    torch.manual_seed(SEED)
    source = str(shared / "models" / "minilm-l6")
    tokenizer = AutoTokenizer.from_pretrained(source)
    starts = dict(zip(FIELDS, (0, 2, 4, 6), strict=True))
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=9, dtype=torch.float32, attn_implementation="eager"
    )
    shuffled = random.Random(SEED)
    batches = []
    for task, (public, _) in parts.items():
        for _ in range(PASSES[task]):
            rows = shuffled.sample(public, len(public))
            # Batches of like length inside pools of 16 batches: little padding, yet another order than by length.
            for begin in range(0, len(rows), 16 * BATCH):
                pool = sorted(rows[begin : begin + 16 * BATCH], key=lambda row: sum(map(len, _texts(task, row))))
                batches += [(task, pool[i : i + BATCH]) for i in range(0, len(pool), BATCH)]
    shuffled.shuffle(batches)
    # The word embeddings are half of the parameters and gain nothing from so little text.
    model.bert.embeddings.word_embeddings.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    warmup = len(batches) // 20
    began = time.monotonic()
    model.eval()  # no dropout: a third of a step's time, against an overfit that two or three passes hardly bring
    for step, (task, rows) in enumerate(batches):
        share = min((step + 1) / warmup, (len(batches) - step) / (len(batches) - warmup))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * share
        loss = F.cross_entropy(
            _logits(model, tokenizer, task, rows, starts), torch.tensor([row["label"] for row in rows])
        )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 99:
            print(f"base: step {step + 1} of {len(batches)}, {time.monotonic() - began:.0f} s", flush=True)
    accuracy = {}
    with torch.no_grad():
        for task, (_, held) in parts.items():
            chunks = [held[i : i + 50] for i in range(0, len(held), 50)]
            answers = torch.cat([_logits(model, tokenizer, task, chunk, starts).argmax(-1) for chunk in chunks])
            right = int((answers == torch.tensor([row["label"] for row in held])).sum())
            accuracy[task] = right / len(held)
    model.bert.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    record = {
        "public_rows": PUBLIC, "passes": PASSES, "held_out_rows": HELD_OUT, "batch_size": BATCH,
        "learning_rate": LEARNING_RATE, "max_length": MAX_LENGTH, "seed": SEED, "steps": len(batches),
        "seconds": round(time.monotonic() - began), "held_out_accuracy_with_its_own_heads": accuracy,
    }  # fmt: skip
    (out / "base" / "public_base.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record), flush=True)


def _texts(task: str, row: dict[str, Any]) -> tuple[str, ...]:
    first, second, _ = FIELDS[task]
    return (row[first],) if second is None else (row[first], row[second])


def _logits(model: Any, tokenizer: Any, task: str, rows: list[dict[str, Any]], starts: dict[str, int]) -> torch.Tensor:
    columns = list(zip(*(_texts(task, row) for row in rows), strict=True))
    batch = tokenizer(*map(list, columns), truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
    with torch.autocast("cpu", torch.bfloat16):
        logits: torch.Tensor = model(**batch).logits
    return logits[:, starts[task] : starts[task] + FIELDS[task][2]].float()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="directory with data/ and models/")
    parser.add_argument("--out", type=Path, required=True, help="where base/ and data/ are written")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    # A page's records bring the first of the two along, not the second.
    if all((given.out / "base" / name).is_file() for name in ("public_base.json", "model.safetensors")):
        print(f"{given.out / 'base'} is there already.")
        return
    tune(given.shared, given.out)


if __name__ == "__main__":
    main()
