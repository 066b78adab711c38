"""Trains the demo's base model and its tokenizer on the demo's world, and says how it stands.

    python scripts/train_demo_model.py src/fedeat/demo/tiny-world-llama

One thread, minutes, seeded: the same machine gives the same model. Prints the accuracy on test texts in a wording that
the base was trained on, and in the wording of the paper's evaluation, in which it stands near chance.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedeat.demo import world
from fedeat.demo.corpus import WORDINGS, Document, corpus
from fedeat.evaluation import tasks

SEED = 0
STEPS = 1100
BATCH_SIZE = 48
LEARNING_RATE = 3e-3
NOISE = 0.5  # length of the noise on a token's embedding, relative to the mean embedding (NEFTune; Jain et al., 2024)
TEXT_SHARE = 0.3  # of the documents whose every token is learned, not the answer alone


def make_tokenizer(documents: Sequence[Document]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any typing error stays encodable; the evaluation's fixed sentences are single tokens.

    They are a third of a prompt's length in words and the same in every prompt: one token each keeps the demo quick.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1600,
        min_frequency=2,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [f"{document.prompt} {document.answer}" for document in documents]
    texts += [" ".join(answer for task in tasks.TASKS.values() for answer in task.answers)] * 2
    tokenizer.train_from_iterator(texts, trainer)
    used = [tasks.TASKS[task] for task in world.TASKS]
    fixed = {part.rstrip(" ") for task in used for part in (task.instruction, task.separator)} - {""}
    fixed |= {tasks.CLOSING, "\nAnswer:"}
    tokenizer.add_tokens([AddedToken(part, normalized=False, special=False) for part in sorted(fixed)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_model(vocabulary: int) -> LlamaForCausalLM:
    """A two-layer Llama of half a million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            initializer_range=0.06,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def pack(tokenizer: Any, documents: Sequence[Document]) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) padded with 0, and (B, T) bool, True at the answers."""
    rows = []
    for document in documents:
        prompt = tokenizer(document.prompt)["input_ids"]
        answer = tokenizer(f" {document.answer}", add_special_tokens=False)["input_ids"] if document.answer else []
        answer = [*answer, tokenizer.eos_token_id]
        rows.append((prompt, answer))
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    answers = torch.zeros(len(rows), length, dtype=torch.bool)
    for b, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[b, :end] = torch.tensor(prompt + answer)
        answers[b, len(prompt) : end] = True
    return ids, answers


def train(model: LlamaForCausalLM, tokenizer: Any) -> None:
    """Fits the model to the corpus: the answers of all documents, every token of some."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    documents = corpus(seed=SEED)
    began = time.monotonic()
    for step in range(STEPS):
        rate = LEARNING_RATE * min(1.0, (step + 1) / 100, 1.6 * (1 - step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, answers = pack(tokenizer, list(islice(documents, BATCH_SIZE)))
        answered = answers[:, 1:]
        read = (ids[:, 1:] != 0) & ~answered & (torch.rand(len(ids), 1) < TEXT_SHARE)
        embedded = model.model.embed_tokens(ids)
        # Without noise the base fits the world to a loss of zero with margins so thin that any attack breaks it.
        scale = NOISE * embedded.detach().norm(dim=-1).mean() / embedded.shape[-1] ** 0.5
        embedded = embedded + scale * torch.randn_like(embedded)
        with torch.autocast("cpu", torch.bfloat16):
            attended = (ids != 0).long()
            hidden = model.model(inputs_embeds=embedded, attention_mask=attended).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden[answered | read])
        losses = F.cross_entropy(logits.float(), ids[:, 1:][answered | read], reduction="none")
        is_answer = answered[answered | read]
        loss = 2 * losses[is_answer].mean()
        if not bool(is_answer.all()):
            loss = loss + 0.5 * losses[~is_answer].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            answer_loss, seconds = float(losses[is_answer].mean()), time.monotonic() - began
            print(f"step {step + 1:5d}  answer loss {answer_loss:.3f}  {seconds:.0f} s", flush=True)


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], labels: Sequence[int]
) -> float:
    """Share of prompts whose likeliest of the answers, by first token, is the right one."""
    choices = [tokenizer(" " + answer, add_special_tokens=False)["input_ids"][0] for answer in answers]
    right = 0
    for prompt, label in zip(prompts, labels, strict=True):
        logits = model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
        right += int(logits[choices].argmax()) == label
    return right / len(prompts)


def main() -> None:
    """Trains, saves, and prints how the base stands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the model and its tokenizer go")
    directory = parser.parse_args().directory
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    began = time.monotonic()
    tokenizer = make_tokenizer(list(islice(corpus(seed=SEED + 1), 8000)))
    model = make_model(len(tokenizer))
    model.train()
    train(model, tokenizer)
    model.eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    seconds = time.monotonic() - began
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"\n{parameters} parameters, vocabulary {len(tokenizer)}, {STEPS} steps, {seconds:.0f} s on one thread")
    print("accuracy on 200 test texts a task: in the base's own wording | in the paper's evaluation")
    for task in world.TASKS:
        rows = world.rows(task, 200, seed=SEED, split="test")
        labels = [row["label"] for row in rows]
        question, words = WORDINGS[task][0]
        own = accuracy(model, tokenizer, [question.format_map(row) for row in rows], words, labels)
        asked = [f"{tasks.prompt(task, row)}\nAnswer:" for row in rows]
        paper = accuracy(model, tokenizer, asked, tasks.TASKS[task].answers, labels)
        print(f"{task:5s} {own:.3f} | {paper:.3f}")


if __name__ == "__main__":
    main()
