"""Adversarial training in Hugging Face's `Trainer`, or in TRL's `SFTTrainer`, by one mixin before it.

    class AdversarialTrainer(Adversarial, transformers.Trainer): ...
    class AdversarialSFTTrainer(Adversarial, trl.SFTTrainer): ...

    python examples/hf_trainer.py MODEL TEXTS.jsonl          # the Trainer
    python examples/hf_trainer.py MODEL TEXTS.jsonl --trl    # the SFTTrainer; needs trl

MODEL is a causal language model with a tokenizer; each line of TEXTS.jsonl is an object with "prompt" and "answer".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor

import fedeat


class Adversarial:
    """Takes each training step at the worst embeddings inside a ball.

    Attributes:
        radius: relative to the model's mean embedding norm.
        ascent_steps: K.
    """

    radius = 0.05
    ascent_steps = 3
    _unit: float | None = None

    def training_step(self, model: Any, inputs: dict[str, Tensor], *rest: Any, **options: Any) -> Tensor:
        """The trainer's own step, with the perturbation added to the embeddings."""
        inputs = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        if self._unit is None:
            self._unit = fedeat.embedding_unit(model)
        known = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels") if name in inputs}
        delta = fedeat.worst_case(model, known, radius=self.radius * self._unit, steps=self.ascent_steps)
        with fedeat.perturbed(model, delta):
            step: Tensor = super().training_step(model, inputs, *rest, **options)  # type: ignore[misc]
        return step


class AdversarialTrainer(Adversarial, transformers.Trainer):
    """Hugging Face's trainer with the mixin before it."""


def with_trainer(model: Any, tokenizer: Any, rows: list[dict[str, str]], arguments: Any) -> AdversarialTrainer:
    """A trainer over prompts and answers."""

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(" " + row["answer"], add_special_tokens=False)["input_ids"]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    data = datasets.Dataset.from_list([encode(row) for row in rows])
    pad = transformers.DataCollatorForSeq2Seq(tokenizer)
    return AdversarialTrainer(model=model, args=arguments, train_dataset=data, data_collator=pad)


def with_trl(model: Any, tokenizer: Any, rows: list[dict[str, str]], arguments: Any) -> Any:
    """TRL's trainer over prompts and completions, with the mixin before it."""
    import trl

    class AdversarialSFTTrainer(Adversarial, trl.SFTTrainer):  # type: ignore[misc]
        """TRL's trainer with the mixin before it."""

    data = datasets.Dataset.from_list([{"prompt": row["prompt"], "completion": " " + row["answer"]} for row in rows])
    return AdversarialSFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)


def main() -> None:
    """Trains an adapter and prints what the trainer reports."""
    name, texts = sys.argv[1:3]
    use_trl = "--trl" in sys.argv
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    base = transformers.AutoModelForCausalLM.from_pretrained(name)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = [json.loads(line) for line in Path(texts).read_text().splitlines()]
    shared = {"output_dir": "adversarial-out", "num_train_epochs": 1, "report_to": "none", "logging_steps": 1}
    if use_trl:
        import trl

        trainer = with_trl(model, tokenizer, rows, trl.SFTConfig(**shared))
    else:
        trainer = with_trainer(model, tokenizer, rows, transformers.TrainingArguments(**shared))
    print(trainer.train())


if __name__ == "__main__":
    main()
