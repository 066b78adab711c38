from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedeat.data import Batch, Example
from fedeat.errors import DataError, ModelError
from fedeat.evaluation import tasks
from fedeat.evaluation.scoring import judge, predict
from fedeat.model import AdaptedModel, ModelSource, load_model

SHARED = Path(os.environ.get("FEDEAT_SHARED") or Path(__file__).parents[3] / "shared")


WORDS = ("a", "the", "film", "story", "is", "was", "good", "bad", "dull", "bright", "who", "text", "same", ",", "?")


def asked(count: int = 24, kind: tasks.Kind = "causal-lm") -> list[Example]:
    """Examples of two tasks and of very different lengths."""
    rows: list[dict[str, Any]] = []
    for index in range(count):
        words = [WORDS[(7 * index + 3 * k + k * k * index) % len(WORDS)] for k in range(1 + index % 9)]
        if index % 2:
            rows.append({"sentence": " ".join(words), "label": index % 4 // 2})
        else:
            rows.append({"premise": " ".join(words), "hypothesis": " ".join(words[:2]), "label": index % 3})
    return tasks.examples(rows, None, kind)


def naive_likelihood(model: AdaptedModel, example: Example) -> int:
    """Largest sum of token log-probabilities, one unpadded forward pass of the bare network an answer."""
    prompt = model.encode(replace(example, answer="")).input_ids
    scores = []
    for answer in tasks.TASKS[example.task].answers:
        # As in running text: alone, a sentencepiece tokenizer would put a space of its own before the answer.
        cue, full = (model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (":", f": {answer}"))
        tokens = full[len(cue) :]
        ids = torch.tensor([[*prompt, *tokens]])
        with torch.no_grad():
            logprobs = model.network(input_ids=ids).logits[0].log_softmax(-1)
        scores.append(sum(float(logprobs[len(prompt) - 1 + k, token]) for k, token in enumerate(tokens)))
    return max(range(len(scores)), key=scores.__getitem__)


def count_sequences(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the size of each batch the model is given."""
    sizes: list[int] = []
    real: Callable[..., torch.Tensor] = model.supervised_logits

    def counting(batch: Batch, delta: torch.Tensor | None = None) -> torch.Tensor:
        sizes.append(len(batch.input_ids))
        return real(batch, delta)

    monkeypatch.setattr(model, "supervised_logits", counting)
    return sizes


def test_likelihood_of_one_token_answers_equals_one_pass_an_answer(word_model: AdaptedModel) -> None:
    examples = asked()
    found = predict(word_model, examples, batch_size=5)
    assert found == [naive_likelihood(word_model, example) for example in examples]
    assert len(set(found)) > 1


def test_likelihood_of_spelled_answers_sums_their_tokens(letter_model: AdaptedModel) -> None:
    examples = asked(12)
    found = predict(letter_model, examples, batch_size=5)
    assert found == [naive_likelihood(letter_model, example) for example in examples]


def test_one_token_answers_share_a_forward_pass(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    sizes = count_sequences(model, monkeypatch)
    predict(model, asked(10), batch_size=4)
    assert sum(sizes) == 10
    assert max(sizes) == 4


def test_repeated_texts_are_scored_once(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    sizes = count_sequences(model, monkeypatch)
    examples = asked(6)
    found = predict(model, [*examples, *reversed(examples), *examples], batch_size=4)
    assert sum(sizes) == 6
    assert found == [*found[:6], *reversed(found[:6]), *found[:6]]


def test_batch_size_and_order_change_no_answer(letter_model: AdaptedModel) -> None:
    examples = asked(10)
    found = predict(letter_model, examples, batch_size=1)
    assert predict(letter_model, examples[::-1], batch_size=64)[::-1] == found


def test_label_and_answer_of_an_example_are_not_looked_at(word_model: AdaptedModel) -> None:
    examples = asked(10)
    blind = [replace(example, label=None, answer="") for example in examples]
    assert predict(word_model, blind) == predict(word_model, examples)


def test_cut_prompt_is_the_same_for_every_answer(
    make_model: Any, letters: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(letters, max_length=60)
    prompts: list[str] = []
    real: Callable[..., Batch] = model.collate

    def recording(encoded: Any) -> Batch:
        prompts.extend(str(item.input_ids[: item.answer_start]) for item in encoded)
        return real(encoded)

    monkeypatch.setattr(model, "collate", recording)
    predict(model, [example for example in asked(4) if example.task == "mnli"][:1])
    assert len(prompts) == 3
    assert len(set(prompts)) == 1


def test_answers_with_the_same_tokens_are_refused(make_model: Any, words: tuple[str, ...]) -> None:
    model = make_model(tuple(word for word in words if word not in ("negative", "positive")))
    with pytest.raises(ModelError, match='"negative" and "positive", answers of sst2, the same tokens'):
        predict(model, [example for example in asked() if example.task == "sst2"])


def test_answer_longer_than_the_model_may_read_is_refused(make_model: Any, letters: tuple[str, ...]) -> None:
    model = make_model(letters, max_length=6)
    with pytest.raises(ModelError, match="does not fit into 6 tokens"):
        predict(model, asked(2))


def test_broken_down_model_gives_no_answer(word_model: AdaptedModel) -> None:
    with torch.no_grad():
        for parameter in word_model.network.parameters():
            parameter.fill_(float("nan"))
    assert predict(word_model, asked(4)) == [None] * 4


def test_unknown_task_scorer_and_batch_size_are_refused(word_model: AdaptedModel) -> None:
    with pytest.raises(DataError, match='unknown task "cola"'):
        predict(word_model, [Example("a film", task="cola")])
    with pytest.raises(ValueError, match="scorer"):
        predict(word_model, asked(2), scorer="oracle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size >= 1"):
        predict(word_model, asked(2), batch_size=0)


def test_no_examples_have_no_answers(word_model: AdaptedModel) -> None:
    assert predict(word_model, []) == []


def test_progress_ends_at_the_number_of_distinct_texts(letter_model: AdaptedModel) -> None:
    told: list[tuple[int, int]] = []
    examples = asked(5)
    predict(letter_model, examples * 2, batch_size=3, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (5, 5)
    assert told == sorted(told)


@pytest.mark.parametrize(
    ("text", "task", "label"),
    [
        ("Positive.", "sst2", 1),
        ("The sentiment is negative", "sst2", 0),
        ("positive, not negative", "sst2", None),
        ("I cannot tell", "sst2", None),
        ("", "sst2", None),
        ("yes", "qqp", 1),
        ("No", "qqp", 0),
        ("YES!", "qnli", 0),
        ("nothing is known, not now", "qnli", None),
        ("maybe", "mnli", 1),
        ("The premise entails the hypothesis.", "mnli", 0),
        ("The premise does not entail the hypothesis.", "mnli", 2),
        ("maybe yes", "mnli", None),
        ("no, no, no", "mnli-mm", 2),
        ("unpositively", "sst2", None),
    ],
)
def test_generation_is_judged_by_whole_answer_words(text: str, task: str, label: int | None) -> None:
    assert judge(text, task) == label


def test_generation_asks_for_the_prompts_and_judges_what_is_said(
    make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    examples = asked(7)
    sayings = ["yes", "no", "maybe", "positive", "negative", "", "yes no"]
    said = {example.prompt: saying for example, saying in zip(examples, sayings, strict=True)}

    def generate(prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
        return [said[prompt] for prompt in prompts]

    monkeypatch.setattr(model, "generate", generate)
    found = predict(model, examples, scorer="generation", batch_size=3)
    assert found == [judge(said[example.prompt], example.task) for example in examples]


def test_generated_answers_do_not_depend_on_the_batch(word_model: AdaptedModel) -> None:
    examples = asked(12)
    alone = predict(word_model, examples, scorer="generation", batch_size=1, max_new_tokens=4)
    assert predict(word_model, examples, scorer="generation", batch_size=12, max_new_tokens=4) == alone


def test_classifier_answers_its_largest_logit_within_the_tasks_head(classifier: AdaptedModel) -> None:
    examples = asked(kind="sequence-classification")
    expected = []
    for example in examples:
        texts = (example.prompt,) if example.pair is None else (example.prompt, example.pair)
        with torch.no_grad():
            logits = classifier.network(**classifier.tokenizer(*texts, return_tensors="pt")).logits[0]
        expected.append(int((logits[:2] if example.task == "sst2" else logits[2:]).argmax()))
    assert predict(classifier, examples, batch_size=5) == expected


def test_mismatched_mnli_is_answered_by_the_head_of_mnli(classifier: AdaptedModel) -> None:
    examples = [example for example in asked(kind="sequence-classification") if example.task == "mnli"]
    mismatched = [replace(example, task="mnli-mm") for example in examples]
    assert predict(classifier, mismatched) == predict(classifier, examples)


def test_classifier_without_the_tasks_head_is_refused(classifier: AdaptedModel) -> None:
    with pytest.raises(ModelError, match="no head for task 'qqp'"):
        predict(classifier, [Example("a", pair="b", task="qqp")])


@pytest.mark.skipif(not (SHARED / "models" / "stories260k").is_dir(), reason="needs the real model")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_real_language_model_is_scored_both_ways() -> None:
    source = ModelSource(str(SHARED / "models" / "stories260k"), template="plain", max_length=256)
    model = load_model(source, lora=None)
    examples = asked(4)
    expected = [naive_likelihood(model, example) for example in examples]
    assert predict(model, examples) == expected
    assert len(predict(model, examples, scorer="generation", max_new_tokens=4)) == 4
