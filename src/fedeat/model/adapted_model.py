"""A Hugging Face model with a LoRA adapter, perturbable at its embeddings.

One class serves every architecture: `hooks` perturb and select rows, `lora_paths` are the ways through the adapted
layers in training and in the ascent, `head_losses` are the losses over a large vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from fedeat import hooks, seeding
from fedeat.data import Batch, Encoded, Example, encoding
from fedeat.embeddings import embedding_unit
from fedeat.errors import ModelError
from fedeat.model import head_losses, loading, lora_paths, packing
from fedeat.model.adapter_files import SIDECAR, read_adapter, with_sidecar, write_adapter
from fedeat.model.attention import Attention, AttentionWithin
from fedeat.model.compilation import compiled_layers
from fedeat.model.generation import endings, greedy
from fedeat.model.loading import Kind, Lora, ModelSource, load_tokenizer
from fedeat.model.parameters import trainable
from fedeat.objective import away, row_losses
from fedeat.perturbation import Norm
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
        self._parameters = trainable(network)
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
        self._attention = Attention(self._base, source.attention, recomputes=bool(self._checkpointed))
        self._compiled = compiled_layers(self._base) if source.compile else {}
        self._plain = lora_paths.plain_layers(network)
        self._fused = {layer: lora_paths.fused(layer) for layer in self._plain if lora_paths.can_fuse(layer)}
        self._ascent = lora_paths.AscentWeights(
            self._base,
            self._plain if source.merge_in_ascent else [],
            self._parameters.values(),
            None if source.attack_dtype is None else getattr(torch, source.attack_dtype),
        )
        self._vocabulary: int | None = None
        self._marks = encoding.marks_of(tokenizer)
        if self.kind == "causal-lm":
            self._template = encoding.template_named(source.template, tokenizer)
            if self._base.get_output_embeddings() is None:
                raise ModelError(f"{type(self._base).__name__} has no output head. Expected a causal language model.")
            if head_losses.can_stand_alone(self._base):
                self._vocabulary = int(self._base.get_output_embeddings().weight.shape[0])
        # Some tokenizers number segments for models that take none, or know but one.
        self._takes_segments = (
            "token_type_ids" in inspect.signature(self._base.forward).parameters
            and getattr(self._base.config, "type_vocab_size", 2) > 1
        )
        network.eval()
        # Layers that run again in the backward pass, or are compiled, would not see what lies in the row. On an
        # accelerator many small attentions may cost more than some padding: it has not been tried there.
        self._can_pack = (
            source.packing
            and self.kind == "causal-lm"
            and self._base.config._attn_implementation == "sdpa"
            and self.device.type == "cpu"
            and not self._checkpointed
            and not self._compiled
            and self._base.get_input_embeddings().weight.shape[1] >= packing.WIDE
            and packing.keeps_apart(self._base)
        )

    @property
    def device(self) -> torch.device:
        """Where the embeddings live."""
        weight: Tensor = self._base.get_input_embeddings().weight
        return weight.device

    @property
    def architecture(self) -> str:
        """Class of the base model, such as "LlamaForCausalLM"."""
        return type(self._base).__name__

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

    def encode_prompt(self, prompt: str, *, max_new_tokens: int) -> Encoded:
        """Token ids of an instruction in this model's template, cut so that its answer fits into the model's positions.

        Args:
            prompt: before the template.
            max_new_tokens: >= 1, of the answer.
        """
        limit = loading.positions(self._base)
        room = self.max_length if limit is None else min(self.max_length, max(limit - max_new_tokens, 1))
        return self._encode_instruction(Example(prompt), room)

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        """Encoded examples as one padded batch on the model's device."""
        return encoding.collate(encoded, pad_id=self.tokenizer.pad_token_id).to(self.device)

    # The algorithm's view (fedeat.protocols.Model)

    def adapter_parameters(self) -> Mapping[str, torch.nn.Parameter]:
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

    def embedding_unit(self, norm: Norm) -> float:
        """Length that a relative radius of 1 stands for, in embedding units; see `fedeat.embedding_unit`."""
        return embedding_unit(self._base, norm)

    def supervised_logits(self, batch: Batch, delta: Tensor | None = None) -> Tensor:
        """(N, V), logits of the supervised rows; for classification (B, C), -inf outside the sample's task.

        Args:
            batch: B samples of T tokens.
            delta: (B, T, H) float32, added to the embeddings; None adds nothing.

        Raises:
            ModelError: the embedding module did not fire exactly once, or returned another shape than delta's; or
                the output head did not.
        """
        with self._entered(batch, delta) as (entered, added):
            return self._logits(entered, added)

    def _logits(self, batch: Batch, delta: Tensor | None) -> Tensor:
        logits: Tensor
        if self.kind == "causal-lm":
            with hooks.head_on_rows(self._base, batch.rows):
                logits = self._run(self._base, batch, delta, use_cache=False).logits
            return logits.reshape(-1, logits.shape[-1])
        logits = self._run(self._base, batch, delta).logits
        if batch.classes is None:
            return logits
        index = torch.arange(logits.shape[-1], device=logits.device)
        classes = batch.classes.to(logits.device)
        outside = (index < classes[:, :1]) | (index >= classes[:, 1:])
        return logits.masked_fill(outside, float("-inf"))

    def supervised_losses(self, batch: Batch, delta: Tensor | None = None) -> Tensor:
        """(N,) float32, cross-entropy of the supervised rows; arguments and errors as `supervised_logits`.

        Rows that the model shall not answer so have `objective.away` of it instead: an ascent then makes the answer
        likely, and a step unlikely.
        """
        with self._entered(batch, delta) as (entered, added):
            return self._losses(entered, added)

    def _losses(self, batch: Batch, delta: Tensor | None) -> Tensor:
        losses = self._cross_entropy(batch, delta)
        if batch.away is None:
            return losses
        return torch.where(batch.away[batch.samples].to(losses.device), away(losses), losses)

    def packs(self, batch: Batch) -> bool:
        """Whether a pass over the batch runs on its samples packed, because that spares enough padding."""
        return self._can_pack and float(batch.attention_mask.float().mean()) <= 1 - packing.WASTEFUL

    @contextlib.contextmanager
    def _entered(self, batch: Batch, delta: Tensor | None) -> Iterator[tuple[Batch, Tensor | None]]:
        """What a pass over the batch runs on: its samples one a row, or packed."""
        if not self.packs(batch):
            yield batch, delta
            return
        row, where = packing.packed(batch)
        with AttentionWithin(batch.attention_mask.sum(1).tolist(), free=self._attention.free):
            yield row, None if delta is None else delta.flatten(0, 1)[where].unsqueeze(0)

    def _cross_entropy(self, batch: Batch, delta: Tensor | None) -> Tensor:
        """(N,) float32, of the supervised rows.

        Where the logits would be more than `head_losses.CHUNK` numbers, they are made and used chunk by chunk.
        """
        width = self._vocabulary
        if width is None or len(batch.rows) * width <= head_losses.CHUNK:
            return row_losses(self._logits(batch, delta), batch.targets)
        output = self._run(self._base.base_model, batch, delta, use_cache=False)
        hidden = output.last_hidden_state
        hidden = hidden.reshape(-1, hidden.shape[-1])[batch.rows.to(hidden.device)]
        with head_losses.head_alone(self._base, output) as head:
            rows = max(head_losses.CHUNK // width, 1)
            return head_losses.chunked_losses(hidden, batch.targets.to(hidden.device), head, rows=rows)

    def first_layer(self, batch: Batch, delta: Tensor | None = None) -> Tensor:
        """(B, T, H), the first layer's output; nothing behind it is run.

        Raises:
            ModelError: the model has no layers that transformers marks as such.
        """
        seen: list[Tensor] = []
        options = {"use_cache": False} if self.kind == "causal-lm" else {}
        with hooks.seen_behind(self._first(), seen, stop=True):
            self._run(self._base, batch, delta, **options)
        return seen[0]

    def from_first_layer(self, batch: Batch, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The supervised losses and, from the same pass, the first layer's output (B, T, H).

        Raises:
            ModelError: as `first_layer`.
        """
        seen: list[Tensor] = []
        with hooks.seen_behind(self._first(), seen, stop=False):
            losses = self._losses(batch, delta)
        return losses, seen[0]

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Adapter dropout on. Dropout inside the frozen base stays off: only the adapter is being fitted."""
        # Every module is in eval mode between calls. `train()` on the whole network would also switch on the frozen
        # base's dropout, and `eval()` alone switches gradient checkpointing off, silently.
        awake = [*self._lora_dropouts, *self._checkpointed]
        with hooks.modes(awake, training=True), lora_paths.routed({**self._fused, **self._compiled}):
            yield

    @contextlib.contextmanager
    def attacking(self) -> Iterator[None]:
        """All dropout off, no gradient for any parameter; gradients still flow to the embeddings.

        Where `source.merge_in_ascent`, the adapter is merged into a copy of the base's weights: the adapter must not
        be changed within.
        """
        with (
            hooks.frozen(list(self._parameters.values())),
            hooks.modes(self._checkpointed, training=True),
            self._ascent.installed(),
            lora_paths.routed(self._compiled),
        ):
            yield

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """All dropout off and no gradients."""
        with torch.no_grad():
            yield

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
        """Greedy continuations of prompts rendered in the model's template, without special tokens.

        Args:
            prompts: as `encode_prompt` takes them.
            max_new_tokens: >= 1.
        """
        encoded = [self.encode_prompt(prompt, max_new_tokens=max_new_tokens).input_ids for prompt in prompts]
        with self.evaluating():
            return greedy(self._base, self.tokenizer, encoded, max_new_tokens=max_new_tokens)

    def endings(self) -> frozenset[int]:
        """Tokens that end what `generate` says."""
        return frozenset(endings(self._base, self.tokenizer))

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

    def _run(self, module: Any, batch: Batch, delta: Tensor | None, **options: Any) -> Any:
        """One pass of the base, or of its backbone, over token ids."""
        if batch.position_ids is None:
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **options}
        else:  # a mask of its own would keep transformers from telling the samples apart by where positions restart
            inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, **options}
        if batch.token_type_ids is not None and self._takes_segments:
            inputs["token_type_ids"] = batch.token_type_ids
        # Over a packed row, `_entered` sees to the attention.
        length = batch.input_ids.shape[1] if batch.position_ids is None else None
        with hooks.added_to_embeddings(self._base, delta), self._attention.faster(length):
            return module(**inputs)

    def _first(self) -> torch.nn.Module:
        for module in self._base.modules():
            if isinstance(module, GradientCheckpointingLayer):
                first: torch.nn.Module = module
                return first
        raise ModelError(f"{type(self._base).__name__} has no layers that transformers marks, so no first one.")


def load_model(
    source: ModelSource,
    *,
    lora: Lora | None,
    seed: int = 0,
    adapter: Path | None = None,
    max_length: int | None = None,
) -> AdaptedModel:
    """Loads a base model and gives it an adapter.

    Args:
        source: the base model.
        lora: hyperparameters of a fresh adapter; None for none.
        seed: of a fresh adapter's weights and a fresh classification head.
        adapter: directory of a saved adapter, to use instead of a fresh one; its template, heads and maximum length
            are used where it kept them.
        max_length: instead of the source's and of the adapter's; None leaves them.

    Raises:
        DataError: the source names the chat template and the tokenizer has none.
        ModelError: the model, its tokenizer or the adapter cannot be loaded, or the model cannot be adapted.
    """
    if adapter is not None:
        source = with_sidecar(source, adapter)
    if max_length is not None:
        source = replace(source, max_length=max_length)
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


def _head_rows(heads: Mapping[str, int]) -> dict[str, range]:
    rows: dict[str, range] = {}
    start = 0
    for task, classes in heads.items():
        rows[task] = range(start, start + classes)
        start += classes
    return rows
