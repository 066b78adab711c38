"""The base model's script at toy size: what it learns from, that a kill changes nothing, and that its model loads."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_base_model.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("train_base_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    sentences = [{"sentence": f"a {'bright' if i % 2 else 'dull'} film {i}", "label": i % 2} for i in range(20)]
    found = {"glue": tmp_path / "sst2.jsonl", "instructions": tmp_path / "alpaca.jsonl"}
    found["glue"].write_text("".join(json.dumps(row) + "\n" for row in sentences))
    rows = [{"instruction": f"say {i}", "input": "", "output": f"it is {i}"} for i in range(6)]
    found["instructions"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def tiny(script: Any) -> Any:
    return script.Settings(hidden=16, layers=1, heads=2, vocabulary=300, length=48, batch=4, steps=4)


def test_the_second_half_of_a_glue_file_is_left_for_the_clients(script: Any, files: dict[str, Path]) -> None:
    corpus = script.read_corpus([files["instructions"]], [files["glue"]])
    assert len(corpus.instructions) == 6
    assert [example.prompt.split("film ")[1].split()[0] for example in corpus.glue["sst2"]] == list(map(str, range(10)))


def test_a_training_that_was_cut_goes_on_to_the_same_weights(
    script: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    settings = tiny(script)
    corpus = script.read_corpus([files["instructions"]], [files["glue"]])
    tokenizer = script.make_tokenizer(corpus, settings)
    whole, first, second = (script.make_model(len(tokenizer), settings) for _ in range(3))
    script.train(whole, tokenizer, corpus, settings, tmp_path / "whole.pt")
    # As killed behind step 2: the schedule is that of all steps.
    half = replace(settings, steps=2)
    schedule = script.schedule
    script.schedule = lambda step, steps: schedule(step, settings.steps)
    script.train(first, tokenizer, corpus, half, tmp_path / "cut.pt")
    script.schedule = schedule
    script.train(second, tokenizer, corpus, settings, tmp_path / "cut.pt")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_its_model_is_examined_as_an_evaluation_examines_it(
    script: Any,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = tmp_path / "base"
    sizes = ["--hidden", "16", "--layers", "1", "--heads", "2", "--vocabulary", "300", "--steps", "2", "--batch", "2"]
    given = ["--glue", str(files["glue"]), "--test", str(files["glue"]), "--test-limit", "8", *sizes]
    monkeypatch.setattr(sys, "argv", ["train", str(place), *given])
    threads = torch.get_num_threads()
    script.main()
    torch.set_num_threads(threads)
    assert "most common label" in capsys.readouterr().out
    record = json.loads((place / "base_model.json").read_text())
    assert record["test"][0]["benign"] == 8
    monkeypatch.setattr(sys, "argv", ["train", str(place), *given, "--seed", "1"])
    with pytest.raises(SystemExit, match="holds a model with other settings"):
        script.main()


def test_answers_are_marked_and_kept_where_a_prompt_is_too_long(script: Any, files: dict[str, Path]) -> None:
    corpus = script.read_corpus([files["instructions"]], [files["glue"]])
    tokenizer = script.make_tokenizer(corpus, tiny(script))
    long = replace(corpus.glue["sst2"][0], prompt="a dull film " * 50)
    ids, answers = script.pack(tokenizer, [long, *corpus.glue["sst2"][:2]], 48)
    assert ids.shape == answers.shape == (3, 48)
    for row, mark in zip(ids, answers, strict=True):
        assert tokenizer.decode(row[mark]) in ("negative</s>", "positive</s>")
    assert len(tokenizer(script.tasks.CLOSING, add_special_tokens=False)["input_ids"]) == 1
