"""Several clients' adapters over one base at once: their batches run as one, each sample through its client's adapter.

A step on one short example leaves a processor mostly idle. Stacked, m clients' samples share each product with the
base's weights, and the low-rank products become one batched product of A (m, r, i) and B (m, o, r); packed samples
have no such shape, and meet their client's factors one client after the other. Each client keeps a parameter, a
gradient and an optimiser of its own, so what it computes is what it would compute alone, to float tolerance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners import lora
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear, pad

from fedeat import hooks
from fedeat.data import Batch
from fedeat.errors import ModelError
from fedeat.model.adapted_model import AdaptedModel
from fedeat.model.lora_paths import AscentWeights, Forward, can_fuse, routed
from fedeat.updates import Adapter


@dataclass(frozen=True)
class StackedBatch:
    """The batches of m clients as one: the same number of samples for each, padded to the same T.

    Attributes:
        joint: all samples, client by client.
        owners: (N,) int64, the client 0..m-1 of each supervised row, -1 where the row is padding.
        clients: m.
    """

    joint: Batch
    owners: Tensor
    clients: int

    @property
    def perturbable(self) -> Tensor:
        """(m * b, T) bool."""
        return self.joint.perturbable

    @property
    def targets(self) -> Tensor:
        """(N,) int64."""
        return self.joint.targets

    @property
    def samples(self) -> Tensor:
        """(N,) int64."""
        return self.joint.samples

    @property
    def attention_mask(self) -> Tensor:
        """(m * b, T) int64."""
        return self.joint.attention_mask

    def mean(self, losses: Tensor) -> Tensor:
        """Each client's mean loss, (m,)."""
        owners = self.owners.to(losses.device)
        kept = owners >= 0
        counts = torch.bincount(owners[kept], minlength=self.clients)
        return losses.new_zeros(self.clients).index_add(0, owners[kept], losses[kept]) / counts

    def select(self, samples: Sequence[int]) -> StackedBatch:
        """Never asked for: a stacked batch is run whole."""
        raise NotImplementedError("a stacked batch is run whole")


def stack(batches: Sequence[Batch], *, pad_id: int) -> StackedBatch:
    """m clients' batches as one.

    Args:
        batches: one a client; those with fewer samples or tokens than others are padded.
        pad_id: id that stands at padding.
    """
    size = max(len(batch.input_ids) for batch in batches)
    length = max(batch.input_ids.shape[1] for batch in batches)

    def grown(name: str, value: float) -> Tensor:
        first = getattr(batches[0], name)
        whole: Tensor = first.new_full((len(batches) * size, length), value)
        for client, batch in enumerate(batches):
            part = getattr(batch, name)
            whole[client * size : client * size + len(part), : part.shape[1]] = part
        return whole

    attention_mask = grown("attention_mask", 0)
    attention_mask[:, 0] = 1  # attention over no token at all is NaN in some implementations
    classes = batches[0].classes
    rows, targets, samples, owners = [], [], [], []
    for client, batch in enumerate(batches):
        count, width = batch.input_ids.shape
        offset = client * size
        if classes is None:
            sample, position = batch.rows // width, batch.rows % width
            rows.append((sample + offset) * length + position)
            targets.append(batch.targets)
            samples.append(batch.samples + offset)
            owners.append(torch.full_like(batch.targets, client))
        else:  # a pooled row for each sample, those that are padding too
            everyone = torch.arange(offset, offset + size, device=batch.rows.device)
            rows.append(everyone)
            samples.append(everyone)
            missing = batch.targets.new_full((size - count,), 0)
            targets.append(torch.cat([batch.targets, missing]))
            owners.append(torch.cat([torch.full_like(batch.targets, client), missing - 1]))
    if classes is not None:
        # Samples that are padding may get any class, so that their loss is finite.
        several = [b.classes for b in batches if b.classes is not None]
        highest = max(int(found.max()) for found in several)
        full = classes.new_tensor([0, highest]).expand(len(batches) * size, 2).clone()
        for client, found in enumerate(several):
            full[client * size : client * size + len(found)] = found
        classes = full
    joint = Batch(
        grown("input_ids", pad_id),
        attention_mask,
        grown("perturbable", 0),
        torch.cat(rows),
        torch.cat(targets),
        torch.cat(samples),
        classes,
        None if batches[0].token_type_ids is None else grown("token_type_ids", 0),
        _away(batches, size),
    )
    return StackedBatch(joint, torch.cat(owners), len(batches))


def _away(batches: Sequence[Batch], size: int) -> Tensor | None:
    """Which of all samples are to be moved away from; None where none is, and padding never."""
    if all(batch.away is None for batch in batches):
        return None
    whole = torch.zeros(len(batches), size, dtype=torch.bool, device=batches[0].input_ids.device)
    for row, batch in zip(whole, batches, strict=True):
        if batch.away is not None:
            row[: len(batch.away)] = batch.away
    return whole.flatten()


def can_stack(model: AdaptedModel) -> bool:
    """Whether each trained parameter sits in a linear LoRA layer or a head, and nothing is drawn at random."""
    served = {id(parameter) for module in _served(model) for parameter in module.parameters()}
    dropout = any(getattr(module, "p", 0.0) > 0 for module in model._lora_dropouts)
    return not dropout and all(id(parameter) in served for parameter in model.adapter_parameters().values())


class StackedModel:
    """m clients' adapters over one base: a `Model` whose batches are `StackedBatch`es.

    Attributes:
        leaves: one flat float32 parameter (d,) a client: all its adapter's tensors, in the order of their names.
        active: the clients whose batches come next, indices into `leaves`.
    """

    def __init__(self, model: AdaptedModel, adapters: Sequence[Adapter]) -> None:
        """Stacks adapters over a model's base.

        Args:
            model: the base; its own adapter is not touched.
            adapters: one a client, at the model's scaling; a rank may be another than the model's.

        Raises:
            ModelError: an adapter's tensors differ from the model's by more than their rank.
        """
        parameters = model.adapter_parameters()
        for adapter in adapters:
            _check_fit(adapter, parameters)
        self.leaves = [nn.Parameter(self._flat(adapter, parameters).to(model.device)) for adapter in adapters]
        self.active: Sequence[int] = range(len(adapters))
        self._model = model
        self._shapes = [{name: adapter[name].shape for name in parameters} for adapter in adapters]
        self._index = {id(parameter): i for i, parameter in enumerate(parameters.values())}
        self._views: tuple[Tensor, ...] = ()
        self._tokens: list[int] | None = None  # of each client, while they are packed
        self._ascent = AscentWeights(model._base, [], parameters.values(), model._ascent.dtype)
        self._forwards = {module: self._forward(module) for module in _served(model)}

    def client(self, index: int) -> dict[str, Tensor]:
        """A copy of a client's adapter, on the CPU."""
        pieces = self._pieces(index, self.leaves[index].detach().to("cpu", copy=True))
        return {name: piece.clone() for name, piece in zip(self._shapes[index], pieces, strict=True)}

    def adapter(self) -> dict[str, Tensor]:
        """The first client's adapter."""
        return self.client(0)

    def load_adapter(self, adapter: Adapter) -> None:
        """Overwrites every client's adapter."""
        with torch.no_grad():
            for leaf in self.leaves:
                leaf.copy_(self._flat(adapter, self._shapes[0]))

    def adapter_parameters(self) -> Mapping[str, nn.Parameter]:
        """Client -> its flat parameter."""
        return {str(index): leaf for index, leaf in enumerate(self.leaves)}

    def embed(self, batch: StackedBatch) -> Tensor:
        """(m * b, T, H)."""
        return self._model.embed(batch.joint)

    def supervised_logits(self, batch: StackedBatch, delta: Tensor | None = None) -> Tensor:
        """(N, V)."""
        self._refresh(batch)
        return self._model.supervised_logits(batch.joint, delta)

    def supervised_losses(self, batch: StackedBatch, delta: Tensor | None = None) -> Tensor:
        """(N,)."""
        self._refresh(batch)
        return self._model.supervised_losses(batch.joint, delta)

    def first_layer(self, batch: StackedBatch, delta: Tensor | None = None) -> Tensor:
        """(m * b, T, H)."""
        self._refresh()
        return self._model.first_layer(batch.joint, delta)

    def from_first_layer(self, batch: StackedBatch, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(N,) and (m * b, T, H)."""
        self._refresh()
        return self._model.from_first_layer(batch.joint, delta)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Mode of a training step."""
        with hooks.modes(self._model._checkpointed, training=True), routed(self._forwards):
            yield

    @contextlib.contextmanager
    def attacking(self) -> Iterator[None]:
        """Mode of the ascent: no gradient for any client's parameter. Nothing is merged: there is but one base."""
        with (
            hooks.frozen(self.leaves),
            hooks.modes(self._model._checkpointed, training=True),
            self._ascent.installed(),
            routed(self._forwards),
        ):
            yield

    def _refresh(self, batch: StackedBatch | None = None) -> None:
        """The active clients' tensors, each stacked (m, ...), anew: a backward pass frees what it went through."""
        self._tokens = None
        if batch is not None and self._model.packs(batch.joint):
            self._tokens = batch.joint.attention_mask.view(batch.clients, -1).sum(1).tolist()
        if all(self._shapes[index] == self._shapes[self.active[0]] for index in self.active):
            flat = torch.stack([self.leaves[index] for index in self.active])
            self._views = tuple(self._pieces(self.active[0], flat))
        else:
            several = [self._pieces(index, self.leaves[index]) for index in self.active]
            self._views = tuple(_stacked(pieces) for pieces in zip(*several, strict=True))

    def _pieces(self, index: int, flat: Tensor) -> list[Tensor]:
        """A client's tensors, of its ranks, from (..., d)."""
        shapes = list(self._shapes[index].values())
        split = torch.split(flat, [shape.numel() for shape in shapes], dim=-1)
        return [piece.view(*flat.shape[:-1], *shape) for piece, shape in zip(split, shapes, strict=True)]

    @staticmethod
    def _flat(adapter: Adapter, names: Iterable[str]) -> Tensor:
        return torch.cat([adapter[name].flatten() for name in names])

    def _forward(self, module: Any) -> Forward:
        return self._head(module) if isinstance(module, ModulesToSaveWrapper) else self._low_rank(module)

    def _low_rank(self, layer: lora.Linear) -> Forward:
        down, up = (self._index[id(factor["default"].weight)] for factor in (layer.lora_A, layer.lora_B))
        scaling = layer.scaling["default"]

        def forward(x: Tensor) -> Tensor:
            result: Tensor = layer.base_layer(x)
            a, b = (self._views[i].to(result) for i in (down, up))  # a model may lie on several devices
            if self._tokens is not None:
                rows = zip(*(torch.split(t.flatten(0, -2), self._tokens) for t in (x, result)), a, b, strict=True)
                parts = [
                    torch.addmm(out, linear(part.to(out.dtype), low) * scaling, up.t()) for part, out, low, up in rows
                ]
                return torch.cat(parts).view(result.shape)
            m = len(a)
            low = torch.bmm(x.to(result.dtype).reshape(m, -1, x.shape[-1]), a.transpose(1, 2)) * scaling
            flat = torch.baddbmm(result.reshape(m, -1, result.shape[-1]), low, b.transpose(1, 2))
            return flat.view(result.shape)

        return forward

    def _head(self, wrapper: ModulesToSaveWrapper) -> Forward:
        head = wrapper.modules_to_save["default"]
        names = {name: self._index[id(parameter)] for name, parameter in head.named_parameters()}

        def forward(x: Tensor, *rest: Any, **options: Any) -> Tensor:
            pieces = [
                functional_call(
                    head,
                    {name: self._views[i][client].to(x.device) for name, i in names.items()},
                    (part, *rest),
                    options,
                )
                for client, part in enumerate(x.chunk(len(self._views[0])))
            ]
            return torch.cat(pieces)

        return forward


def _stacked(pieces: Sequence[Tensor]) -> Tensor:
    """(m, ...), padded with zeros to the largest rank: a row of zeros in A meets a column of zeros in B, exactly."""
    largest = [max(sizes) for sizes in zip(*(piece.shape for piece in pieces), strict=True)]
    grown = []
    for piece in pieces:
        missing = [after - before for before, after in zip(piece.shape, largest, strict=True)]
        grown.append(pad(piece, [side for amount in reversed(missing) for side in (0, amount)]))
    return torch.stack(grown)


def _check_fit(adapter: Adapter, parameters: Mapping[str, Tensor]) -> None:
    odd = sorted(adapter.keys() ^ parameters.keys())
    for name in parameters.keys() & adapter.keys():
        has, expected = adapter[name].shape, parameters[name].shape
        ranked = 0 if "lora_A" in name else 1 if "lora_B" in name else None
        if len(has) != len(expected) or any(has[i] != expected[i] for i in range(len(has)) if i != ranked):
            odd.append(name)
    if odd:
        raise ModelError(
            f"the adapter does not fit this model: {len(odd)} tensors differ by more than a rank, first {odd[0]!r}."
        )


def _served(model: AdaptedModel) -> list[Any]:
    layers = [layer for layer in model._plain if can_fuse(layer)]
    return layers + [module for module in model.network.modules() if isinstance(module, ModulesToSaveWrapper)]
