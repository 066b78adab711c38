"""The perturbation for others' training loops, and the examples that show it."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

import fedeat
from fedeat import perturbation
from fedeat.data import Example
from fedeat.errors import ModelError
from fedeat.model import AdaptedModel, Lora
from fedeat.passes import attacked

hf: Any = transformers
Load = Callable[..., AdaptedModel]
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ROWS = [
    {"prompt": "the film was good", "answer": "yes"},
    {"prompt": "a dull film with a bad story", "answer": "no"},
] * 3


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_worst_case_is_what_a_client_finds(anyone: str, load: Load, examples: list[Example]) -> None:
    model = load(anyone)
    if "classifier" in anyone:  # one task alone: a plain classifier knows of no others
        examples = [item for item in examples if item.task == "sst2"]
    batch = model.collate([model.encode(item) for item in examples])
    labels = torch.full_like(batch.input_ids, -100)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if "classifier" in anyone:
        labels = batch.targets
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids
        assert batch.classes is not None
        batch.classes[:] = torch.tensor([0, 5])
    else:
        labels.view(-1)[batch.rows + 1] = batch.targets
    attack = functools.partial(perturbation.pgd, radius=0.3, steps=1)
    with model.attacking():
        expected = attack(attacked(model, batch), model.embed(batch), batch.perturbable, torch.Generator())
    model.network.train()
    delta = fedeat.worst_case(model.network, {**inputs, "labels": labels}, radius=0.3, steps=1, mask=batch.perturbable)
    assert float((delta - expected).norm()) < 1e-2 * float(expected.norm())
    assert all(module.training for module in model.network.modules())
    assert all(parameter.requires_grad for parameter in model.adapter_parameters().values())


def test_nothing_drops_out_in_layers_that_drop_by_their_own_mode_and_recompute() -> None:
    shape = {"hidden_size": 16, "ffn_dim": 24, "word_embed_proj_dim": 16, "num_attention_heads": 2}
    chances = {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = hf.OPTForCausalLM(
            hf.OPTConfig(
                vocab_size=40, num_hidden_layers=2, max_position_embeddings=32, init_std=0.3, **shape, **chances
            )
        )
        network.train()
        ids = torch.arange(4, 20).view(2, 8)
        inputs = {"input_ids": ids, "labels": torch.where(torch.arange(8) < 5, -100, ids)}
        plain = fedeat.worst_case(network, inputs, radius=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the name, which older versions know alone
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found = fedeat.worst_case(network, inputs, radius=0.5)
        torch.testing.assert_close(found, plain)
        layer = network.model.decoder.layers[0]
        assert (layer.dropout, layer.self_attn.dropout, network.model.decoder.layerdrop) == (0.5, 0.5, 0.5)


def test_perturbed_adds_to_one_pass_and_says_when_there_was_none(load: Load, examples: list[Example]) -> None:
    model = load("gemma")
    batch = model.collate([model.encode(item) for item in examples])
    delta = 0.1 * torch.randn(model.embed(batch).shape)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        clean = model.network(**inputs).logits
        with fedeat.perturbed(model.network, delta):
            moved = model.network(**inputs).logits
        again = model.network(**inputs).logits
    assert torch.equal(clean, again)
    assert not torch.allclose(clean, moved, atol=1e-3)
    with pytest.raises(ModelError, match="called 0 times"), fedeat.perturbed(model.network, delta):
        pass


def test_plain_loop_trains(load: Load) -> None:
    module = example("plain_loop")
    model = load("llama", lora=Lora(rank=2))
    batch = module.batch_of(model.tokenizer, ROWS)
    assert batch["labels"].shape == batch["input_ids"].shape
    losses = module.train(model.network, [batch] * 12, radius=0.05)
    assert losses[-1] < losses[0]


def settings(maker: Any, directory: Path) -> Any:
    return maker(
        output_dir=str(directory),
        num_train_epochs=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_trainer_steps_at_the_worst_case(load: Load, tmp_path: Path) -> None:
    import transformers

    module = example("hf_trainer")
    model = load("llama", lora=Lora(rank=2))
    before = model.adapter()
    trainer = module.with_trainer(
        model.network, model.tokenizer, ROWS, settings(transformers.TrainingArguments, tmp_path)
    )
    check_trainer(trainer, model, before)


@pytest.mark.filterwarnings("ignore")
def test_trls_trainer_steps_at_the_worst_case(load: Load, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    module = example("hf_trainer")
    model = load("llama", lora=Lora(rank=2))
    before = model.adapter()
    trainer = module.with_trl(model.network, model.tokenizer, ROWS, settings(trl.SFTConfig, tmp_path))
    check_trainer(trainer, model, before)


def check_trainer(trainer: Any, model: AdaptedModel, before: dict[str, torch.Tensor]) -> None:
    """The loss goes down, and each step saw embeddings that were moved."""
    seen: list[int] = []
    inner = trainer.model.get_input_embeddings()
    original = inner.forward

    def look(*arguments: Any, **options: Any) -> Any:
        seen.append(len(inner._forward_hooks))
        return original(*arguments, **options)

    inner.forward = look
    losses = trainer.train().training_loss
    assert losses > 0
    assert (
        sum(hooks > min(seen) for hooks in seen) >= 12 * 4
    )  # three ascent passes and the step's own, in each of twelve steps
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.adapter().items())
