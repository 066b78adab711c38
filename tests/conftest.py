"""What tests of several rooms share: tiny models on disk, and data to train and measure them on."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import tokenizers
import tomli_w
import torch
import transformers

from fedeat.data import Example
from fedeat.experiment import privacy
from fedeat.model import AdaptedModel, Lora, ModelSource, load_model

# Without the extra `flower` its tests are left out, and all others run.
collect_ignore = [] if importlib.util.find_spec("flwr") else ["flower", "secure_aggregation"]

hf: Any = transformers  # its constructors are not annotated for a strict check

MakeConfig: TypeAlias = Callable[..., Path]

_WORDS = (
    *("yes", "no", "maybe", "negative", "positive", "answer", "sentence", "premise", "hypothesis", "question", ":"),
    *("a", "the", "film", "story", "is", "was", "good", "bad", "dull", "bright", "who", "label", "text", ".", ",", "?"),
)


def save_tiny_model(directory: Path, *, seed: int = 0, hidden: int = 16) -> Path:
    """A Llama of one layer with random weights, and a tokenizer of a few words, as transformers saves them."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    numbered = {word: index for index, word in enumerate((*special.values(), *_WORDS))}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbered, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = hf.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        hf.LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A JSON lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sentiment_rows(count: int) -> list[dict[str, Any]]:
    """SST-2 rows with the word that decides in them, and a column of four clients."""
    words = (("bad", 0), ("good", 1), ("dull", 0), ("bright", 1))
    return [
        {"sentence": f"the {'film' if i % 3 else 'story'} was {word} .", "label": label, "client": f"site{i % 4}"}
        for i in range(count)
        for word, label in [words[i % len(words)]]
    ]


def sentiment_pairs(count: int) -> list[dict[str, Any]]:
    """Original/modified prompts in TrustLLM's form."""
    wording = (
        "For each snippet of text, label the sentiment of the text as positive or negative. The answer should be "
        'exactly "positive" or "negative."\nSentence: {}{} Tell me the answer without any other reasons and '
        "explanations."
    )
    return [
        {
            "prompt": wording.format(row["sentence"], " and false is not true" if side == "modified" else ""),
            "label": row["label"],
            "type": side,
            "index": index,
            "task": "sst2",
            "method": "test",
        }
        for index, row in enumerate(sentiment_rows(count), start=1)
        for side in ("original", "modified")
    ]


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Llama."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def sentiment_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of the tiny task: "train" and "benign" rows, "pairs", and free instructions as "alpaca"."""
    place = tmp_path_factory.mktemp("data")
    pairs = place / "pairs.json"
    pairs.write_text(json.dumps(sentiment_pairs(6)), encoding="utf-8")
    free = [
        {"instruction": f"who is {i} ?", "input": "", "output": f"the story {i} .", "category": f"c{i % 2}"}
        for i in range(24)
    ]
    return {
        "train": write_lines(place / "train.jsonl", sentiment_rows(48)),
        "benign": write_lines(place / "benign.jsonl", sentiment_rows(12)),
        "pairs": pairs,
        "alpaca": write_lines(place / "alpaca.jsonl", free),
    }


@pytest.fixture
def make_config(tmp_path: Path, language_model: Path, sentiment_files: dict[str, Path]) -> MakeConfig:
    """Writes a configuration of seconds; keywords are tables whose keys replace or join the defaults."""

    def make(name: str = "tiny", **changes: Any) -> Path:
        settings: dict[str, Any] = {
            "threads": 1,
            "model": {"name": str(language_model), "device": "cpu"},
            "lora": {"rank": 2},
            "data": {"train": [str(sentiment_files["train"])], "template": "plain", "max_length": 64},
            "partition": {"clients": 4},
            "federation": {"rounds": 2},
            "client": {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2},
            "perturbation": {"steps": 1},
            "evaluation": {"data": [str(sentiment_files["benign"]), str(sentiment_files["pairs"])]},
        }
        for key, value in changes.items():
            settings[key] = {**settings.get(key, {}), **value} if isinstance(value, Mapping) else value
        path = tmp_path / f"{name}.toml"
        path.write_text(tomli_w.dumps(settings), encoding="utf-8")
        return path

    return make


@pytest.fixture
def accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra `privacy` as if it were installed; its accountant counts one for each release."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: True if name == "opacus" else find_spec(name, *rest)
    )
    monkeypatch.setattr(privacy, "epsilon", lambda **given: float(given["releases"]))


# The zoo: tiny models of real architectures, saved to disk and loaded as a person's model is -------------------------

CAUSAL = ("gemma", "gemma2", "phi3", "mistral", "llama", "qwen2", "gpt2")
CLASSIFIERS = ("bert-classifier", "llama-classifier")

_CORPUS = (
    "the film was good and the story bright",
    "a dull film with a bad story",
    "is the answer yes or no? the answer is yes.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction: ### Response: Answer: Question: maybe",
)
_SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
_LORA = Lora(rank=2, alpha=4.0)
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}


def _llama_tokenizer() -> Any:
    """Byte-pair pieces with a space of their own before a text, and <s> before it, as Llama's tokenizer has them."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    raw.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=120, special_tokens=[*special.values()], show_progress=False)
    raw.train_from_iterator(_CORPUS, trainer)
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=raw, model_input_names=["input_ids", "attention_mask"], **special
    )


def _bert_tokenizer() -> Any:
    """Word pieces between [CLS] and [SEP], with segment ids, as BERT's tokenizer has them."""
    special = {name: f"[{name[:3].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    raw = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=[*special.values()], show_progress=False
    )
    raw.train_from_iterator(_CORPUS, trainer)
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, raw.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, model_input_names=names, **special)


def _network(name: str, tokenizer: Any) -> Any:
    # Weights far larger than a trained model's, so that a wrong scale, position or cap shows.
    common = {"vocab_size": len(tokenizer), "initializer_range": 0.3, "pad_token_id": tokenizer.pad_token_id}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    roomy = {**common, **ends, "max_position_embeddings": 64}
    # Caps and windows that bite at this size.
    caps = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0, "attn_implementation": "eager"}
    makers: dict[str, Callable[[], Any]] = {
        "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_GROUPED, head_dim=8, **roomy)),
        "gemma2": lambda: hf.Gemma2ForCausalLM(
            hf.Gemma2Config(**_GROUPED, head_dim=8, sliding_window=6, **caps, **roomy)
        ),
        "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_GROUPED, resid_pdrop=0.2, **roomy)),
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GROUPED, sliding_window=6, **roomy)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED, **roomy)),
        "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GROUPED, **roomy)),
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **common, **ends)
        ),
        "bert-classifier": lambda: hf.BertModel(hf.BertConfig(**_SHAPE, max_position_embeddings=64, **common)),
        "llama-classifier": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED, **roomy)),
    }
    return makers[name]()


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a tiny model, written the first time it is asked for."""
    home = tmp_path_factory.mktemp("zoo")

    def find(name: str) -> Path:
        directory: Path = home / name
        if not directory.exists():
            tokenizer = _bert_tokenizer() if name.startswith("bert") else _llama_tokenizer()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(7)
                network = _network(name, tokenizer)
            network.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        return directory

    return find


@pytest.fixture
def load(zoo: Callable[[str], Path]) -> Callable[..., AdaptedModel]:
    """Loads a model of the zoo; its adapter is random throughout, so that it changes what the base says."""

    def make(name: str, *, lora: Lora | None = _LORA, **options: Any) -> AdaptedModel:
        values: dict[str, Any] = {"template": "plain", "max_length": 48, "device": "cpu", **options}
        if name in CLASSIFIERS:
            values = {"kind": "sequence-classification", "heads": {"sst2": 2, "mnli": 3}, **values}
        model = load_model(ModelSource(str(zoo(name)), **values), lora=lora)
        generator = torch.Generator().manual_seed(3)
        model.load_adapter(
            {key: 0.2 * torch.randn(value.shape, generator=generator) for key, value in model.adapter().items()}
        )
        return model

    return make


@pytest.fixture(params=CAUSAL)
def causal(request: pytest.FixtureRequest) -> str:
    """Name of each causal language model of the zoo."""
    name: str = request.param
    return name


@pytest.fixture(params=CLASSIFIERS)
def classifier_name(request: pytest.FixtureRequest) -> str:
    """Name of each classifier of the zoo."""
    name: str = request.param
    return name


@pytest.fixture(params=CAUSAL + CLASSIFIERS)
def anyone(request: pytest.FixtureRequest) -> str:
    """Name of each model of the zoo."""
    name: str = request.param
    return name


@pytest.fixture
def examples() -> list[Example]:
    """Instructions of several lengths, which are labelled too, so that every kind of model can learn them."""
    return [
        Example("the film was good and the story bright", "yes", label=1, task="sst2"),
        Example("a dull film", "no", label=0, task="sst2"),
        Example("is the answer yes or no?", "the answer is maybe", pair="the answer", label=2, task="mnli"),
        Example("bad story", "good", label=0, task="sst2"),
    ]
