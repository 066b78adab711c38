"""A Hugging Face model with a LoRA adapter, perturbable at its embeddings.

One class serves every architecture: the perturbation is added by a forward hook on `get_input_embeddings()` while
token ids are passed as usual, so position embeddings, embedding scales and attention masks stay the model's own
business; and logits are computed at supervised positions alone by a hook before the output head.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fedeat import seeding
from fedeat.data import Batch, Encoded, Example, encoding
from fedeat.errors import ModelError
from fedeat.model import loading
from fedeat.model.adapter_files import SIDECAR, read_adapter, with_sidecar, write_adapter
from fedeat.model.loading import Kind, Lora, ModelSource, load_tokenizer
from fedeat.updates import Adapter

__all__ = ["SIDECAR", "AdaptedModel", "Kind", "Lora", "ModelSource", "load_model", "load_tokenizer"]


class AdaptedModel:
    """One base model in memory with one adapter in it, which is swapped as clients take turns.

    Attributes:
        network: the transformers model, wrapped by PEFT where it has an adapter.
        tokenizer: its tokenizer.
        source: how it was loaded.
        kind: what the model is for.
        heads: task -> the rows of the classifier that are its classes (sequence-classification).
        max_length: tokens an example may have.
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
        self._checkpointed = [
            module
            for module in self._base.modules()
            if source.gradient_checkpointing and isinstance(module, GradientCheckpointingLayer)
        ]
        self._marks = encoding.marks_of(tokenizer)
        if self.kind == "causal-lm":
            self._template = encoding.template_named(source.template, tokenizer)
            if self._base.get_output_embeddings() is None:
                raise ModelError(f"{type(self._base).__name__} has no output head. Expected a causal language model.")
        # Some tokenizers number segments for models that take none, or know but one.
        self._takes_segments = (
            "token_type_ids" in inspect.signature(self._base.forward).parameters
            and getattr(self._base.config, "type_vocab_size", 2) > 1
        )
        network.eval()

    @property
    def device(self) -> torch.device:
        """Where the embeddings live."""
        weight: Tensor = self._base.get_input_embeddings().weight
        return weight.device

    @property
    def template_name(self) -> str:
        """ "chat", "alpaca" or "plain": "auto" resolved for this tokenizer."""
        return encoding.resolve_template(self.source.template, self.tokenizer)

    # Text to tensors

    def encode(self, example: Example) -> Encoded:
        """Token ids of an example, in this model's template.

        Raises:
            DataError: the example's label is not one of its task's classes.
            ModelError: the example's task has no head in this model.
        """
        if self.kind == "causal-lm":
            return self._encode_instruction(example, self.max_length)
        if example.task not in self.heads:
            raise ModelError(f"this classifier has no head for task {example.task!r}. It has {', '.join(self.heads)}.")
        classes = self.heads[example.task]
        return encoding.encode_texts(
            self.tokenizer, example, classes=classes, max_length=self.max_length, marks=self._marks
        )

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        """Encoded examples as one padded batch on the model's device."""
        return encoding.collate(encoded, pad_id=self.tokenizer.pad_token_id).to(self.device)

    # The algorithm's view (fedeat.protocols.Model)

    def adapter_parameters(self) -> Mapping[str, nn.Parameter]:
        """The trainable parameters under PEFT's names for saved tensors."""
        return self._parameters

    def adapter(self) -> dict[str, Tensor]:
        """A copy of the adapter's tensors, float32, on the CPU."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._parameters.items()}

    def load_adapter(self, adapter: Adapter) -> None:
        """Overwrites the adapter's tensors; either all of them or, on an error, none.

        Raises:
            ModelError: the names or shapes are not this model's.
        """
        if adapter.keys() != self._parameters.keys():
            odd = sorted(adapter.keys() ^ self._parameters.keys())
            raise ModelError(f"the adapter does not fit this model: {len(odd)} tensors differ, first {odd[0]!r}.")
        for name, parameter in self._parameters.items():
            if parameter.shape != adapter[name].shape:
                raise ModelError(
                    f"the adapter does not fit this model: {name!r} has shape {tuple(adapter[name].shape)}, "
                    f"expected {tuple(parameter.shape)}."
                )
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(adapter[name])

    def embed(self, batch: Batch) -> Tensor:
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
        rows, width = map(int, module.weight.shape)
        total = 0.0
        with torch.no_grad():
            for start in range(0, rows, 8192):
                ids = torch.arange(start, min(start + 8192, rows), device=self.device)
                total += float(module(ids).double().norm(dim=-1).sum())
        mean = total / rows
        return mean / float(width**0.5) if norm == "linf" else mean

    def supervised_logits(self, batch: Batch, delta: Tensor | None = None) -> Tensor:
        """(N, V), logits of the supervised rows; for classification (B, C), -inf outside the sample's task.

        Args:
            batch: B samples of T tokens.
            delta: (B, T, H) float32, added to the embeddings; None adds nothing.

        Raises:
            ModelError: the embedding module did not fire exactly once, or returned another shape than delta's; or
                the output head did not.
        """
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if batch.token_type_ids is not None and self._takes_segments:
            inputs["token_type_ids"] = batch.token_type_ids
        logits: Tensor
        with self._added_to_embeddings(delta):
            if self.kind == "causal-lm":
                with self._head_on_rows(batch.rows):
                    logits = self._base(**inputs, use_cache=False).logits
                return logits.reshape(-1, logits.shape[-1])
            logits = self._base(**inputs).logits
        if batch.classes is None:
            return logits
        index = torch.arange(logits.shape[-1], device=logits.device)
        outside = (index < batch.classes[:, :1]) | (index >= batch.classes[:, 1:])
        return logits.masked_fill(outside, float("-inf"))

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Adapter dropout on. Dropout inside the frozen base stays off: only the adapter is being fitted."""
        with self._awake([*self._lora_dropouts, *self._checkpointed]):
            yield

    @contextlib.contextmanager
    def attacking(self) -> Iterator[None]:
        """All dropout off, no gradient for any parameter; gradients still flow to the embeddings."""
        parameters = list(self._parameters.values())
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            with self._awake(self._checkpointed):
                yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """All dropout off and no gradients."""
        with torch.no_grad():
            yield

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
        """Greedy continuations of prompts rendered in the model's template, without special tokens.

        Args:
            prompts: instructions, before the template; cut so that the continuation fits into the model's positions.
            max_new_tokens: >= 1.
        """
        if not prompts:
            return []
        limit = loading.positions(self._base)
        room = self.max_length if limit is None else min(self.max_length, max(limit - max_new_tokens, 1))
        encoded = [self._encode_instruction(Example(prompt), room).input_ids for prompt in prompts]
        length = max(map(len, encoded))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (length - len(item)) + list(item) for item in encoded], device=self.device)
        mask = torch.tensor([[0] * (length - len(item)) + [1] * len(item) for item in encoded], device=self.device)
        settings = transformers.GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=self._endings(),
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
        batch = Batch(ids, torch.ones_like(ids), keep, row, row, row)
        with self.evaluating():
            self.supervised_logits(batch, torch.zeros(self.embed(batch).shape, device=self.device))

    def save_adapter(self, directory: Path, adapter: Adapter | None = None) -> None:
        """Writes an adapter as PEFT does, so that `PeftModel.from_pretrained` loads it.

        Each file is replaced in one step: a reader sees the old adapter or the new one.

        Args:
            directory: made where it does not exist.
            adapter: the tensors; None for the model's present ones.

        Raises:
            ModelError: the model has no adapter.
        """
        if not isinstance(self.network, PeftModel):
            raise ModelError(f"{self.source.name} was loaded without an adapter, so there is none to save.")
        sidecar = {
            "kind": self.kind,
            "template": self.template_name if self.kind == "causal-lm" else None,
            "heads": {task: len(rows) for task, rows in self.heads.items()},
            "max_length": self.max_length,
        }
        tensors = self.adapter() if adapter is None else adapter
        write_adapter(directory, tensors, self.network.peft_config["default"], sidecar)

    def _encode_instruction(self, example: Example, max_length: int) -> Encoded:
        return encoding.encode_instruction(
            self.tokenizer,
            example,
            template=self._template,
            max_length=max_length,
            is_chat=self.template_name == "chat",
            marks=self._marks,
        )

    def _endings(self) -> list[int] | None:
        """Tokens that end a generation: the tokenizer's, which training teaches, and the base model's own."""
        own = getattr(self._base.generation_config, "eos_token_id", None)
        found = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        return sorted(found) or None

    @contextlib.contextmanager
    def _awake(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        # Every module is in eval mode between calls. `train()` on the whole network would also switch on the frozen
        # base's dropout, and `eval()` alone switches gradient checkpointing off, silently.
        for module in modules:
            module.training = True
        try:
            yield
        finally:
            for module in modules:
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
        calls = 0

        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            nonlocal calls
            calls += 1
            hidden = args[0]
            return (hidden.reshape(-1, hidden.shape[-1])[rows].unsqueeze(0), *args[1:])

        handle = self._base.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()
        if calls != 1:
            raise ModelError(
                f"{type(self._base).__name__} calls its output head {calls} times in one forward pass, expected "
                "exactly once. Such a model is not served."
            )

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
        DataError: the source names the chat template and the tokenizer has none.
        ModelError: the model, its tokenizer or the adapter cannot be loaded, or the model cannot be adapted.
    """
    if adapter is not None:
        source = with_sidecar(source, adapter)
    tokenizer = load_tokenizer(source)
    with torch.random.fork_rng(devices=[]):
        # PEFT and transformers draw fresh weights from torch's global generator, on the CPU.
        torch.default_generator.manual_seed(seeding.derive(seed, "adapter"))
        base = network = loading.load_base(source, tokenizer)
        if adapter is not None:
            network = read_adapter(base, adapter)
        elif lora is not None:
            network = loading.add_lora(base, lora, source.kind)
    if source.gradient_checkpointing:
        loading.enable_checkpointing(base)
    return AdaptedModel(network, tokenizer, source)


def _adapter_parameters(network: Any) -> dict[str, nn.Parameter]:
    """Trainable parameters under the names that PEFT gives them in a saved adapter."""
    if not isinstance(network, PeftModel):
        return {}
    parameters = {
        f"{name}.".replace(".modules_to_save.default.", ".").replace(".default.", ".")[:-1]: parameter
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
    return (args[0].float() if args[0].is_floating_point() else args[0], *args[1:])


def _head_rows(heads: Mapping[str, int]) -> dict[str, range]:
    rows: dict[str, range] = {}
    start = 0
    for task, classes in heads.items():
        rows[task] = range(start, start + classes)
        start += classes
    return rows
