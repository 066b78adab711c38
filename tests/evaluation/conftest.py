"""Tiny models with random weights and tokenizers made on the spot."""

from __future__ import annotations

from typing import Any, Protocol

import pytest
import tokenizers
import torch
import transformers

from fedeat.model import AdaptedModel, ModelSource

WORDS = (
    *("yes", "no", "maybe", "negative", "positive"),
    *("a", "the", "film", "story", "is", "was", "good", "bad", "dull", "bright", "who", "sentence", "label", "text"),
    *("premise", "hypothesis", "question", "answer", "entails", "whether", "same", ":", ".", ",", "?"),
)
LETTERS = tuple(chr(code) for code in range(32, 127))

# The libraries' constructors are not annotated for a strict check.
hf: Any = transformers


class MakeModel(Protocol):
    """What the fixture `make_model` is."""

    def __call__(
        self, vocabulary: tuple[str, ...] = WORDS, *, kind: str = "llama", max_length: int = 512
    ) -> AdaptedModel: ...


def tokenizer_of(vocabulary: tuple[str, ...]) -> Any:
    """A tokenizer with one token a word of the vocabulary, or one a character where it is `LETTERS`."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    numbered = {word: index for index, word in enumerate((*special.values(), *vocabulary))}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbered, unk_token="<unk>"))
    spelled = tokenizers.pre_tokenizers.Split("", "isolated")
    raw.pre_tokenizer = spelled if vocabulary is LETTERS else tokenizers.pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, **special)


@pytest.fixture
def make_model() -> MakeModel:
    """Makes a random language model over a vocabulary, with weights large enough to prefer some answers."""

    def make(vocabulary: tuple[str, ...] = WORDS, *, kind: str = "llama", max_length: int = 512) -> AdaptedModel:
        torch.manual_seed(7)
        tokenizer = tokenizer_of(vocabulary)
        common = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        if kind == "llama":
            config = hf.LlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                initializer_range=0.3,
                **common,
            )
            network = hf.LlamaForCausalLM(config)
        else:
            config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, **common)
            network = hf.GPT2LMHeadModel(config)
        return AdaptedModel(network, tokenizer, ModelSource("tiny", template="plain", max_length=max_length))

    return make


@pytest.fixture(params=["llama", "gpt2"])
def word_model(request: pytest.FixtureRequest, make_model: MakeModel) -> AdaptedModel:
    """A language model whose tokenizer has each answer as one token."""
    return make_model(kind=request.param)


@pytest.fixture
def letter_model(make_model: MakeModel) -> AdaptedModel:
    """A language model whose tokenizer spells the answers."""
    return make_model(LETTERS)


@pytest.fixture
def classifier() -> AdaptedModel:
    """A random encoder with heads for SST-2 and MNLI."""
    torch.manual_seed(7)
    tokenizer = tokenizer_of(WORDS)
    config = hf.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=5,
        initializer_range=0.5,
        pad_token_id=0,
    )
    source = ModelSource("tiny", kind="sequence-classification", heads={"sst2": 2, "mnli": 3})
    return AdaptedModel(hf.BertForSequenceClassification(config), tokenizer, source)


@pytest.fixture
def words() -> tuple[str, ...]:
    """The vocabulary of the word tokenizer."""
    return WORDS


@pytest.fixture
def letters() -> tuple[str, ...]:
    """The vocabulary that spells."""
    return LETTERS
