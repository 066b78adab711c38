"""From examples to token ids and padded batches: prompt templates, tokenisation, truncation, collation.

Answer tokens alone are supervised, and a perturbation may act on the prompt's tokens alone (Alg. 1).
Classification sees one text or a pair of texts, perturbable throughout, and a class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from fedeat.data.examples import Batch, Encoded, Example
from fedeat.errors import DataError

Template: TypeAlias = Callable[[str], str]
"""Prompt -> the text the model is shown, ending where the answer begins."""


@dataclass(frozen=True)
class Marks:
    """What a tokenizer adds to a text.

    Attributes:
        special: ids that mark structure rather than text: begin, end, padding, chat turns.
        opening: ids it puts before a text.
        ending: id that closes an answer, None where the tokenizer has no end-of-sequence token.
    """

    special: frozenset[int]
    opening: tuple[int, ...]
    ending: int | None


def marks_of(tokenizer: Any) -> Marks:
    """The marks of a Hugging Face tokenizer."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    structural = {index for index, token in added.items() if getattr(token, "special", False)}
    structural |= set(tokenizer.all_special_ids)
    names = ("bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id")
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown not in {getattr(tokenizer, name, None) for name in names}:
        structural -= {unknown}  # an unknown word is text; but GPT-2's <|endoftext|> is all of them at once
    bare, whole = _ids(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    # What a tokenizer puts *behind* a text, such as BERT's [SEP], would stand between a prompt and its answer.
    starts = [start for start in range(len(whole) - len(bare) + 1) if whole[start : start + len(bare)] == bare]
    opening = whole[: starts[0]] if starts else []
    return Marks(frozenset(structural), tuple(opening), tokenizer.eos_token_id)


def alpaca_template(prompt: str) -> str:
    """Stanford Alpaca's wording without an input field; a row's input follows its instruction after a blank line."""
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{prompt}\n\n### Response:\n"
    )


def plain_template(prompt: str) -> str:
    """The prompt and a cue for the answer, for small models to which every token counts."""
    return f"{prompt}\nAnswer:"


def chat_template(tokenizer: Any) -> Template:
    """The tokenizer's own chat template, one turn of the person and the model's turn opened.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            'data.template = "chat" needs a tokenizer with a chat template; this one has none. Use "alpaca".'
        )

    def render(prompt: str) -> str:
        turns = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    return render


def resolve_template(name: str, tokenizer: Any) -> str:
    """Name of the template, "auto" resolved: "chat" where the tokenizer has a chat template, else "alpaca"."""
    if name != "auto":
        return name
    return "chat" if getattr(tokenizer, "chat_template", None) else "alpaca"


def template_named(name: str, tokenizer: Any) -> Template:
    """Template called "alpaca", "plain", "chat", or "auto".

    Raises:
        DataError: the tokenizer has no chat template, or there is no template of that name.
    """
    name = resolve_template(name, tokenizer)
    if name == "chat":
        return chat_template(tokenizer)
    templates = {"alpaca": alpaca_template, "plain": plain_template}
    if name not in templates:
        raise DataError(f"there is no template {name!r}. Expected auto, alpaca, chat or plain.")
    return templates[name]


def encode_instruction(
    tokenizer: Any,
    example: Example,
    *,
    template: Template,
    max_length: int,
    is_chat: bool = False,
    marks: Marks | None = None,
) -> Encoded:
    """Token ids of a prompt and its answer, the answer closed by the end-of-sequence token.

    Prompt and answer are cut into tokens as one text, so that the answer's tokens are those the model knows from
    running text; only where a token spans the joint are they cut apart.

    Too long an example loses prompt tokens first, from the middle of the prompt, so that the instruction's beginning
    and the cue for the answer stay; only an answer that alone exceeds `max_length` is cut, at its end.

    Args:
        tokenizer: a Hugging Face tokenizer.
        example: with an answer "" the prompt alone is encoded, and nothing is supervised.
        template: renders the prompt.
        max_length: >= 2, tokens of the result at most.
        is_chat: the template writes the beginning-of-sequence token itself.
        marks: the tokenizer's, where they are at hand; finding them costs as much as encoding a text.
    """
    found = marks_of(tokenizer) if marks is None else marks
    text = template(example.prompt)
    prompt = _ids(tokenizer, text)
    answer: list[int] = []
    if example.answer:
        joined = example.answer if text[-1:].isspace() else f" {example.answer}"
        whole = _ids(tokenizer, text + joined)
        answer = whole[len(prompt) :] if whole[: len(prompt)] == prompt else _ids(tokenizer, joined)
        answer += [] if found.ending is None else [found.ending]
    prefix = prompt if is_chat else [*found.opening, *prompt]
    cut = ""
    # At least one prompt token stays: the first answer token must be predicted from something.
    room = max(max_length - len(answer), 1)
    if len(prefix) > room:
        prefix, cut = _cut_middle(prefix, room), "prompt"
    if len(prefix) + len(answer) > max_length:
        answer, cut = answer[: max_length - len(prefix)], "answer"
    perturbable = [token not in found.special for token in prefix] + [False] * len(answer)
    return Encoded((*prefix, *answer), tuple(perturbable), answer_start=len(prefix), cut=cut, away=example.away)


def encode_texts(
    tokenizer: Any, example: Example, *, classes: range, max_length: int, marks: Marks | None = None
) -> Encoded:
    """Token ids of one text or a pair of texts to be classified; the longer text is cut first, at its end.

    Args:
        tokenizer: a Hugging Face tokenizer.
        example: with a label None nothing can be learned from the result.
        classes: the head's rows that stand for this example's task; its label counts from their start.
        max_length: tokens of the result at most, more than the tokenizer adds to a pair.
        marks: the tokenizer's, where they are at hand.

    Raises:
        DataError: the label is not one of the classes, the text has no token, or `max_length` leaves no room for text.
    """
    if example.label is not None and not 0 <= example.label < len(classes):
        raise DataError(
            f"label {example.label} of task {example.task!r} is not one of its {len(classes)} classes. "
            f"Expected 0 to {len(classes) - 1}; rows of a test split have no labels."
        )
    texts = (example.prompt,) if example.pair is None else (example.prompt, example.pair)
    full = tokenizer(*texts, verbose=False)
    if not full["input_ids"]:
        raise DataError(
            f"text {texts[0]!r} of task {example.task!r} has no token, and this tokenizer adds none, so there is "
            "nothing to classify. Leave its row out."
        )
    is_cut = len(full["input_ids"]) > max_length
    if is_cut:
        full = tokenizer(*texts, truncation="longest_first", max_length=max_length)
    ids, types = full["input_ids"], full.get("token_type_ids")
    special = (marks_of(tokenizer) if marks is None else marks).special
    perturbable = tuple(token not in special for token in ids)
    if len(ids) > max_length or (is_cut and not any(perturbable)):  # too short a limit is silently not kept
        raise DataError(
            f"data.max_length is {max_length}, which leaves no room for text beside the tokens that mark its "
            "beginning and end. Raise it."
        )
    return Encoded(
        tuple(ids),
        perturbable,
        answer_start=len(ids),
        label=-1 if example.label is None else classes.start + example.label,
        classes=(classes.start, classes.stop),
        token_type_ids=None if types is None else tuple(types),
        cut="prompt" if is_cut else "",
    )


def truncation(encoded: Sequence[Encoded]) -> dict[str, int]:
    """How many examples there are, and how many lost a part of their prompt or of their answer to `max_length`."""
    cut = Counter(item.cut for item in encoded)
    return {"examples": len(encoded), "cut_prompts": cut["prompt"], "cut_answers": cut["answer"]}


def require_targets(encoded: Sequence[Encoded], *, source: str) -> None:
    """Checks that training can learn from every example; the mean loss of a batch without a target is NaN.

    Args:
        encoded: examples to train on.
        source: whose they are, for the message.

    Raises:
        DataError: there is no example, one has no answer token that could be predicted, or one has no label.
    """
    if not encoded:
        raise DataError(f"{source} has no training examples. Expected at least one.")
    bad = [
        index
        for index, item in enumerate(encoded)
        if (max(item.answer_start, 1) >= len(item.input_ids) if item.label is None else item.label < 0)
    ]
    if bad:
        raise DataError(
            f"{source}: {len(bad)} of {len(encoded)} examples have no answer or no label to learn, first number "
            f"{bad[0] + 1}. Leave them out of the training data."
        )


def collate(encoded: Sequence[Encoded], *, pad_id: int) -> Batch:
    """Pads encoded examples on the right and lists their supervised rows.

    Row `t` of the logits predicts token `t + 1`, so the rows of an answer start one before its first token.

    Args:
        encoded: B >= 1 examples, all of them instructions or all to be classified.
        pad_id: id that stands at padding.
    """
    length = max(len(item.input_ids) for item in encoded)
    shape = (len(encoded), length)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    perturbable = torch.zeros(shape, dtype=torch.bool)
    types = None if encoded[0].token_type_ids is None else torch.zeros(shape, dtype=torch.long)
    classes = None if encoded[0].classes is None else torch.tensor([item.classes for item in encoded])
    rows: list[int] = []
    targets: list[int] = []
    samples: list[int] = []
    for b, item in enumerate(encoded):
        size = len(item.input_ids)
        input_ids[b, :size] = torch.tensor(item.input_ids)
        attention_mask[b, :size] = 1
        perturbable[b, :size] = torch.tensor(item.perturbable)
        if types is not None and item.token_type_ids is not None:
            types[b, :size] = torch.tensor(item.token_type_ids)
        if item.label is not None:
            rows.append(b)
            targets.append(item.label)
            samples.append(b)
            continue
        positions = range(max(item.answer_start, 1), size)  # nothing predicts a sequence's first token
        rows.extend(b * length + t - 1 for t in positions)
        targets.extend(item.input_ids[t] for t in positions)
        samples.extend(b for _ in positions)
    return Batch(
        input_ids,
        attention_mask,
        perturbable,
        torch.tensor(rows, dtype=torch.long),
        torch.tensor(targets, dtype=torch.long),
        torch.tensor(samples, dtype=torch.long),
        classes,
        types,
        torch.tensor([item.away for item in encoded]) if any(item.away for item in encoded) else None,
    )


def length_grouped(
    lengths: Sequence[int], batch_size: int, *, generator: torch.Generator, tokens: int | None = None
) -> list[list[int]]:
    """Indices in batches of similar length, in random order, so that little padding is computed.

    Examples are shuffled, cut into pools of 16 batches, sorted by length inside a pool, and the batches shuffled.

    Args:
        lengths: tokens of each example.
        batch_size: >= 1, examples a batch; the last of a pool may be smaller.
        generator: of the order.
        tokens: >= 1, of a batch at most, its padding counted; None for no limit. An example longer than that is a
            batch of its own.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    pool = 16 * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(order), pool):
        part = sorted(order[start : start + pool], key=lambda index: lengths[index])
        batches.extend(_packed(part, lengths, batch_size, tokens))
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _packed(order: Sequence[int], lengths: Sequence[int], batch_size: int, tokens: int | None) -> list[list[int]]:
    """Indices in rising order of length, cut into batches."""
    batches: list[list[int]] = []
    for index in order:
        fits = bool(batches) and len(batches[-1]) < batch_size
        if fits and tokens is not None:  # what comes is the longest so far, so all are padded to it
            fits = (len(batches[-1]) + 1) * lengths[index] <= tokens
        if fits:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _ids(tokenizer: Any, text: str) -> list[int]:
    # Quiet about texts beyond the tokenizer's maximum: they are cut here.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _cut_middle(tokens: list[int], length: int) -> list[int]:
    head = (length + 1) // 2
    return tokens[:head] + tokens[len(tokens) - (length - head) :]
