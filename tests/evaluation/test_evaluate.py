from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fedeat.errors import DataError
from fedeat.evaluation import EvaluationSet, Item, Pair, average, evaluate, is_win, rank, task_row
from fedeat.evaluation.tasks import item
from fedeat.model import AdaptedModel

ADJECTIVES = ("good", "bad", "dull", "bright")


def sentence(text: str, label: int) -> Item:
    return item({"sentence": text, "label": label}, "sst2")


def pairs(count: int = 24) -> tuple[Pair, ...]:
    """Two modifications of each original, labels in turn."""
    made = []
    for index in range(count):
        original = sentence(f"the film {index // 2} was {ADJECTIVES[index // 2 % 4]}", index // 2 % 2)
        modified = sentence(f"the story was {ADJECTIVES[index % 4]} {'. ' * (index + 1)}", index // 2 % 2)
        made.append(Pair("sst2", index, original, modified, original.label, "planted", f"g{index // 2}"))
    return tuple(made)


def constant(model: AdaptedModel, word: str) -> AdaptedModel:
    """The model made to answer one word whatever it reads, as a collapsed one does."""
    head = model.network.get_output_embeddings()
    network_norm = model.network.model.norm
    with torch.no_grad():
        network_norm.weight.zero_()
        head.weight.zero_()
    token = model.tokenizer.convert_tokens_to_ids(word)

    def push(module: torch.nn.Module, inputs: object, logits: torch.Tensor) -> torch.Tensor:
        bias = torch.zeros(logits.shape[-1])
        bias[token] = 5.0
        return logits + bias

    head.register_forward_hook(push)
    return model


def test_rows_come_from_the_predictions_that_come_with_them(word_model: AdaptedModel) -> None:
    benign = tuple(sentence(f"a {ADJECTIVES[i % 4]} story {'? ' * i}", i % 2) for i in range(12))
    sets = [EvaluationSet("pairs", pairs=pairs()), EvaluationSet("benign", benign=benign)]
    rows, predictions = evaluate(word_model, sets, batch_size=7, seed=3)
    assert [row["task"] for row in rows] == ["sst2"]
    assert rows[0] == task_row("sst2", json.loads(json.dumps(predictions))["sst2"], seed=3)
    assert (rows[0]["benign"], rows[0]["pairs"], rows[0]["originals"]) == (12, 24, 12)
    assert predictions["sst2"]["benign"]["labels"] == [entry.label for entry in benign]
    assert [pair["index"] for pair in predictions["sst2"]["pairs"]] == list(range(24))


def test_each_text_keeps_its_own_answer_over_sets_and_tasks(word_model: AdaptedModel) -> None:
    mixed = (
        item({"premise": "the film is bad", "hypothesis": "is bad", "label": 2}, "mnli-mm"),
        sentence("a dull film", 0),
        item({"question": "who ?", "sentence": "the answer", "label": 1}, "qnli"),
    )
    rows, together = evaluate(word_model, [EvaluationSet("f", benign=mixed), EvaluationSet("p", pairs=pairs(4))])
    assert [row["task"] for row in rows] == ["sst2", "mnli-mm", "qnli"]
    for entry in mixed:
        _, alone = evaluate(word_model, [EvaluationSet("f", benign=(entry,))])
        assert alone[entry.task]["benign"] == together[entry.task]["benign"]


def test_pair_in_two_files_counts_once(word_model: AdaptedModel) -> None:
    once, _ = evaluate(word_model, [EvaluationSet("a", pairs=pairs())])
    twice, _ = evaluate(word_model, [EvaluationSet("a", pairs=pairs()), EvaluationSet("b", pairs=pairs())])
    assert once == twice


def test_planted_constant_predictor_is_flagged_and_wins_nothing(make_model: Any) -> None:
    sets = [EvaluationSet("pairs", pairs=pairs(80))]
    (collapsed,), _ = evaluate(constant(make_model(), "positive"), sets)
    assert (collapsed["asr"], collapsed["benign_correct"]) == (0.0, 40)
    assert collapsed["asr_high"] > 0.05
    assert collapsed["flags"][0] == "constant prediction: 100 % positive"
    honest = {**collapsed, "asr": 0.4, "flags": []}
    assert not is_win(collapsed, honest)
    assert rank([collapsed, honest]) == [honest]
    assert average([collapsed])["flags"][0] == "sst2: constant prediction: 100 % positive"


def test_classifier_is_evaluated_on_the_texts_of_the_prompts(classifier: AdaptedModel) -> None:
    rows, predictions = evaluate(classifier, [EvaluationSet("pairs", pairs=pairs())], batch_size=5)
    assert rows[0]["pairs"] == 24
    assert {answer["original"] for answer in predictions["sst2"]["pairs"]} <= {0, 1}


def test_classifier_cannot_read_prompts_in_another_wording(classifier: AdaptedModel) -> None:
    foreign = EvaluationSet("f", benign=(Item("sst2", "Good or bad? a film", None, 1),))
    with pytest.raises(DataError, match="wording"):
        evaluate(classifier, [foreign])


def test_nothing_to_evaluate_on_makes_no_rows(word_model: AdaptedModel) -> None:
    assert evaluate(word_model, []) == ([], {})
