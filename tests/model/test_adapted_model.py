"""Each architecture of the zoo against its own bare network: what is added, what is kept, what is refused."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from fedeat.data import Batch, Example
from fedeat.errors import DataError, ModelError
from fedeat.model import SIDECAR, AdaptedModel, Lora, ModelSource, load_model
from fedeat.model.stacking import stack
from fedeat.objective import away, token_mean
from fedeat.passes import attacked, trained
from fedeat.perturbation import pgd

Load = Callable[..., AdaptedModel]
Zoo = Callable[[str], Path]
hf: Any = transformers


def batch_of(model: AdaptedModel, examples: list[Example]) -> Batch:
    return model.collate([model.encode(example) for example in examples])


def noise(model: AdaptedModel, batch: Batch, scale: float = 0.3) -> Tensor:
    shape = model.embed(batch).shape
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(1)) * batch.perturbable.unsqueeze(-1)


def base_weights(model: AdaptedModel) -> dict[str, Tensor]:
    own = {parameter.data_ptr() for parameter in model.adapter_parameters().values()}
    return {
        name: parameter.detach().clone()
        for name, parameter in model.network.named_parameters()
        if parameter.data_ptr() not in own
    }


def bare_logits(model: AdaptedModel, batch: Batch, **inputs: Any) -> Tensor:
    """Full logits of the network as its authors wrote it."""
    if batch.token_type_ids is not None:
        inputs["token_type_ids"] = batch.token_type_ids
    with torch.no_grad():
        logits: Tensor = model.network(attention_mask=batch.attention_mask, **inputs).logits
    return logits


def at_rows(logits: Tensor, batch: Batch) -> Tensor:
    return logits.reshape(-1, logits.shape[-1])[batch.rows]


def test_zero_perturbation_leaves_logits_bit_for_bit(anyone: str, load: Load, examples: list[Example]) -> None:
    model = load(anyone)
    batch = batch_of(model, examples)
    zero = torch.zeros(model.embed(batch).shape)
    with model.evaluating():
        assert torch.equal(model.supervised_logits(batch, zero), model.supervised_logits(batch))


def test_supervised_logits_are_the_full_logits_at_these_rows(causal: str, load: Load, examples: list[Example]) -> None:
    model = load(causal)
    batch = batch_of(model, examples)
    with model.evaluating():
        few = model.supervised_logits(batch)
    full = at_rows(bare_logits(model, batch, input_ids=batch.input_ids), batch)
    assert few.shape == (len(batch.targets), len(model.tokenizer))
    torch.testing.assert_close(few, full, rtol=1e-5, atol=1e-6)
    if causal == "gemma2":
        assert 1.0 < float(few.abs().max()) <= 2.0  # the cap of the config is at work


def test_answers_to_move_away_from_have_the_unlikelihood_in_a_batch_a_part_and_a_stack(load: Load) -> None:
    model = load("llama")
    free = [Example("the film", "good"), Example("the film", "bad story", away=True), Example("a dull film", "yes")]
    batch = batch_of(model, free)
    assert batch.away is not None
    plain = replace(batch, away=None)
    with torch.no_grad():
        found, usual = model.supervised_losses(batch), model.supervised_losses(plain)
        part = model.supervised_losses(batch.select([1]))
        stacked = stack([batch_of(model, free[:1]), batch_of(model, free[1:])], pad_id=model.tokenizer.pad_token_id)
        together = model.supervised_losses(stacked.joint)
    moved = batch.samples == 1
    assert torch.equal(found[~moved], usual[~moved])
    assert torch.equal(found[moved], away(usual[moved]))
    assert torch.allclose(part, found[moved], atol=1e-5)
    assert torch.allclose(together, found, atol=1e-5)
    assert batch_of(model, free[:1]).away is None

    # The ascent makes the answer likely, and training then makes it unlikely at that point.
    perturb = functools.partial(pgd, radius=model.embedding_unit("l2"), steps=5)
    with model.attacking():
        delta = perturb(attacked(model, batch), model.embed(batch), batch.perturbable, torch.Generator())
        assert model.supervised_losses(plain, delta)[moved].mean() < usual[moved].mean()
    optimizer = torch.optim.AdamW(model.adapter_parameters().values(), lr=0.02)
    with torch.no_grad():
        before = model.supervised_losses(plain, delta)
    for _ in range(8):
        with model.training():
            optimizer.zero_grad()
            trained(model, batch)(delta).backward()
            optimizer.step()
    with torch.no_grad():
        after = model.supervised_losses(plain, delta)
    assert after[moved].mean() > before[moved].mean()
    assert after[~moved].mean() < before[~moved].mean()


def test_perturbation_equals_passing_embedding_vectors(causal: str, load: Load, examples: list[Example]) -> None:
    model = load(causal)
    batch = batch_of(model, examples)
    delta = noise(model, batch)
    with model.evaluating():
        hooked = model.supervised_logits(batch, delta)
        clean = model.supervised_logits(batch)
    vectors = at_rows(bare_logits(model, batch, inputs_embeds=model.embed(batch) + delta), batch)
    torch.testing.assert_close(hooked, vectors, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(hooked, clean, atol=1e-3)


def test_perturbed_classifier_equals_passing_embedding_vectors(classifier_name: str, load: Load) -> None:
    model = load(classifier_name)
    batch = batch_of(model, [Example("the film was good", label=1, task="sst2")])  # decoders pool at the last token
    delta = noise(model, batch)
    with model.evaluating():
        hooked = model.supervised_logits(batch, delta)
    vectors = bare_logits(model, batch, inputs_embeds=model.embed(batch) + delta)
    torch.testing.assert_close(hooked[:, :2], vectors[:, :2], rtol=1e-5, atol=1e-6)


def test_classes_of_other_tasks_cannot_be_answered(classifier_name: str, load: Load, examples: list[Example]) -> None:
    model = load(classifier_name)
    batch = batch_of(model, examples)
    assert batch.targets.tolist() == [1, 0, 4, 0]
    with model.evaluating():
        logits = model.supervised_logits(batch)
    plain = bare_logits(model, batch, input_ids=batch.input_ids)
    assert logits.isinf().tolist() == [[task == "mnli"] * 2 + [task == "sst2"] * 3 for task in tasks_of(examples)]
    torch.testing.assert_close(logits[~logits.isinf()], plain[~logits.isinf()])


def tasks_of(examples: list[Example]) -> list[str]:
    return [example.task for example in examples]


def test_radius_is_measured_where_the_first_layer_sees(causal: str, load: Load) -> None:
    model = load(causal)
    if causal == "gpt2":
        with torch.no_grad():
            model.network.get_base_model().transformer.wpe.weight.zero_()  # it adds positions behind the embeddings
    seen: list[Tensor] = []
    layer = next(module for module in model.network.modules() if isinstance(module, GradientCheckpointingLayer))
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for ids in torch.arange(len(model.tokenizer)).split(32):
        with model.evaluating():
            model.network(input_ids=ids[None])
    handle.remove()
    states = torch.cat(seen, dim=1)[0]
    assert model.embedding_unit("l2") == pytest.approx(float(states.norm(dim=-1).mean()), rel=1e-5)
    assert model.embedding_unit("linf") == pytest.approx(float(states.norm(dim=-1).mean()) / 32**0.5, rel=1e-5)
    raw = float(model.network.get_input_embeddings().weight.norm(dim=-1).mean())
    assert model.embedding_unit("l2") / raw == pytest.approx(32**0.5 if causal.startswith("gemma") else 1.0, rel=1e-5)


def gradients(model: AdaptedModel, batch: Batch, delta: Tensor | None = None) -> dict[str, Tensor]:
    with model.training():
        loss = token_mean(model.supervised_logits(batch, delta), batch.targets)
        torch.autograd.backward(loss)
    found = {name: p.grad.clone() for name, p in model.adapter_parameters().items() if p.grad is not None}
    model.network.zero_grad(set_to_none=True)
    return found


def count_layer_runs(model: AdaptedModel) -> tuple[list[int], Callable[[], None]]:
    """Counts forward passes of something inside the first layer, which a recomputed layer runs twice."""
    runs = [0]
    layer = next(module for module in model.network.modules() if isinstance(module, GradientCheckpointingLayer))
    inside = next(module for module in layer.modules() if "Norm" in type(module).__name__)
    handle = inside.register_forward_hook(lambda *args: runs.__setitem__(0, runs[0] + 1))
    return runs, handle.remove


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_changes_no_gradient_and_recomputes(
    anyone: str, dropout: float, load: Load, examples: list[Example]
) -> None:
    lora = Lora(rank=2, dropout=dropout)
    results = []
    for checkpointing in (False, True):
        model = load(anyone, lora=lora, gradient_checkpointing=checkpointing)
        batch = batch_of(model, examples)
        delta = noise(model, batch)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            found = gradients(model, batch, delta)
        runs, remove = count_layer_runs(model)
        gradients(model, batch)
        trained, runs[0] = runs[0], 0
        with model.attacking():
            probe = delta.clone().requires_grad_(True)
            loss = token_mean(model.supervised_logits(batch, probe), batch.targets)
            found["delta"] = torch.autograd.grad(loss, probe)[0]
        assert (trained, runs[0]) == ((2, 2) if checkpointing else (1, 1))
        remove()
        with model.evaluating():
            found["logits"] = model.supervised_logits(batch)
        results.append(found)
    assert results[0].keys() == results[1].keys()
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-5, atol=1e-6)


def test_base_dropout_never_acts(load: Load, examples: list[Example]) -> None:
    # BERT's base drops 10 % in train mode; so would its layers, were they put there whole.
    model = load("bert-classifier", lora=Lora(rank=2), gradient_checkpointing=True)
    batch = batch_of(model, examples)
    with model.training(), torch.no_grad():
        assert torch.equal(model.supervised_logits(batch), model.supervised_logits(batch))


def test_checkpointed_layers_that_drop_out_themselves_do_not(load: Load, tmp_path: Path) -> None:
    tokenizer = load("llama").tokenizer
    tokenizer.save_pretrained(tmp_path)
    shape = {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_attention_heads": 4}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = hf.OPTConfig(
        vocab_size=len(tokenizer), num_hidden_layers=1, max_position_embeddings=64, dropout=0.5, **shape, **ends
    )
    hf.OPTForCausalLM(config).save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path), template="plain", max_length=48, gradient_checkpointing=True, device="cpu")
    model = load_model(source, lora=Lora(rank=2))
    batch = batch_of(model, [Example("good film", "yes")])
    with model.training():
        assert torch.equal(model.supervised_logits(batch), model.supervised_logits(batch))


def test_adapter_dropout_acts_in_training_alone(load: Load, examples: list[Example]) -> None:
    model = load("llama", lora=Lora(rank=2, dropout=0.5))
    batch = batch_of(model, examples)
    with torch.no_grad():
        with model.training():
            assert not torch.equal(model.supervised_logits(batch), model.supervised_logits(batch))
        with model.attacking():
            attacked = model.supervised_logits(batch)
        with model.evaluating():
            torch.testing.assert_close(attacked, model.supervised_logits(batch), rtol=1e-3, atol=1e-4)


def test_attack_mode_freezes_parameters_and_restores_them_after_an_error(load: Load) -> None:
    model = load("llama")
    parameters = model.adapter_parameters().values()
    with model.attacking():
        assert not any(parameter.requires_grad for parameter in parameters)
    with contextlib.suppress(KeyboardInterrupt), model.attacking():
        raise KeyboardInterrupt
    assert all(parameter.requires_grad for parameter in parameters)
    assert not any(module.training for module in model.network.modules())


def test_only_the_adapter_and_the_head_are_trained(anyone: str, load: Load) -> None:
    model = load(anyone)
    trained = [name for name, parameter in model.network.named_parameters() if parameter.requires_grad]
    assert len(trained) == len(model.adapter())
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert any("modules_to_save" in name for name in trained) == ("classifier" in anyone)


def test_saved_adapter_loads_with_plain_peft(
    anyone: str, load: Load, zoo: Zoo, examples: list[Example], tmp_path: Path
) -> None:
    model = load(anyone)
    batch = batch_of(model, examples)
    model.save_adapter(tmp_path)
    maker = hf.AutoModelForCausalLM if "classifier" not in anyone else hf.AutoModelForSequenceClassification
    options = {} if "classifier" not in anyone else {"num_labels": 5}
    base = maker.from_pretrained(zoo(anyone), dtype=torch.float32, **options)
    base.config.pad_token_id = model.tokenizer.pad_token_id
    network = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    expected = bare_logits(model, batch, input_ids=batch.input_ids)
    types = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
    with torch.no_grad():
        plain = network(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **types).logits
    assert torch.equal(plain, expected)


def test_saved_adapter_loads_here_with_what_it_was_trained_with(
    anyone: str, load: Load, examples: list[Example], tmp_path: Path
) -> None:
    model = load(anyone)
    model.save_adapter(tmp_path / "new" / "adapter")
    again = load_model(ModelSource(model.source.name, device="cpu"), lora=None, adapter=tmp_path / "new" / "adapter")
    assert (again.kind, again.heads, again.max_length) == (model.kind, model.heads, 48)
    batch = batch_of(again, examples)
    with again.evaluating(), model.evaluating():
        assert torch.equal(again.supervised_logits(batch), model.supervised_logits(batch))
    assert all(parameter.requires_grad for parameter in again.adapter_parameters().values())


def test_a_maximum_length_that_is_asked_for_overrides_the_adapters(load: Load, tmp_path: Path) -> None:
    model = load("llama", max_length=48)
    model.save_adapter(tmp_path)
    source = ModelSource(model.source.name, device="cpu")
    assert load_model(source, lora=None, adapter=tmp_path).max_length == 48
    assert load_model(source, lora=None, adapter=tmp_path, max_length=20).max_length == 20
    with pytest.raises(ModelError, match=r"data\.max_length is 65"):
        load_model(source, lora=None, adapter=tmp_path, max_length=65)


def test_an_adapter_of_another_base_of_the_same_shape_is_told(
    zoo: Zoo, load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("llama")
    model.save_adapter(tmp_path / "adapter")
    other = shutil.copytree(zoo("llama"), tmp_path / "other")
    monkeypatch.chdir(zoo("llama").parent)
    for same in (model.source.name, "./llama"):
        load_model(ModelSource(same, max_length=48), lora=None, adapter=tmp_path / "adapter")
    assert not caplog.records
    load_model(ModelSource(str(other), max_length=48), lora=None, adapter=tmp_path / "adapter")
    (told,) = [record.getMessage() for record in caplog.records]
    assert f"was made for the base model {model.source.name}, and this is {other}" in told


def test_adapter_files_have_the_same_bytes_whenever_they_are_written(load: Load, tmp_path: Path) -> None:
    model = load("llama")
    model.save_adapter(tmp_path / "here")
    again = load_model(model.source, lora=None, adapter=tmp_path / "here")
    again.save_adapter(tmp_path / "there")
    names = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", SIDECAR]
    for name in names:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    # PEFT keeps them as a set, whose order is another in every process.
    targets = json.loads((tmp_path / "here" / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) == 14
    assert targets == sorted(targets)


def test_same_seed_gives_the_same_fresh_adapter_and_head_and_touches_no_global_state(zoo: Zoo) -> None:
    source = ModelSource(
        str(zoo("bert-classifier")), kind="sequence-classification", heads={"sst2": 2}, max_length=32, device="cpu"
    )
    before = torch.get_rng_state()
    first, second, other = (load_model(source, lora=Lora(rank=2), seed=seed).adapter() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert any("classifier" in name and not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("name", "embedding"), [("llama", "embed_tokens"), ("gpt2", "wte")])
def test_adapted_embeddings_are_perturbed_and_saved_too(
    name: str, embedding: str, load: Load, examples: list[Example], tmp_path: Path
) -> None:
    model = load(name, lora=Lora(rank=2, target_modules=(embedding,)))
    model.check_embeddings()
    batch = batch_of(model, examples)
    delta = noise(model, batch)
    with model.evaluating():
        hooked = model.supervised_logits(batch, delta)
    vectors = at_rows(bare_logits(model, batch, inputs_embeds=model.embed(batch) + delta), batch)
    torch.testing.assert_close(hooked, vectors, rtol=1e-5, atol=1e-6)
    model.save_adapter(tmp_path)
    again = load_model(model.source, lora=None, adapter=tmp_path)
    with model.evaluating():
        assert torch.equal(again.supervised_logits(batch, delta), hooked)


def test_bfloat16_base_trains_a_float32_adapter(anyone: str, load: Load, examples: list[Example]) -> None:
    model = load(anyone, dtype="bfloat16")
    assert {tensor.dtype for tensor in base_weights(model).values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in model.adapter().values()} == {torch.float32}
    batch = batch_of(model, examples)
    delta = noise(model, batch).requires_grad_(True)
    found = gradients(model, batch, delta)
    assert found.keys() == model.adapter_parameters().keys()
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert delta.grad is not None
    assert delta.grad.dtype == torch.float32
    assert sum(float(gradient.norm()) for gradient in found.values()) > 0


def test_generation_continues_the_prompt_alike_alone_and_in_a_batch(causal: str, load: Load) -> None:
    model = load(causal)
    prompts = ["the film was good and the story bright", "bad", "is the answer yes or no?"]
    together = model.generate(prompts, max_new_tokens=5)
    assert together == [model.generate([prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert model.generate([], max_new_tokens=5) == []


def test_generation_fits_into_the_models_positions(load: Load) -> None:
    model = load("gpt2", max_length=64)
    assert len(model.generate(["good " * 200], max_new_tokens=60)) == 1


def test_generation_also_ends_where_the_base_model_ends(load: Load) -> None:
    model = load("llama")
    said = model.generate(["bad"], max_new_tokens=3)[0]
    batch = batch_of(model, [Example("bad")])
    with model.evaluating():
        first = int(model.network(input_ids=batch.input_ids).logits[0, -1].argmax())
    model.network.get_base_model().generation_config.eos_token_id = [first, 2]  # as Phi-3's and Gemma's files do
    assert said
    assert len(model.generate(["bad"], max_new_tokens=3)[0]) < len(said)


class Twice(hf.LlamaForCausalLM):  # type: ignore[misc]
    """Calls its embedding module twice."""

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        self.model.embed_tokens(input_ids)
        return super().forward(input_ids=input_ids, **inputs)


class Never(hf.LlamaForCausalLM):  # type: ignore[misc]
    """Looks embeddings up by hand."""

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        return super().forward(inputs_embeds=self.model.embed_tokens.weight[input_ids], **inputs)


class Wide(hf.LlamaForCausalLM):  # type: ignore[misc]
    """Embeds other tokens than it is given."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> Any:
        return super().forward(input_ids=input_ids[:, :-1], attention_mask=attention_mask[:, :-1], **inputs)


@pytest.mark.parametrize(
    ("network", "what"), [(Twice, "called 2 times"), (Never, "called 0 times"), (Wide, "returned shape")]
)
def test_model_the_hook_cannot_serve_is_refused_by_class_name(network: Any, what: str, load: Load, zoo: Zoo) -> None:
    source = ModelSource(str(zoo("llama")), template="plain")
    model = AdaptedModel(network.from_pretrained(zoo("llama")), load("llama").tokenizer, source)
    with pytest.raises(ModelError, match=f"{network.__name__} cannot be perturbed: .*Embedding.* {what}"):
        model.check_embeddings()


def test_model_of_the_zoo_passes_the_check(anyone: str, load: Load) -> None:
    load(anyone).check_embeddings()


def test_hooks_are_gone_after_an_error(load: Load, examples: list[Example]) -> None:
    model = load("llama")
    batch = batch_of(model, examples)
    with pytest.raises(ModelError, match="returned shape"):
        model.supervised_logits(batch, torch.zeros(1, 1, 32))
    assert not model.network.get_input_embeddings()._forward_hooks
    assert not model.network.get_base_model().lm_head._forward_pre_hooks


def copy_of(source: Path, target: Path, *, without: str = "") -> Path:
    target.mkdir()
    for path in source.iterdir():
        if not without or without not in path.name:
            (target / path.name).write_bytes(path.read_bytes())
    return target


class TestRefusedByName:
    @pytest.fixture
    def refusal(self) -> Iterator[Callable[..., str]]:
        def load_and_fail(directory: Path | str, adapter: Path | None = None, **options: Any) -> str:
            values = {"template": "plain", "max_length": 48, "device": "cpu", **options}
            with pytest.raises(ModelError) as caught:
                load_model(ModelSource(str(directory), **values), lora=Lora(rank=2), adapter=adapter)
            return str(caught.value)

        return load_and_fail

    def test_missing_directory(self, refusal: Callable[..., str], tmp_path: Path) -> None:
        assert "does not exist" in refusal(tmp_path / "none")

    def test_a_name_that_is_neither_here_nor_on_the_hub(
        self, refusal: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def offline(*_: object, **__: object) -> None:
            raise OSError("no connection")

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", offline)
        message = refusal(Path("models/mistake"))
        assert f"there is no directory models/mistake in {tmp_path}" in message
        assert "no connection" in message

    def test_missing_config(self, refusal: Callable[..., str], zoo: Zoo, tmp_path: Path) -> None:
        assert "holds no config.json" in refusal(copy_of(zoo("llama"), tmp_path / "m", without="config"))

    def test_missing_tokenizer(self, refusal: Callable[..., str], zoo: Zoo, tmp_path: Path) -> None:
        directory = copy_of(zoo("llama"), tmp_path / "m", without="token")
        assert "tokenizer" in refusal(directory)

    def test_missing_weights(self, refusal: Callable[..., str], zoo: Zoo, tmp_path: Path) -> None:
        assert "cannot be loaded" in refusal(copy_of(zoo("llama"), tmp_path / "m", without="safetensors"))

    def test_truncated_weights(self, refusal: Callable[..., str], zoo: Zoo, tmp_path: Path) -> None:
        directory = copy_of(zoo("llama"), tmp_path / "m")
        file = directory / "model.safetensors"
        file.write_bytes(file.read_bytes()[:5000])
        assert "cannot be loaded" in refusal(directory)

    def test_checkpoint_that_lacks_a_weight(self, refusal: Callable[..., str], zoo: Zoo, tmp_path: Path) -> None:
        directory = copy_of(zoo("llama"), tmp_path / "m")
        tensors = load_file(directory / "model.safetensors")
        tensors.pop("model.layers.1.mlp.up_proj.weight")
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        assert "lacks 1 weights of a LlamaForCausalLM, first 'model.layers.1.mlp.up_proj.weight'" in refusal(directory)

    def test_encoder_as_language_model(self, refusal: Callable[..., str], zoo: Zoo) -> None:
        assert "Expected a causal language model" in refusal(zoo("bert-classifier"))

    def test_more_tokens_than_positions(self, refusal: Callable[..., str], zoo: Zoo) -> None:
        assert "Set data.max_length to 64 or less" in refusal(zoo("gpt2"), max_length=65)

    def test_tokenizer_of_another_model(self, refusal: Callable[..., str], zoo: Zoo, tmp_path: Path) -> None:
        directory = copy_of(zoo("llama"), tmp_path / "m")
        for name, field in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "")):
            raw = json.loads((directory / name).read_text())
            if field:
                raw[field] = [{**item, "id": 500 if item["content"] == "<pad>" else item["id"]} for item in raw[field]]
                raw["model"]["vocab"]["<pad>"] = 500
            (directory / name).write_text(json.dumps(raw))
        assert "pads or ends with token 500, but the model embeds" in refusal(directory)

    def test_no_target_module(self, zoo: Zoo) -> None:
        with pytest.raises(ModelError, match=r"target modules \('nothing',\)"):
            load_model(ModelSource(str(zoo("llama")), max_length=48), lora=Lora(target_modules=("nothing",)))

    def test_chat_template_that_is_not_there(self, zoo: Zoo) -> None:
        with pytest.raises(DataError, match="tokenizer with a chat template"):
            load_model(ModelSource(str(zoo("llama")), template="chat", max_length=48), lora=None)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
    def test_cuda_where_there_is_none(self, refusal: Callable[..., str], zoo: Zoo) -> None:
        assert "torch finds no CUDA device" in refusal(zoo("llama"), device="cuda")

    def test_directory_without_an_adapter(self, refusal: Callable[..., str], zoo: Zoo, tmp_path: Path) -> None:
        assert "holds no adapter_config.json" in refusal(zoo("llama"), tmp_path)

    def test_broken_sidecar(self, refusal: Callable[..., str], zoo: Zoo, load: Load, tmp_path: Path) -> None:
        load("llama").save_adapter(tmp_path)
        (tmp_path / SIDECAR).write_text('{"kind": ')
        assert f"{SIDECAR} is broken" in refusal(zoo("llama"), tmp_path)

    def test_adapter_of_another_architecture(
        self, refusal: Callable[..., str], zoo: Zoo, load: Load, tmp_path: Path
    ) -> None:
        load("gpt2").save_adapter(tmp_path)
        assert "cannot be loaded" in refusal(zoo("llama"), tmp_path)

    def test_adapter_of_another_shape(self, zoo: Zoo, load: Load, tmp_path: Path) -> None:
        peft: Any = pytest.importorskip("peft")
        wide = hf.LlamaForCausalLM(hf.AutoConfig.from_pretrained(zoo("llama"), intermediate_size=96))
        config = peft.LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
        peft.get_peft_model(wide, config).save_pretrained(str(tmp_path))
        with pytest.raises(ModelError) as caught:
            load_model(ModelSource(str(zoo("llama")), max_length=48), lora=None, adapter=tmp_path)
        message = str(caught.value)
        assert message.startswith(f"adapter {tmp_path} was made for another model")
        assert "other shapes than the LlamaForCausalLM" in message
        assert "size mismatch" not in message

    def test_adapter_that_lacks_tensors(
        self, refusal: Callable[..., str], zoo: Zoo, load: Load, tmp_path: Path
    ) -> None:
        model = load("llama")
        model.save_adapter(tmp_path, dict(list(model.adapter().items())[:-2]))
        assert "was not made for LlamaForCausalLM" in refusal(zoo("llama"), tmp_path)

    def test_adapter_of_another_kind(self, refusal: Callable[..., str], zoo: Zoo, load: Load, tmp_path: Path) -> None:
        peft: Any = pytest.importorskip("peft")
        base = hf.AutoModelForCausalLM.from_pretrained(zoo("llama"))
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        peft.get_peft_model(base, config).save_pretrained(tmp_path)
        assert "Expected LORA" in refusal(zoo("llama"), tmp_path)

    def test_task_without_a_head(self, load: Load) -> None:
        with pytest.raises(ModelError, match=r"no head for task 'qqp'\. It has sst2, mnli"):
            load("bert-classifier").encode(Example("a", task="qqp"))

    def test_foreign_tensors(self, load: Load) -> None:
        model = load("llama")
        before = model.adapter()
        first, last = next(iter(before)), list(before)[-1]
        with pytest.raises(ModelError, match="1 tensors differ, first 'other'"):
            model.load_adapter({**before, "other": torch.zeros(1)})
        with pytest.raises(ModelError, match="has shape"):
            model.load_adapter({**before, first: before[first] + 1, last: torch.zeros(1)})
        assert all(torch.equal(before[name], tensor) for name, tensor in model.adapter().items())

    def test_saving_without_an_adapter(self, load: Load, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="none to save"):
            load("llama", lora=None).save_adapter(tmp_path)


SHAPE = {"max_position_embeddings": 66, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("maker", "config"),
    [
        (hf.DistilBertModel, hf.DistilBertConfig(dim=32, hidden_dim=48, n_layers=1, n_heads=2, vocab_size=120)),
        (hf.RobertaModel, hf.RobertaConfig(**SHAPE, intermediate_size=48, vocab_size=120, type_vocab_size=1)),
        (hf.ElectraModel, hf.ElectraConfig(**SHAPE, intermediate_size=48, vocab_size=120, embedding_size=16)),
    ],
    ids=["distilbert", "roberta", "electra"],
)
def test_encoder_with_a_head_of_several_layers_trains_and_is_saved(
    maker: Any, config: Any, load: Load, tmp_path: Path
) -> None:
    # Its tokenizer numbers segments, which DistilBERT takes none of and RoBERTa knows but one.
    tokenizer = load("bert-classifier").tokenizer
    maker(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path), kind="sequence-classification", heads={"mnli": 3}, max_length=32, device="cpu")
    model = load_model(source, lora=Lora(rank=2))
    model.check_embeddings()
    batch = batch_of(model, [Example("a film", pair="a story", label=1, task="mnli")])
    assert batch.token_type_ids is not None
    found = gradients(model, batch, noise(model, batch))
    assert found.keys() == model.adapter().keys()
    assert all(float(gradient.norm()) > 0 for name, gradient in found.items() if "lora_A" not in name)
    model.save_adapter(tmp_path / "adapter")
    again = load_model(source, lora=None, adapter=tmp_path / "adapter")
    with model.evaluating():
        assert torch.equal(again.supervised_logits(batch), model.supervised_logits(batch))


def test_positions_behind_the_padding_index_are_all_that_roberta_has(load: Load, tmp_path: Path) -> None:
    hf.RobertaModel(hf.RobertaConfig(**SHAPE, intermediate_size=48, vocab_size=120)).save_pretrained(tmp_path)
    load("bert-classifier").tokenizer.save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path), kind="sequence-classification", heads={"sst2": 2}, max_length=65, device="cpu")
    with pytest.raises(ModelError, match="has 64 positions"):
        load_model(source, lora=None)


def test_head_of_another_size_in_the_checkpoint_is_replaced(load: Load, zoo: Zoo, tmp_path: Path) -> None:
    network = hf.AutoModelForSequenceClassification.from_pretrained(zoo("bert-classifier"), num_labels=7)
    network.save_pretrained(tmp_path)
    load("bert-classifier").tokenizer.save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path), kind="sequence-classification", heads={"sst2": 2}, max_length=32, device="cpu")
    head = load_model(source, lora=Lora(rank=2)).adapter()
    assert {tuple(tensor.shape) for name, tensor in head.items() if "classifier" in name} == {(2, 32), (2,)}


def test_template_auto_is_the_chat_template_where_there_is_one(load: Load) -> None:
    model = load("llama", template="auto")
    assert model.template_name == "alpaca"
    model.tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}:{% endfor %}"
    chat = AdaptedModel(model.network, model.tokenizer, replace(model.source, template="auto"))
    assert chat.template_name == "chat"
    ids = chat.encode(Example("good film", "yes")).input_ids
    assert ids.count(model.tokenizer.bos_token_id) == 1  # the template's own, and no second one
