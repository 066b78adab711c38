"""How well a model keeps refusing harmful requests when they are misspelt or their embeddings attacked.

This measures a defence. The attack lives in the embeddings of one's own model: it makes no text and no suffix that
could be used elsewhere, and the answers are judged and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedeat import seeding
from fedeat.attacks.text import misspelt
from fedeat.data import Encoded, Example
from fedeat.errors import ModelError
from fedeat.evaluation.refusal import Behaviour, is_refusal
from fedeat.evaluation.statistics import wilson
from fedeat.model import AdaptedModel
from fedeat.objective import sample_sum
from fedeat.perturbation import pgd


@dataclass(frozen=True)
class RefusalRate:
    """How many requests a model refuses under one attack.

    Attributes:
        attack: "none", "typos" or "embedding".
        radius: relative, of the attack on embeddings; 0 for the others.
        requests: how many were put to the model.
        refused: answers that refuse.
        empty: answers without a word, which neither refuse nor follow.
    """

    attack: str
    radius: float
    requests: int
    refused: int
    empty: int

    def record(self) -> dict[str, Any]:
        """As JSON, with the share and Wilson's 95 % interval."""
        interval = wilson(self.refused, self.requests)
        share = {"rate": self.refused / self.requests, "low": interval.low, "high": interval.high}
        return {**asdict(self), **share}


def refusal_rates(
    model: AdaptedModel,
    behaviours: Sequence[Behaviour],
    *,
    radii: Sequence[float] = (0.05, 0.1),
    steps: int = 20,
    max_new_tokens: int = 24,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[RefusalRate]:
    """Refusals of a language model: of the plain requests, of misspelt ones, and under PGD at each radius.

    PGD makes the beginning of an agreeing answer likely; then the model answers greedily behind the perturbed prompt.

    Args:
        model: a causal language model.
        behaviours: at least one.
        radii: > 0, relative to the mean embedding norm.
        steps: >= 1, of PGD.
        max_new_tokens: >= 1, of an answer; a refusal begins with its phrase.
        batch_size: >= 1, requests at once.
        seed: of the spelling errors.
        progress: told how many answers are judged, and of how many.

    Raises:
        ModelError: the model is a classifier.
    """
    if model.kind != "causal-lm":
        raise ModelError("a classifier answers no requests. Expected a causal language model.")
    unit = model.embedding_unit("l2")
    wrong = [misspelt(item.prompt, seed=seed) for item in behaviours]
    plain = [item.prompt for item in behaviours]
    agreements = [item.agreement for item in behaviours]
    plans = [("none", 0.0, plain), ("typos", 0.0, wrong), *(("embedding", radius, plain) for radius in sorted(radii))]
    found, done = [], 0
    for attack, radius, prompts in plans:
        answers: list[str] = []
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            if attack == "embedding":
                answers += _attacked(model, prompts[part], agreements[part], radius * unit, steps, max_new_tokens)
            else:
                answers += model.generate(prompts[part], max_new_tokens=max_new_tokens)
            done += len(prompts[part])
            progress(done, len(behaviours) * len(plans))
        refused, empty = sum(map(is_refusal, answers)), sum(not answer.strip() for answer in answers)
        found.append(RefusalRate(attack, radius, len(answers), refused, empty))
    return found


def _attacked(
    model: AdaptedModel, prompts: Sequence[str], agreements: Sequence[str], radius: float, steps: int, length: int
) -> list[str]:
    """Greedy answers behind prompts whose embeddings were moved towards agreement, made and cut as `generate` does."""
    wanted = [
        _answered(model, prompt, agreement, length) for prompt, agreement in zip(prompts, agreements, strict=True)
    ]
    batch = model.collate(wanted)

    def reluctance(delta: Tensor | None) -> Tensor:
        # Ascent on the likelihood of agreement: minus the loss on it.
        return -sample_sum(model.supervised_logits(batch, delta), batch.targets, batch.samples)

    with model.attacking():
        generator = seeding.generator(0, "refusal")
        delta = pgd(reluctance, model.embed(batch), batch.perturbable, generator, radius=radius, steps=steps)
    heads = [item.input_ids[: item.answer_start] for item in wanted]
    said: list[list[int]] = [[] for _ in heads]
    closing = model.endings()
    for _ in range(length):
        for answer, token in zip(said, _next_tokens(model, heads, said, delta), strict=True):
            if not (answer and answer[-1] in closing):
                answer.append(token)
        if all(answer[-1] in closing for answer in said):
            break
    return list(model.tokenizer.batch_decode(said, skip_special_tokens=True))


def _answered(model: AdaptedModel, prompt: str, agreement: str, length: int) -> Encoded:
    """A prompt as `generate` puts it to the model, and behind it what of an agreement has room."""
    head = model.encode_prompt(prompt, max_new_tokens=length)
    whole = model.encode(Example(prompt, agreement))
    start = len(head.input_ids)
    answer = whole.input_ids[whole.answer_start :][: max(length, model.max_length - start)]
    return Encoded((*head.input_ids, *answer), (*head.perturbable, *(False for _ in answer)), answer_start=start)


def _next_tokens(
    model: AdaptedModel, heads: Sequence[tuple[int, ...]], said: Sequence[list[int]], delta: Tensor
) -> list[int]:
    """The likeliest token behind each prompt and what was said so far, the prompts perturbed."""
    rows = []
    for head, answer in zip(heads, said, strict=True):
        ids = (*head, *answer, 0)  # the last only marks the place that is predicted
        rows.append(Encoded(ids, (False,) * len(ids), answer_start=len(ids) - 1))
    batch = model.collate(rows)
    width = batch.input_ids.shape[1]
    keep = torch.zeros(len(rows), max(width, delta.shape[1]), 1, device=delta.device)
    for b, head in enumerate(heads):
        keep[b, : len(head)] = 1.0
    moved = F.pad(delta, (0, 0, 0, max(width - delta.shape[1], 0))) * keep
    with model.evaluating():
        logits = model.supervised_logits(batch, moved[:, :width])
    return [int(token) for token in logits.argmax(-1)]
