"""Which words a model takes for alike: the nearest in its own embedding table.

Near in an embedding table is near in use, which opposites are too ("good" and "bad"): a neighbour is no synonym by
right. The threshold on similarity, and a list of the pairs a table must not offer, keep the worst out; a thesaurus of
your own can stand in its place, since an attack takes any function from a word to its substitutes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedeat.attacks.text import NEGATIONS, STOP_WORDS, Substitutes
from fedeat.model import AdaptedModel

# Opposites that stand nearest to each other in every embedding table, as what is said of the same things.
_OPPOSITES = (
    "good bad best worst better worse great terrible love hate like dislike happy sad beautiful ugly funny unfunny "
    "interesting boring strong weak high low hot cold new old big small long short easy hard right wrong true false "
    "yes no always never all none more less before after up down first last increase decrease win lose buy sell male "
    "female man woman men women boy girl he she his her black white day night north south east west rich poor fast "
    "slow positive negative success failure alive dead open closed begin end start stop"
)


def embedding_neighbours(model: AdaptedModel, *, count: int = 12, similarity: float = 0.4) -> Substitutes:
    """Substitutes of a word: the nearest whole words in the model's embedding table.

    Args:
        model: whose table and tokenizer.
        count: >= 1, neighbours at most.
        similarity: -1..1, cosine at least, after the table's mean is taken off.

    Returns:
        A function from a word in lower case to its neighbours, nearest first; none for a word of several tokens.
    """
    vocabulary = whole_words(model.tokenizer)
    names = sorted(vocabulary)
    module: Any = model.network.get_input_embeddings()
    with torch.no_grad():
        rows = module.weight[torch.tensor([vocabulary[name] for name in names], device=module.weight.device)].float()
        table: Tensor = F.normalize(rows - rows.mean(0), dim=-1)
    place = {name: index for index, name in enumerate(names)}
    opposites = _pairs()

    @functools.cache
    def substitutes(word: str) -> tuple[str, ...]:
        if word not in place:
            return ()
        near = table @ table[place[word]]
        kept: list[str] = []
        for index in near.argsort(descending=True).tolist():
            if float(near[index]) < similarity or len(kept) == count:
                break
            name = names[index]
            if name != word and opposites.get(word) != name and not {name} & (STOP_WORDS | NEGATIONS):
                kept.append(name)
        return tuple(kept)

    return substitutes


def whole_words(tokenizer: Any) -> dict[str, int]:
    """The tokens of a vocabulary that are a lower-case word of three letters or more: word -> id."""
    tokens: Mapping[str, int] = tokenizer.get_vocab()
    # Byte-level and sentence pieces mark where a word begins, word pieces where one goes on.
    mark = next((m for m in ("\u0120", "\u2581") if any(token.startswith(m) for token in tokens)), "")
    found = {}
    for token, index in tokens.items():
        word = token[len(mark) :]
        if token.startswith(mark) and len(word) > 2 and word.isascii() and word.isalpha() and word.islower():
            found[word] = index
    return found


def _pairs() -> dict[str, str]:
    words = _OPPOSITES.split()
    pairs = zip(words[::2], words[1::2], strict=True)
    return {one: other for pair in pairs for one, other in (pair, pair[::-1])}
