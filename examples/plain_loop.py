"""Adversarial training in a PyTorch loop of one's own: three lines more than plain training.

    python examples/plain_loop.py MODEL TEXTS.jsonl

MODEL is a causal language model with a tokenizer; each line of TEXTS.jsonl is an object with "prompt" and "answer".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor

import fedeat


def train(model: Any, batches: list[dict[str, Tensor]], *, radius: float, steps: int = 3) -> list[float]:
    """One pass over the batches; the loss at the worst point found, a batch."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    unit = fedeat.embedding_unit(model)
    losses = []
    for batch in batches:
        delta = fedeat.worst_case(model, batch, radius=radius * unit, steps=steps)
        with fedeat.perturbed(model, delta):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def batch_of(tokenizer: Any, rows: list[dict[str, str]]) -> dict[str, Tensor]:
    """Prompts and answers padded on the right, the answers labelled."""
    found = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(" " + row["answer"], add_special_tokens=False)["input_ids"]
        found.append((prompt + answer, [-100] * len(prompt) + answer))
    length = max(len(ids) for ids, _ in found)
    pad = tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    return {
        "input_ids": torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in found]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in found]),
        "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in found]),
    }


def main() -> None:
    """Trains an adapter and prints the losses."""
    name, texts = sys.argv[1:]
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    base = transformers.AutoModelForCausalLM.from_pretrained(name)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = [json.loads(line) for line in Path(texts).read_text().splitlines()]
    batches = [batch_of(tokenizer, rows[i : i + 8]) for i in range(0, len(rows), 8)]
    print(train(model, batches, radius=0.05))


if __name__ == "__main__":
    main()
