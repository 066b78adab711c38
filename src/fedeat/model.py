"""A Hugging Face model with a LoRA adapter, perturbable at its embeddings.

One class serves every architecture: the perturbation is added by a forward hook on `get_input_embeddings()` while
token ids are passed as usual, so position embeddings, embedding scales and attention masks stay the model's own
business; and logits are computed at supervised positions alone by a hook before the output head.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fedeat import data, seeding
from fedeat.errors import ModelError
from fedeat.updates import Adapter

Kind: TypeAlias = Literal["causal-lm", "sequence-classification"]

SIDECAR = "fedeat.json"
"""Beside PEFT's two files in an adapter directory: what PEFT does not keep (template, heads, maximum length)."""


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
        device: "cpu", "cuda", "auto" for CUDA where there is one.
        template: "auto", "alpaca", "chat" or "plain"; see `fedeat.data`.
        max_length: >= 2, tokens an example may have.
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


class AdaptedModel:
    """One base model in memory with one adapter in it, which is swapped as clients take turns.

    Attributes:
        network: the transformers model, wrapped by PEFT where it has an adapter.
        tokenizer: its tokenizer.
        kind: what the model is for.
        heads: task -> the rows of the classifier that are its classes (sequence-classification).
    """

    def __init__(self, network: Any, tokenizer: Any, source: ModelSource) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.source = source
        self.kind: Kind = source.kind
        self.heads = _head_rows(source.heads or {})
        self.max_length = source.max_length
        self._base: Any = network.get_base_model() if isinstance(network, PeftModel) else network
        self._parameters = _adapter_parameters(network)
        self._lora_dropouts = [
            module
            for name, module in network.named_modules()
            if ".lora_dropout." in name and not list(module.children())
        ]
        self._is_chat = self.template_name == "chat"
        self._template = data.template_named(self.template_name, tokenizer) if self.kind == "causal-lm" else None
        network.eval()

    @property
    def device(self) -> torch.device:
        """Where the embeddings live."""
        return next(self._base.get_input_embeddings().parameters()).device

    @property
    def template_name(self) -> str:
        """ "chat", "alpaca" or "plain": "auto" resolved for this tokenizer."""
        if self.source.template != "auto":
            return self.source.template
        return "chat" if getattr(self.tokenizer, "chat_template", None) else "alpaca"

    # Text to tensors

    def encode(self, example: data.Example) -> data.Encoded:
        """Token ids of an example, in this model's template.

        Raises:
            ModelError: the example's task has no head in this model.
        """
        if self.kind == "causal-lm":
            assert self._template is not None
            return data.encode_instruction(
                self.tokenizer,
                example,
                template=self._template,
                max_length=self.max_length,
                is_chat=self._is_chat,
            )
        if example.task not in self.heads:
            raise ModelError(f"this classifier has no head for task {example.task!r}. It has {', '.join(self.heads)}.")
        return data.encode_texts(self.tokenizer, example, classes=self.heads[example.task], max_length=self.max_length)

    def collate(self, encoded: Sequence[data.Encoded]) -> data.Batch:
        """Encoded examples as one padded batch on the model's device."""
        return data.collate(encoded, pad_id=self.tokenizer.pad_token_id).to(self.device)

    # The algorithm's view (fedeat.algorithm.Model)

    def adapter_parameters(self) -> Mapping[str, nn.Parameter]:
        """The trainable parameters under PEFT's names for saved tensors."""
        return self._parameters

    def adapter(self) -> dict[str, Tensor]:
        """A copy of the adapter's tensors, float32, on the CPU."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._parameters.items()}

    def load_adapter(self, adapter: Adapter) -> None:
        """Overwrites the adapter's tensors.

        Raises:
            ModelError: the names or shapes are not this model's.
        """
        if adapter.keys() != self._parameters.keys():
            odd = sorted(adapter.keys() ^ self._parameters.keys())
            raise ModelError(f"the adapter does not fit this model: {len(odd)} tensors differ, first {odd[0]!r}.")
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if parameter.shape != adapter[name].shape:
                    raise ModelError(
                        f"the adapter does not fit this model: {name!r} has shape {tuple(adapter[name].shape)}, "
                        f"expected {tuple(parameter.shape)}."
                    )
                parameter.copy_(adapter[name])

    def embed(self, batch: data.Batch) -> Tensor:
        """(B, T, H), what the embedding module returns: any scale that sits in it (Gemma's) is applied."""
        with torch.no_grad():
            output: Tensor = self._base.get_input_embeddings()(batch.input_ids)
        return output

    def embedding_unit(self, norm: str) -> float:
        """Length that a relative radius of 1 stands for, in embedding units.

        The mean Euclidean norm of the vocabulary's embeddings as `embed` returns them; for "linf" that over
        sqrt(H), the root-mean-square coordinate, so that a radius means a like share of an embedding in both.
        """
        module = self._base.get_input_embeddings()
        rows = module.weight.shape[0]
        with torch.no_grad():
            chunks = torch.arange(rows, device=self.device).split(8192)
            total = sum(float(module(chunk).double().norm(dim=-1).sum()) for chunk in chunks)
        mean = total / rows
        return mean / float(module.weight.shape[-1]) ** 0.5 if norm == "linf" else mean

    def supervised_logits(self, batch: data.Batch, delta: Tensor | None = None) -> Tensor:
        """(N, V), logits of the supervised rows; for classification (B, C), -inf outside the sample's task.

        Args:
            batch: B samples of T tokens.
            delta: (B, T, H) float32, added to the embeddings; None adds nothing.

        Raises:
            ModelError: the embedding module did not fire exactly once, or returned another shape than delta's.
        """
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids
        with self._added_to_embeddings(delta):
            if self.kind == "causal-lm":
                with self._head_on_rows(batch.rows):
                    logits = self._base(**inputs, use_cache=False).logits
                return logits.reshape(-1, logits.shape[-1])  # type: ignore[no-any-return]
            logits = self._base(**inputs).logits
        if batch.classes is None:
            return logits  # type: ignore[no-any-return]
        index = torch.arange(logits.shape[-1], device=logits.device)
        outside = (index < batch.classes[:, :1]) | (index >= batch.classes[:, 1:])
        return logits.masked_fill(outside, float("-inf"))  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Adapter dropout on. Dropout inside the frozen base stays off: only the adapter is being fitted."""
        with self._mode(checkpointing=True, dropout=True):
            yield

    @contextlib.contextmanager
    def attacking(self) -> Iterator[None]:
        """All dropout off, no gradient for any parameter; gradients still flow to the embeddings."""
        parameters = list(self._parameters.values())
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            with self._mode(checkpointing=True, dropout=False):
                yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """All dropout off and no gradients."""
        with self._mode(checkpointing=False, dropout=False), torch.no_grad():
            yield

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
        """Greedy continuations of prompts rendered in the model's template, without special tokens.

        Args:
            prompts: instructions, before the template.
            max_new_tokens: >= 1.
        """
        encoded = [self.encode(data.Example(prompt)).input_ids for prompt in prompts]
        length = max(map(len, encoded))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (length - len(item)) + list(item) for item in encoded], device=self.device)
        mask = torch.tensor([[0] * (length - len(item)) + [1] * len(item) for item in encoded], device=self.device)
        settings = transformers.GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=self.tokenizer.eos_token_id,
            bos_token_id=self.tokenizer.bos_token_id,
        )
        with self.evaluating():
            output = self._base.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        return list(self.tokenizer.batch_decode(output[:, length:], skip_special_tokens=True))

    def check_embeddings(self) -> None:
        """Tries the embedding hook once, so that a model it cannot serve is refused before any training.

        Raises:
            ModelError: the embedding module is not called exactly once in a forward pass.
        """
        ids = torch.zeros((1, 2), dtype=torch.long, device=self.device)
        row = torch.zeros(1, dtype=torch.long, device=self.device)
        keep = torch.ones((1, 2), dtype=torch.bool, device=self.device)
        batch = data.Batch(ids, torch.ones_like(ids), keep, row, row, row)
        with self.evaluating():
            self.supervised_logits(batch, torch.zeros(self.embed(batch).shape, device=self.device))

    def save_adapter(self, directory: Path, adapter: Adapter | None = None) -> None:
        """Writes an adapter as PEFT does, so that `PeftModel.from_pretrained` loads it.

        Each file is replaced in one step: a reader sees the old adapter or the new one.

        Args:
            directory: made where it does not exist.
            adapter: the tensors; None for the model's present ones.
        """
        directory.mkdir(parents=True, exist_ok=True)
        config = self.network.peft_config["default"]
        was_inference, config.inference_mode = config.inference_mode, True
        try:
            config.save_pretrained(str(directory))
        finally:
            config.inference_mode = was_inference
        sidecar = {
            "kind": self.kind,
            "template": self.template_name if self.kind == "causal-lm" else None,
            "heads": {task: len(rows) for task, rows in self.heads.items()},
            "max_length": self.max_length,
        }
        (directory / SIDECAR).write_text(json.dumps(sidecar, indent=2) + "\n")
        tensors = {name: t.contiguous() for name, t in (self.adapter() if adapter is None else adapter).items()}
        fresh = directory / ".adapter_model.safetensors.new"
        save_file(tensors, fresh, metadata={"format": "pt"})
        fresh.replace(directory / "adapter_model.safetensors")

    @contextlib.contextmanager
    def _mode(self, *, checkpointing: bool, dropout: bool) -> Iterator[None]:
        # Every module is in eval mode between calls. `train()` on the whole network would also switch on the frozen
        # base's dropout, and `eval()` alone switches gradient checkpointing off, silently.
        awake = list(self._lora_dropouts) if dropout else []
        if checkpointing and self.source.gradient_checkpointing:
            awake += [module for module in self._base.modules() if isinstance(module, GradientCheckpointingLayer)]
        for module in awake:
            module.training = True
        try:
            yield
        finally:
            for module in awake:
                module.training = False

    @contextlib.contextmanager
    def _added_to_embeddings(self, delta: Tensor | None) -> Iterator[None]:
        if delta is None:
            yield
            return
        calls = 0

        def add(module: nn.Module, args: object, output: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if output.shape != delta.shape:
                raise self._unservable(f"returned shape {tuple(output.shape)}, expected {tuple(delta.shape)}")
            return output + delta.to(output.dtype)

        handle = self._base.get_input_embeddings().register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()
        if calls != 1:
            raise self._unservable(f"was called {calls} times in one forward pass, expected exactly once")

    @contextlib.contextmanager
    def _head_on_rows(self, rows: Tensor) -> Iterator[None]:
        """The output head sees the supervised rows alone; what follows it (soft-capping) acts row by row."""

        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = args[0]
            return (hidden.reshape(-1, hidden.shape[-1])[rows].unsqueeze(0), *args[1:])

        handle = self._base.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def _unservable(self, what: str) -> ModelError:
        return ModelError(
            f"{type(self._base).__name__} cannot be perturbed: its embedding module "
            f"({type(self._base.get_input_embeddings()).__name__}) {what}. Models with one token embedding at their "
            "entrance are served; for this one set perturbation.kind to none."
        )


def load_model(source: ModelSource, *, lora: Lora | None, seed: int = 0, adapter: Path | None = None) -> AdaptedModel:
    """Loads a base model and gives it an adapter.

    Args:
        source: the base model.
        lora: hyperparameters of a fresh adapter; None for none.
        seed: of a fresh adapter's weights and a fresh classification head.
        adapter: directory of a saved adapter, to use instead of a fresh one; its template, heads and maximum length
            are used where it kept them.

    Raises:
        ModelError: the model, its tokenizer or the adapter cannot be loaded, or the model cannot be adapted.
    """
    source = _with_sidecar(source, adapter)
    tokenizer = load_tokenizer(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.derive(seed, "adapter"))  # PEFT and transformers draw from the global generator
        base = _load_base(source, tokenizer)
        if adapter is not None:
            network: Any = _attempt(
                f"adapter {adapter}", lambda: PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
            )
        elif lora is not None:
            network = _attempt("LoRA", lambda: get_peft_model(base, _lora_config(lora, source.kind)))
        else:
            network = base
    if source.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return AdaptedModel(network, tokenizer, source)


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer, with the end-of-sequence token as padding where it has none.

    Raises:
        ModelError: there is no tokenizer, or it has neither a padding nor an end-of-sequence token.
    """
    _check_directory(source.name)
    tokenizer = _attempt(
        f"tokenizer of {source.name}",
        lambda: transformers.AutoTokenizer.from_pretrained(
            source.name, revision=source.revision, trust_remote_code=source.trust_remote_code
        ),
    )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of {source.name} has neither a padding nor an end-of-sequence token. "
                "Expected one of them; set pad_token in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_base(source: ModelSource, tokenizer: Any) -> Any:
    options: dict[str, Any] = {
        "dtype": getattr(torch, source.dtype),
        "revision": source.revision,
        "trust_remote_code": source.trust_remote_code,
    }
    if source.attention is not None:
        options["attn_implementation"] = source.attention
    if source.load_in_4bit:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=getattr(torch, source.dtype), bnb_4bit_quant_type="nf4"
        )
    if source.kind == "causal-lm":
        loader: Callable[..., Any] = transformers.AutoModelForCausalLM.from_pretrained
    else:
        loader = transformers.AutoModelForSequenceClassification.from_pretrained
        options["num_labels"] = sum((source.heads or {}).values())
    with _quiet_loading():
        base = _attempt(f"model {source.name}", lambda: loader(source.name, **options))
    if source.kind == "sequence-classification":
        base.config.pad_token_id = tokenizer.pad_token_id  # decoders pool at the last token that is not padding
    if not source.load_in_4bit:
        device = source.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        base.to(device)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    return base


def _lora_config(lora: Lora, kind: Kind) -> LoraConfig:
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM" if kind == "causal-lm" else "SEQ_CLS",
    )


def _adapter_parameters(network: Any) -> dict[str, nn.Parameter]:
    """Trainable parameters under the names that PEFT gives them in a saved adapter."""
    if not isinstance(network, PeftModel):
        return {}
    parameters = {
        name.replace(".modules_to_save.default.", ".").replace(".default.", "."): parameter
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }
    saved = get_peft_model_state_dict(network, save_embedding_layers=False)
    if parameters.keys() != saved.keys():
        odd = sorted(parameters.keys() ^ saved.keys())
        raise ModelError(f"PEFT saves other tensors than it trains for this model, first {odd[0]!r}.")
    for parameter in parameters.values():
        parameter.data = parameter.data.float()  # a head copied from a bfloat16 base would lose small updates
    for module in network.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for head in module.modules_to_save.values():
                head.register_forward_pre_hook(_in_float32)
    return dict(sorted(parameters.items()))


def _in_float32(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].float(), *args[1:])


def _head_rows(heads: Mapping[str, int]) -> dict[str, range]:
    rows: dict[str, range] = {}
    start = 0
    for task, classes in heads.items():
        rows[task] = range(start, start + classes)
        start += classes
    return rows


def _with_sidecar(source: ModelSource, adapter: Path | None) -> ModelSource:
    if adapter is None:
        return source
    if not (adapter / "adapter_config.json").is_file():
        raise ModelError(
            f"{adapter} is not an adapter directory: it holds no adapter_config.json. Expected what "
            "`fedeat run` leaves under adapter/, or what PEFT's save_pretrained wrote."
        )
    path = adapter / SIDECAR
    if not path.is_file():
        return source
    kept = json.loads(path.read_text())
    template = kept["template"] if source.template == "auto" and kept["template"] else source.template
    values = {**vars(source), "kind": kept["kind"], "template": template, "max_length": kept["max_length"]}
    return ModelSource(**{**values, "heads": kept["heads"] or source.heads})


def _check_directory(name: str) -> None:
    path = Path(name)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise ModelError(
            f"model directory {name} does not exist. Check model.name; a relative path starts at {Path.cwd()}."
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{name} is not a model directory: it holds no config.json. Expected a Hugging Face model.")


def _attempt(what: str, load: Callable[[], Any]) -> Any:
    """Runs a loader of another library and turns what it raises into one message."""
    try:
        return load()
    except Exception as error:  # transformers, peft, safetensors and the hub raise dozens of types here
        reason = " ".join(str(error).split())
        raise ModelError(f"{what} cannot be loaded: {type(error).__name__}: {reason[:600]}") from error


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
