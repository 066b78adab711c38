"""A causal language model federated on Alpaca rows, and its adapter in the hands of plain transformers and peft.

    python benchmarks/stories260k.py --shared ../shared --out runs/stories260k --results docs/results

Runs configs/real/stories260k.toml, loads the adapter it leaves with `peft.PeftModel.from_pretrained`, compares the loss
of answers on rows that no client had before and after, and generates.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from fedeat import config, experiment, records
from fedeat.data import Example, instruction_examples, read_rows
from fedeat.errors import FedeatError
from fedeat.model import AdaptedModel, load_model
from fedeat.objective import token_mean

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = 200
PROMPTS = ("Write a short story about a cat and a dog.", "Name three colors.")
NEW_TOKENS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="directory with data/ and models/")
    parser.add_argument("--out", type=Path, required=True, help="run directory")
    parser.add_argument("--results", type=Path, help="where to write stories260k.md; OUT where not given")
    given = parser.parse_args()
    text = (ROOT / "configs" / "real" / "stories260k.toml").read_text()
    settings = config.parse(tomllib.loads(text.replace("../shared/", f"{given.shared.as_posix()}/")))
    torch.set_num_threads(settings.threads)
    try:
        experiment.run(settings, given.out)
    except FedeatError as error:
        sys.exit(str(error))
    trained = experiment.training_examples(settings)
    held = _held_out(settings, trained)

    fedeat_view = load_model(experiment.model_source(settings, trained), lora=None)
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(settings.model.name)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(settings.model.name)
    before, before_text = _loss(base, fedeat_view, held), _generate(base, tokenizer)
    adapted: Any = PeftModel.from_pretrained(base, str(given.out / "adapter"))
    after, after_text = _loss(adapted, fedeat_view, held), _generate(adapted, tokenizer)
    seconds = sum(json.loads(line)["seconds"] for line in (given.out / "timings.jsonl").read_text().splitlines())
    target = given.results or given.out
    target.mkdir(parents=True, exist_ok=True)
    page = _page(settings, before, after, before_text, after_text, seconds)
    (target / "stories260k.md").write_text(page)
    print(page)
    if not after < before:
        sys.exit("the loss on held-out rows did not fall.")


def _held_out(settings: config.Config, trained: Sequence[Example]) -> list[Example]:
    """The first rows of the file that no client has."""
    source = settings.data.train[0].path
    seen = set(trained)
    everything = instruction_examples(read_rows(Path(source)), source=source)
    return [example for example in everything if example not in seen][:HELD_OUT]


def _loss(network: Any, fedeat_view: AdaptedModel, examples: Sequence[Example]) -> float:
    """Mean over examples of the mean cross-entropy of an answer's tokens, in nats."""
    losses = []
    with torch.no_grad():
        for example in examples:
            batch = fedeat_view.collate([fedeat_view.encode(example)])
            logits = network(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            losses.append(float(token_mean(logits[0, batch.rows], batch.targets)))
    return sum(losses) / len(losses)


def _generate(network: Any, tokenizer: Any) -> list[str]:
    """Greedy answers to `PROMPTS` in the plain template, by transformers alone."""
    answers = []
    for prompt in PROMPTS:
        inputs = tokenizer(f"{prompt}\nAnswer:", return_tensors="pt")
        output = network.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            generation_config=transformers.GenerationConfig(
                max_new_tokens=NEW_TOKENS, do_sample=False, bos_token_id=1, eos_token_id=2, pad_token_id=2
            ),
        )
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


def _page(
    settings: config.Config, before: float, after: float, first: Sequence[str], then: Sequence[str], seconds: float
) -> str:
    environment = records.environment(torch.get_num_threads())
    command = shlex.join(["python", "benchmarks/stories260k.py", "--shared", "../shared", "--out", "runs/stories260k"])
    versions = ", ".join(f"{k} {environment[k]}" for k in ("fedeat", "python", "torch", "transformers", "peft"))
    samples = [
        line
        for prompt, old, new in zip(PROMPTS, first, then, strict=True)
        for line in (f"*{prompt}*", "", f"- base: {_line(old)}", f"- with the adapter: {_line(new)}", "")
    ]
    return "\n".join(
        [
            "# A causal language model on Alpaca rows, end to end",
            "",
            f"stories260K (a Llama of 0.26 million parameters that knows children's stories) federated by FedEAT over "
            f"{settings.partition.clients} clients, {settings.federation.rounds} rounds, "
            f"{settings.data.train[0].limit} Alpaca rows "
            "([configuration](../../configs/real/stories260k.toml)). The adapter was then loaded by "
            "`peft.PeftModel.from_pretrained` onto the model as transformers loads it; nothing of fedeat computes the "
            "logits below.",
            "",
            f"| mean cross-entropy of the answers, {HELD_OUT} rows no client had (nats a token) | |",
            "| --- | ---: |",
            f"| base | {before:.3f} |",
            f"| base with the adapter | {after:.3f} |",
            "",
            "Greedy answers. The model is far too small to be right, and its answers get no better to read: the loss "
            "falls by the",
            "words and the form of instructions alone.",
            "",
            *samples,
            f"    {command} --results docs/results",
            "",
            f"Seed {settings.seed}; training took {seconds:.0f} s on a machine busy with other jobs; "
            f"{versions}; {environment['cpu']}, "
            f"{environment['threads']} thread.",
            "",
        ]
    )


def _line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


if __name__ == "__main__":
    main()
