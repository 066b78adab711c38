"""From a model to answers: label likelihood, generation judged by TrustLLM's rules, and class logits.

Likelihood (default) compares log p(answer | prompt), summed over the answer's tokens as the model's template renders
them, the closing end-of-sequence token left out: whether a model stops there says nothing of which answer it holds
true. The sum is not divided by the answer's length, since p(answer) is what is compared; a tokenizer that cuts one
answer into more pieces than another does not make it less probable in itself.

Generation decodes greedily and looks for the task's answer words, as TrustLLM's robustness evaluation does. An answer
with none of them, or with those of two labels, is unparsable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeVar

import torch

from fedeat.data import Encoded, Example
from fedeat.errors import ModelError
from fedeat.evaluation.tasks import named

if TYPE_CHECKING:  # scoring needs no model library, only a model
    from fedeat.model import AdaptedModel

T = TypeVar("T")
Scorer = Literal["likelihood", "generation"]
Progress = Callable[[int, int], None]
"""Called with how many distinct texts are answered and how many there are."""
NEW_TOKENS = 16
"""Length of a generated answer."""

# TrustLLM lets a generation restate the question instead of saying yes or no.
_PHRASES = {
    "yes": ("the premise entails the hypothesis",),
    "no": ("the premise does not entail the hypothesis",),
}


def predict(
    model: AdaptedModel,
    examples: Sequence[Example],
    *,
    scorer: Scorer = "likelihood",
    batch_size: int = 32,
    max_new_tokens: int = NEW_TOKENS,
    progress: Progress | None = None,
    questions: Sequence[Encoded] | None = None,
) -> list[int | None]:
    """The class index a model answers for each example; None for an answer that is none of the task's.

    Equal texts are put to the model once. The longest go first, in batches of like length, so that a batch too
    large for the memory fails at once or never.

    Args:
        model: a causal language model or a classifier with a head for each task.
        examples: of tasks in `tasks.TASKS`; their labels and answers are not looked at.
        scorer: how a causal language model's answer is read; a classifier's is its largest logit.
        batch_size: sequences in a forward pass, >= 1.
        max_new_tokens: length of a generated answer, >= 1.
        progress: told after each batch.
        questions: what `asked` made of the examples, where it was called before; a generation makes its own.

    Raises:
        DataError: an example's task is unknown.
        ModelError: the tokenizer cannot tell two answers of a task apart, an answer does not fit into the model's
            maximum length, or a classifier lacks a task's head.
    """
    if scorer not in ("likelihood", "generation"):
        raise ValueError(f'expected scorer "likelihood" or "generation", got {scorer!r}')
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}")
    if model.kind == "sequence-classification" or scorer == "likelihood":
        scores = answer_scores(model, examples, batch_size=batch_size, progress=progress, questions=questions)
        return [_largest(found) for found in scores]
    where, distinct = _distinct(examples)
    answers = _generated(model, distinct, batch_size, max_new_tokens, progress or _quiet)
    return [answers[index] for index in where]


def answer_scores(
    model: AdaptedModel,
    examples: Sequence[Example],
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
    questions: Sequence[Encoded] | None = None,
) -> list[torch.Tensor]:
    """How a model rates each answer of each example's task: (answers,) float64, by label.

    A language model's are log-likelihoods of the answers, a classifier's its logits; the largest is the answer given,
    and `log_softmax` makes either log-probabilities among the answers. Equal texts are put to the model once.

    Args:
        model: a causal language model or a classifier with a head for each task.
        examples: of tasks in `tasks.TASKS`; their labels and answers are not looked at.
        batch_size: sequences in a forward pass, >= 1.
        progress: told after each batch.
        questions: what `asked` made of the examples, where it was called before.

    Raises:
        DataError, ModelError: as `predict`.
    """
    where, distinct = _distinct(examples)
    tokens = dict(zip(where, asked(model, examples) if questions is None else questions, strict=True))
    score = _class_scores if model.kind == "sequence-classification" else _likelihoods
    scores = score(model, distinct, [tokens[index] for index in range(len(distinct))], batch_size, progress or _quiet)
    return [scores[index] for index in where]


def asked(
    model: AdaptedModel, examples: Sequence[Example], *, scorer: Scorer = "likelihood", max_new_tokens: int = NEW_TOKENS
) -> list[Encoded]:
    """What a model is shown of each example when `predict` asks it, without an answer.

    `cut` is "prompt" where the model's maximum length took a part of it.

    Args:
        model: a causal language model or a classifier with a head for each task.
        examples: of tasks in `tasks.TASKS`; their labels and answers are not looked at.
        scorer: how a causal language model's answer is read.
        max_new_tokens: length of a generated answer, >= 1.

    Raises:
        DataError, ModelError: as `predict`.
    """
    where, distinct = _distinct(examples)
    if model.kind == "sequence-classification":
        found = [model.encode(replace(entry, task=_head(model, entry))) for entry in distinct]
    elif scorer == "generation":
        found = [model.encode_prompt(entry.prompt, max_new_tokens=max_new_tokens) for entry in distinct]
    else:
        first = {entry.task: entry for entry in reversed(distinct)}
        options = {task: _candidates(model, entry) for task, entry in first.items()}
        found = [_question(model, entry, options[entry.task]) for entry in distinct]
    return [found[index] for index in where]


def answer_sequences(
    model: AdaptedModel, examples: Sequence[Example]
) -> tuple[list[Encoded], tuple[tuple[int, ...], ...]]:
    """Examples of one task followed by its longest answer, so that all answers follow the same prompt, and the answers.

    Args:
        model: a causal language model.
        examples: at least one.

    Raises:
        ModelError: as `predict`.
    """
    options = _candidates(model, examples[0])
    longest = named(examples[0].task).answers[options.longest]
    found = []
    for entry in examples:
        full = model.encode(replace(entry, answer=longest))
        stop = full.answer_start + len(options.tokens[options.longest])  # the closing token says nothing
        found.append(replace(full, input_ids=full.input_ids[:stop], perturbable=full.perturbable[:stop]))
    return found, options.tokens


def _distinct(examples: Sequence[Example]) -> tuple[list[int], list[Example]]:
    """Where each example is among the distinct ones, and these without their labels."""
    place: dict[tuple[str, str, str | None], int] = {}
    where = [place.setdefault((entry.task, entry.prompt, entry.pair), len(place)) for entry in examples]
    distinct = [Example(prompt, pair=pair, task=task) for task, prompt, pair in place]
    for task in {entry.task for entry in distinct}:
        named(task)
    return where, distinct


def _quiet(done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


def judge(text: str, task: str) -> int | None:
    """Class index that a generated text answers, None for none or more than one (TrustLLM's keyword rules).

    Words match whole and in any case. TrustLLM's Chinese synonyms are left out.
    """
    found = [
        label
        for label, answer in enumerate(named(task).answers)
        if re.search(rf"\b(?:{'|'.join((answer, *_PHRASES.get(answer, ())))})\b", text, re.IGNORECASE)
    ]
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class _Candidates:
    """Token ids of a task's answers, by label; `longest` is the label of the longest."""

    tokens: tuple[tuple[int, ...], ...]
    longest: int


def _likelihoods(
    model: AdaptedModel, examples: list[Example], questions: list[Encoded], size: int, tell: Progress
) -> list[torch.Tensor]:
    candidates: dict[str, _Candidates] = {}
    sequences: list[tuple[Encoded, int, int]] = []  # tokens, example, label or -1 for all labels at once
    for index, (entry, question) in enumerate(zip(examples, questions, strict=True)):
        if entry.task not in candidates:
            candidates[entry.task] = _candidates(model, entry)
        options, head = candidates[entry.task], question.input_ids
        single = all(len(tokens) == 1 for tokens in options.tokens)
        for label, tokens in enumerate(options.tokens[:1] if single else options.tokens):
            ids = (*head, *tokens)
            sequence = Encoded(ids, (False,) * len(ids), answer_start=len(head))
            sequences.append((sequence, index, -1 if single else label))
    scores = [torch.zeros(len(candidates[entry.task].tokens), dtype=torch.float64) for entry in examples]
    done: set[int] = set()
    for batch in _longest_first(sequences, size, key=lambda item: len(item[0].input_ids)):
        packed = model.collate([sequence for sequence, _, _ in batch])
        with model.evaluating():
            logprobs = model.supervised_logits(packed).float().log_softmax(-1).double().cpu()
        samples = packed.samples.cpu()
        chosen = logprobs.gather(1, packed.targets.cpu()[:, None])[:, 0]
        sums = torch.zeros(len(batch), dtype=torch.float64).index_add(0, samples, chosen)
        for b, (_, index, label) in enumerate(batch):
            if label >= 0:
                scores[index][label] = sums[b]
            else:  # one supervised row a sample, at which all single-token answers are read
                scores[index][:] = logprobs[b, [tokens[0] for tokens in candidates[examples[index].task].tokens]]
            done.add(index)
        tell(len(done), len(examples))
    return scores


def _question(model: AdaptedModel, entry: Example, options: _Candidates) -> Encoded:
    """An example's prompt, cut where it must be for the longest answer, so that all answers follow the same."""
    full = model.encode(replace(entry, answer=named(entry.task).answers[options.longest]))
    stop = full.answer_start
    return replace(full, input_ids=full.input_ids[:stop], perturbable=full.perturbable[:stop])


def _candidates(model: AdaptedModel, entry: Example) -> _Candidates:
    """Tokens of a task's answers, taken from one example: a template ends alike whatever the prompt."""
    answers = named(entry.task).answers
    found = []
    for answer in answers:
        encoded = model.encode(replace(entry, answer=answer))
        if encoded.cut == "answer":
            raise ModelError(
                f'the answer "{answer}" of {entry.task} does not fit into {model.max_length} tokens. Raise max_length'
            )
        tokens = encoded.input_ids[encoded.answer_start :]
        if len(tokens) > 1 and tokens[-1] == model.tokenizer.eos_token_id:
            tokens = tokens[:-1]
        found.append(tokens)
    for second, tokens in enumerate(found):
        first = found.index(tokens)
        if first != second:
            raise ModelError(
                f'the tokenizer gives "{answers[first]}" and "{answers[second]}", answers of {entry.task}, the '
                'same tokens, so their likelihoods are equal. Use scorer = "generation", or a tokenizer that knows both'
            )
    return _Candidates(tuple(found), max(range(len(found)), key=lambda label: len(found[label])))


def _generated(
    model: AdaptedModel, examples: list[Example], size: int, max_new_tokens: int, tell: Progress
) -> list[int | None]:
    answers: list[int | None] = [None] * len(examples)
    done = 0
    for batch in _longest_first(list(enumerate(examples)), size, key=lambda item: len(item[1].prompt)):
        said = model.generate([entry.prompt for _, entry in batch], max_new_tokens=max_new_tokens)
        for (index, entry), text in zip(batch, said, strict=True):
            answers[index] = judge(text, entry.task)
        done += len(batch)
        tell(done, len(examples))
    return answers


def _class_scores(
    model: AdaptedModel, examples: list[Example], questions: list[Encoded], size: int, tell: Progress
) -> list[torch.Tensor]:
    encoded = []
    for index, (entry, question) in enumerate(zip(examples, questions, strict=True)):
        head = _head(model, entry)
        encoded.append((index, question, model.heads[head]))
        if len(model.heads[head]) != len(named(entry.task).answers):
            raise ModelError(
                f"the classifier's head for {head} has {len(model.heads[head])} classes; {entry.task} has "
                f"{len(named(entry.task).answers)}. Evaluate it on the tasks it was trained for"
            )
    scores = [torch.empty(0, dtype=torch.float64)] * len(examples)
    done = 0
    for batch in _longest_first(encoded, size, key=lambda item: len(item[1].input_ids)):
        with model.evaluating():
            logits = model.supervised_logits(model.collate([tokens for _, tokens, _ in batch])).float().cpu()
        for row, (index, _, classes) in zip(logits, batch, strict=True):
            scores[index] = row[classes.start : classes.stop].double()
        done += len(batch)
        tell(done, len(examples))
    return scores


def _head(model: AdaptedModel, entry: Example) -> str:
    """The task whose head in a classifier answers an example."""
    return entry.task if entry.task in model.heads else named(entry.task).head


def _largest(scores: torch.Tensor) -> int | None:
    """Index of the largest score; None where the model broke down to NaN, which is no answer."""
    return None if bool(scores.isnan().any()) else int(scores.argmax())


def _longest_first(items: Sequence[T], size: int, *, key: Callable[[T], int]) -> Iterator[list[T]]:
    ordered = sorted(items, key=key, reverse=True)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
