"""An attacker who asks the model: greedy word substitution in the order of the words' importance.

The family of TextFooler (Jin et al., 2020) and BERT-Attack (Li et al., 2020): first every word is left out once, and
those whose absence costs the right answer most go first; then, word by word, the substitute is kept that leaves the
right answer least likely, until another answer wins, or a budget of words or queries is spent.

All texts are attacked side by side, so that what they ask goes to the model in full batches.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeAlias

import torch

from fedeat.attacks.text import Attacked, Substitutes, changeable, like, rewritten, words
from fedeat.evaluation import tasks
from fedeat.evaluation.scoring import answer_scores
from fedeat.evaluation.tasks import Item
from fedeat.model import AdaptedModel

Ask: TypeAlias = Callable[[Sequence[Item]], Sequence[torch.Tensor]]
"""Texts -> (answers,) float64 of each: log-probabilities of the task's answers, by label."""

_Search: TypeAlias = Generator[list[Item], Sequence[torch.Tensor], Attacked]


def greedy_substitution(
    items: Sequence[Item],
    ask: Ask,
    substitutes: Substitutes,
    *,
    rate: float = 0.3,
    budget: int = 300,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Attacked]:
    """Every text with its words substituted until the model fails, or as near to that as the budget went.

    Args:
        items: labelled texts. One that the model has wrong anyway is returned as it is.
        ask: the model; `asked(model)` makes one.
        substitutes: which words may stand for which.
        rate: 0 < rate <= 1, share of the words at most; at least one is tried.
        budget: >= 1, texts put to the model for one text, itself included.
        progress: told how many texts are done, and of how many.
    """
    searches: dict[int, _Search] = {i: _search(item, substitutes, rate, budget) for i, item in enumerate(items)}
    found: dict[int, Attacked] = {}
    wanted = {i: next(search) for i, search in searches.items()}
    while wanted:
        order = list(wanted)
        answers = iter(ask([text for i in order for text in wanted[i]]))
        replies = {i: [next(answers) for _ in wanted[i]] for i in order}
        wanted = {}
        for i in order:
            try:
                wanted[i] = searches[i].send(replies[i])
            except StopIteration as finished:
                found[i] = finished.value
        progress(len(found), len(items))
    return [found[i] for i in range(len(items))]


def asked(model: AdaptedModel, *, batch_size: int = 32) -> Ask:
    """A model as the attacker meets it: texts in, log-probabilities of the answers out."""

    def ask(items: Sequence[Item]) -> list[torch.Tensor]:
        examples = [tasks.example(item, model.kind) for item in items]
        return [scores.log_softmax(-1) for scores in answer_scores(model, examples, batch_size=batch_size)]

    return ask


def queries_per_success(attacked: Sequence[Attacked]) -> float | None:
    """What an attacker pays for a broken text: all queries on texts right before over those broken; None for none."""
    tried = [item for item in attacked if item.fell is not None]
    fallen = sum(bool(item.fell) for item in tried)
    return sum(item.queries for item in tried) / fallen if fallen else None


def _search(item: Item, substitutes: Substitutes, rate: float, budget: int) -> _Search:
    """One text's attack: yields texts to ask about, is sent their answers."""
    method = "greedy substitution"
    (before,) = yield [item]
    queries = 1
    if not _is_right(before, item.label):
        return Attacked(item, item, method, 0.0, queries, None)
    all_words = words(item)
    # A word without a substitute cannot be used, so nothing is asked about it.
    open_words = [index for index in changeable(item, all_words) if substitutes(all_words[index].letters.lower())]
    open_words = open_words[: max(budget - queries, 0)]
    if not open_words:
        return Attacked(item, item, method, 0.0, queries, fell=False)
    without = yield [rewritten(item, all_words, {index: ""}) for index in open_words]
    queries += len(open_words)
    left = {index: float(scores[item.label]) for index, scores in zip(open_words, without, strict=True)}
    changes: dict[int, str] = {}
    best = float(before[item.label])
    for index in sorted(open_words, key=lambda index: left[index])[: max(1, int(rate * len(all_words)))]:
        word = all_words[index].letters
        options = [like(word, other) for other in substitutes(word.lower())][: budget - queries]
        if not options:
            break
        answers = yield [rewritten(item, all_words, {**changes, index: option}) for option in options]
        queries += len(options)
        # A text that breaks the answer first, the least change of meaning among them; else the one that comes nearest.
        broken = next((n for n, scores in enumerate(answers) if not _is_right(scores, item.label)), None)
        chosen = broken
        if chosen is None:
            chosen = min(range(len(options)), key=lambda n: float(answers[n][item.label]))
            if float(answers[chosen][item.label]) >= best:
                continue
        changes[index] = options[chosen]
        best = float(answers[chosen][item.label])
        if broken is not None:
            modified = rewritten(item, all_words, changes)
            return Attacked(item, modified, method, len(changes) / len(all_words), queries, fell=True)
    modified = rewritten(item, all_words, changes) if changes else item
    return Attacked(item, modified, method, len(changes) / len(all_words), queries, fell=False)


def _is_right(scores: torch.Tensor, label: int) -> bool:
    return not bool(scores.isnan().any()) and int(scores.argmax()) == label
