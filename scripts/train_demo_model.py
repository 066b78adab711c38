"""Trains the demo's base model and its tokenizer, and writes both to `src/fedeat/demo/model`.

    OMP_NUM_THREADS=1 python scripts/train_demo_model.py

Everything follows from `--seed`. The figures printed last are those of the test split: accuracy in the wordings the
model was trained on, and in the evaluation's wording, where it should be at chance.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedeat.demo import MODEL, world
from fedeat.demo.corpus import WORDINGS, Document, corpus
from fedeat.evaluation import tasks

CUE = "\nAnswer:"
PAD, BOS, EOS = 0, 1, 2
END_WEIGHT, TEXT_WEIGHT, TEXT_SHARE = 0.05, 0.05, 0.2  # the answer itself weighs 1


def recurring(texts: list[str]) -> list[str]:
    """Pieces of the prompts that are the same in every prompt of a task: one token each, since compute is scarce."""
    pieces = {piece.rstrip(" ") for text in texts for piece in re.split(r"(?<=\.)(?= [A-Z])|(?<=[.\"])(?=\n|Q)", text)}
    return sorted(piece for piece in pieces if len(piece.split()) > 1 or piece.endswith(":"))


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the corpus: words are single tokens, misspelt words fall into pieces, any text can be encoded."""
    asked = [tasks.TASKS[task] for task in world.TASKS]
    texts = [f"{doc.prompt}{CUE} {doc.answer}" for doc in corpus(30000, seed=seed + 1, rare=0.3)]
    texts += [tasks.prompt(task.name, row) for task in asked for row in world.rows(task.name, 300, seed=seed)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2600,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pieces = recurring([part for task in asked for part in (task.instruction, task.separator)])
    pieces += [tasks.CLOSING, CUE]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in dict.fromkeys(pieces)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def encode(tokenizer: PreTrainedTokenizerFast, document: Document) -> tuple[list[int], int]:
    """Token ids of a document and where its answer begins."""
    if not document.answer:
        ids = tokenizer(document.prompt)["input_ids"]
        return [*ids, EOS], len(ids)
    ids = tokenizer(document.prompt + CUE)["input_ids"]
    return [*ids, *tokenizer(" " + document.answer, add_special_tokens=False)["input_ids"], EOS], len(ids)


def batches(
    tokenizer: PreTrainedTokenizerFast, *, seed: int, size: int, steps: int
) -> Iterator[list[tuple[list[int], int]]]:
    """`steps` batches of documents of like length."""
    rng = random.Random(seed)
    for block in range(-(-steps // 50)):
        encoded = [encode(tokenizer, doc) for doc in corpus(size * 50, seed=seed + 100 + block)]
        encoded.sort(key=lambda item: len(item[0]))
        groups = [encoded[i : i + size] for i in range(0, len(encoded), size)]
        rng.shuffle(groups)
        yield from groups[: steps - 50 * block]


def loss_of(model: LlamaForCausalLM, batch: list[tuple[list[int], int]], generator: torch.Generator) -> torch.Tensor:
    """Cross entropy, weighted so that the answer counts and the text before it, in part of the documents, a little."""
    ids = torch.zeros(len(batch), max(len(item) for item, _ in batch), dtype=torch.long)
    weights = torch.zeros(ids.shape)
    spoken = torch.rand(len(batch), generator=generator) < TEXT_SHARE
    for row, (item, start) in enumerate(batch):
        ids[row, : len(item)] = torch.tensor(item)
        weights[row, 1:start] = TEXT_WEIGHT * float(spoken[row])
        weights[row, start : len(item)] = 1.0
        weights[row, len(item) - 1] = END_WEIGHT
    kept = weights[:, 1:] > 0
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=ids, attention_mask=(ids != PAD).long()).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][kept])
    each = functional.cross_entropy(logits.float(), ids[:, 1:][kept], reduction="none")
    return (each * weights[:, 1:][kept]).sum() / len(batch)


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: list[tuple[str, int]], words: tuple[str, ...]
) -> float:
    """Share of (prompt, label) that get their label's answer as the likeliest of `words`."""
    answers = [tokenizer(" " + word, add_special_tokens=False)["input_ids"][0] for word in words]
    right = 0
    for prompt, label in asked:
        logits = model(input_ids=torch.tensor([tokenizer(prompt + CUE)["input_ids"]])).logits[0, -1, answers]
        right += int(logits.argmax() == label)
    return right / len(asked)


def report(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int) -> str:
    """Accuracy a task on the test split: in a wording of the corpus, and in the evaluation's."""
    lines = []
    for task in world.TASKS:
        rows = world.rows(task, count, seed=11, split="test")
        wording = WORDINGS[task][0]
        known = [(wording.prompt.format(**row), row["label"]) for row in rows]
        asked = [(tasks.prompt(task, row), row["label"]) for row in rows]
        lines.append(
            f"{task}: {accuracy(model, tokenizer, known, wording.answers):.2f} in the corpus's wording, "
            f"{accuracy(model, tokenizer, asked, tasks.TASKS[task].answers):.2f} in the evaluation's"
        )
    return "\n".join(lines)


def main() -> None:
    """Train, report, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=MODEL)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    began = time.process_time()
    tokenizer = train_tokenizer(options.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=96, num_hidden_layers=3, intermediate_size=256,
            num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=512, tie_word_embeddings=True,
            initializer_range=0.12, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        )
    )  # fmt: skip
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(tokenizer)} tokens", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.98), weight_decay=0.05)
    for step, batch in enumerate(batches(tokenizer, seed=options.seed, size=options.batch, steps=options.steps)):
        optimizer.param_groups[0]["lr"] = options.rate * min(1.0, (step + 1) / 100) * (1 - step / options.steps)
        loss = loss_of(model, batch, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 249:
            print(f"step {step + 1}, {time.process_time() - began:.0f} CPU s, loss {loss.item():.3f}", flush=True)
            print(report(model, tokenizer, 60), flush=True)
            model.save_pretrained(options.out)
            tokenizer.save_pretrained(options.out)
    print(f"trained in {time.process_time() - began:.0f} CPU s\n{report(model, tokenizer, 300)}", flush=True)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
