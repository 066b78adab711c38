"""Base models and tokenizers: found, checked and loaded, every failure as one message; and LoRA put into them."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from fedeat.errors import ModelError

Kind: TypeAlias = Literal["causal-lm", "sequence-classification"]

_TOKENIZER = re.compile(r"token|vocab|merges|sentencepiece|spiece|bpe|\.model$|tekken")
"""In the name of each file that holds a tokenizer."""


@dataclass(frozen=True)
class Lora:
    """LoRA's hyperparameters, as PEFT names them.

    Attributes:
        rank: >= 1.
        alpha: > 0; the update is scaled by alpha / rank.
        dropout: 0..1, on the adapter's input, in training steps alone.
        target_modules: "all-linear", or names of modules.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"


@dataclass(frozen=True)
class ModelSource:
    """Which base model, and how it is loaded.

    Attributes:
        name: a local directory or a hub name.
        kind: what the model is for.
        heads: task -> its number of classes (sequence-classification); the tasks' heads are blocks of one
            classifier's rows, in this order.
        dtype: of the base weights; the adapter is float32 always.
        revision: of a hub model, None for its default branch.
        attention: attention implementation that transformers knows ("sdpa", "eager", ...), None for its default.
        gradient_checkpointing: recompute activations instead of storing them.
        load_in_4bit: quantise the base to 4 bits on loading (bitsandbytes).
        trust_remote_code: run the model repository's own code.
        device: "cpu", "cuda", "auto" for CUDA where there is one, "spread" to lay layers out over all CUDA devices.
        template: "auto", "alpaca", "chat" or "plain"; see `fedeat.data.encoding`.
        max_length: >= 2, tokens an example may have.
        merge_in_ascent: look for perturbations on the adapter merged into a copy of the weights it adapts, which is
            faster; False saves that copy's memory. Quantised weights are never merged.
        compile: compile the layers by torch for training steps and ascents; see `fedeat.model.compilation`.
        packing: on a processor, run a batch with padding as one row of its samples; see `fedeat.model.packing`.
        attack_dtype: of the weights while perturbations are sought, "bfloat16"; None for the base's own.
    """

    name: str
    kind: Kind = "causal-lm"
    heads: Mapping[str, int] | None = None
    dtype: str = "float32"
    revision: str | None = None
    attention: str | None = None
    gradient_checkpointing: bool = False
    load_in_4bit: bool = False
    trust_remote_code: bool = False
    device: str = "auto"
    template: str = "auto"
    max_length: int = 512
    merge_in_ascent: bool = True
    compile: bool = False
    packing: bool = True
    attack_dtype: str | None = None


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer, with the end-of-sequence token as padding where it has none.

    Raises:
        ModelError: there is no tokenizer, or it has neither a padding nor an end-of-sequence token.
    """
    _check_directory(source.name)
    absent = ModelError(
        f"{source.name} has no tokenizer files. Expected tokenizer.json or the like beside its weights."
    )
    if Path(source.name).is_dir() and not any(_TOKENIZER.search(file.name) for file in Path(source.name).iterdir()):
        raise absent
    # A directory's name with a mistake in it is taken for one of the hub, which says nothing of directories.
    where = "" if Path(source.name).is_dir() else f" from the hub (there is no directory {source.name} in {Path.cwd()})"
    tokenizer = attempt(
        f"tokenizer of {source.name}{where}",
        lambda: transformers.AutoTokenizer.from_pretrained(
            source.name, revision=source.revision, trust_remote_code=source.trust_remote_code
        ),
    )
    if not len(tokenizer):
        raise absent
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of {source.name} has neither a padding nor an end-of-sequence token. "
                "Expected one of them; set pad_token in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(source: ModelSource, tokenizer: Any) -> Any:
    """The frozen base model on its device, its embedding and its positions fit for the tokenizer and `max_length`.

    A classification head is fresh where the checkpoint has none of that size, drawn from the global generator.

    Raises:
        ModelError: it cannot be loaded or does not fit, or its checkpoint lacks weights of a language model.
    """
    options: dict[str, Any] = {
        "dtype": getattr(torch, source.dtype),
        "revision": source.revision,
        "trust_remote_code": source.trust_remote_code,
        "output_loading_info": True,
    }
    if source.attention is not None:
        options["attn_implementation"] = source.attention
    if source.load_in_4bit:
        options["quantization_config"] = attempt(
            "4-bit quantisation",
            lambda: transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_compute_dtype=getattr(torch, source.dtype), bnb_4bit_quant_type="nf4"
            ),
        )
    if source.device == "spread":
        options["device_map"] = "auto"
    if source.kind == "causal-lm":
        loader: Callable[..., Any] = transformers.AutoModelForCausalLM.from_pretrained
    else:
        loader = transformers.AutoModelForSequenceClassification.from_pretrained
        options["num_labels"] = sum((source.heads or {}).values())
        options["ignore_mismatched_sizes"] = True  # a head for other classes is replaced; all else has one size
    with _quiet_loading():
        base, report = attempt(f"model {source.name}", lambda: loader(source.name, **options))
    missing = sorted(report["missing_keys"])
    if missing and source.kind == "causal-lm":
        raise ModelError(
            f"{source.name} lacks {len(missing)} weights of a {type(base).__name__}, first {missing[0]!r}; they would "
            'be random. Expected a causal language model; for an encoder set task = "sequence-classification".'
        )
    if source.kind == "sequence-classification":
        base.config.pad_token_id = tokenizer.pad_token_id  # decoders pool at the last token that is not padding
    _check_fit(base, tokenizer, source)
    if not source.load_in_4bit and source.device != "spread":
        base.to(_device(source.device))
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    return base


def add_lora(base: Any, lora: Lora, kind: Kind) -> PeftModel:
    """The base with a fresh adapter in it, drawn from the global generator.

    Raises:
        ModelError: PEFT cannot adapt the model, for example because it has none of the target modules.
    """
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    # PEFT trains what it takes for a head whole, by the ends of names ("classifier" is "pre_classifier" too), but
    # would put LoRA into the linear layers of such heads first, and then fail.
    heads = ("classifier", "score") if kind == "sequence-classification" else ()
    excluded = [name for name, _ in base.named_modules() if any(part.endswith(heads) for part in name.split("."))]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=excluded or None,
        task_type="CAUSAL_LM" if kind == "causal-lm" else "SEQ_CLS",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),  # GPT-2's transposed weights
    )
    return attempt(f"a LoRA adapter with target modules {lora.target_modules!r}", lambda: get_peft_model(base, config))


def enable_checkpointing(base: Any) -> None:
    """Makes the base recompute its layers' activations, wherever `AdaptedModel` keeps these layers in train mode.

    To be called after PEFT wrapped the base: PEFT would ask a checkpointed base for gradients of its embeddings,
    which adapters inside the layers do not need.

    Raises:
        ModelError: the model has no layers that can be recomputed.
    """
    attempt(
        "gradient checkpointing",
        lambda: base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}),
    )
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"{type(base).__name__} has no layers that transformers can checkpoint. "
            "Set model.gradient_checkpointing to false."
        )
    for layer in layers:
        # A layer recomputes in train mode alone, and some (OPT's) drop out by their own mode; the base never does.
        for name, value in list(vars(layer).items()):
            if isinstance(value, float) and "drop" in name:
                setattr(layer, name, 0.0)


def positions(base: Any) -> int | None:
    """How many tokens a model was made for; None where it names no limit."""
    for name, module in base.named_modules():
        learned = isinstance(module, nn.Embedding) and name.endswith("position_embeddings")
        if learned and module.padding_idx is not None:  # RoBERTa counts its positions from behind the padding's
            return int(module.num_embeddings) - int(module.padding_idx) - 1
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def attempt(what: str, load: Callable[[], Any]) -> Any:
    """Runs a loader of another library and turns what it raises into one message.

    Raises:
        ModelError: the loader raised anything.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what these libraries tell each other of coming names
            return load()
    except Exception as error:  # transformers, peft, safetensors and the hub raise dozens of types here
        reason = " ".join(str(error).split())
        raise ModelError(f"{what} cannot be loaded: {type(error).__name__}: {reason[:600]}") from error


def _check_directory(name: str) -> None:
    path = Path(name)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise ModelError(
            f"model directory {name} does not exist. Check the path; a relative one starts at {Path.cwd()}."
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{name} is not a model directory: it holds no config.json. Expected a Hugging Face model.")


def _check_fit(base: Any, tokenizer: Any, source: ModelSource) -> None:
    embedding = base.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    highest = max(index for index in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if index is not None)
    if highest >= rows:
        raise ModelError(
            f"the tokenizer of {source.name} pads or ends with token {highest}, but the model embeds {rows} tokens. "
            "Expected the tokenizer that the model was trained with."
        )
    limit = positions(base)
    if limit is not None and source.max_length > limit:
        raise ModelError(
            f"data.max_length is {source.max_length}, but {source.name} has {limit} positions. "
            f"Set data.max_length to {limit} or less."
        )


def _device(name: str) -> str:
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ModelError('model.device is "cuda", but torch finds no CUDA device. Set it to "cpu" or "auto".')
    return ("cuda" if has_cuda else "cpu") if name == "auto" else name


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Holds back transformers' loading bar and its report of fresh classification weights, expected here."""
    logging = transformers.utils.logging
    level, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bar:
            logging.enable_progress_bar()
