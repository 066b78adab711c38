"""What a model is shown, what of it is supervised, what may be perturbed, and what the maximum length takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from fedeat.data import Encoded, Example
from fedeat.data.encoding import (
    alpaca_template,
    chat_template,
    collate,
    encode_instruction,
    encode_texts,
    length_grouped,
    marks_of,
    plain_template,
    require_targets,
    template_named,
    truncation,
)
from fedeat.errors import DataError

hf: Any = transformers
TEXTS = ("the film was good", "is it a dull story? no: yes", "Answer: maybe\nAnswer: no", "good bad")
CHAT = "{% for m in messages %}<s>user: {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}bot:{% endif %}"


def tokenizer(kind: str, single: str = "$A", *, chat: str | None = None) -> Any:
    """A small tokenizer: pieces as "llama" (a space before a text), "gpt2" (bytes) or "bert" has them."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    pre, decoder = {
        "llama": (tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()),
        "gpt2": (tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()),
    }[kind]
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre, decoder
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=130, special_tokens=[*special.values()], show_progress=False)
    raw.train_from_iterator(TEXTS, trainer)
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[(name, raw.token_to_id(name)) for name in ("<s>", "</s>")]
    )
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=chat, **special)


KINDS = [(kind, single) for kind in ("llama", "gpt2") for single in ("$A", "<s> $A", "<s> $A </s>", "$A </s>")]


@pytest.fixture(params=KINDS, ids=lambda param: f"{param[0]} {param[1]}")
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    return tokenizer(*request.param)


def encode(tok: Any, prompt: str, answer: str, *, max_length: int = 500, **options: Any) -> Encoded:
    return encode_instruction(tok, Example(prompt, answer), template=plain_template, max_length=max_length, **options)


@pytest.mark.parametrize("template", [plain_template, alpaca_template, lambda prompt: f"{prompt}\n"])
def test_tokens_are_those_of_the_running_text(any_tokenizer: Any, template: Callable[[str], str]) -> None:
    # Sentencepiece tokenizers put a space of their own before a text, so an answer cut apart would have two.
    item = encode_instruction(any_tokenizer, Example("the film", "good"), template=template, max_length=500)
    shown = template("the film")
    text = f"{shown}good" if shown.endswith("\n") else f"{shown} good"
    whole = any_tokenizer(text, add_special_tokens=False)["input_ids"]
    opening = [any_tokenizer.bos_token_id] * ("<s>" in any_tokenizer.decode(any_tokenizer("a")["input_ids"]))
    assert item.input_ids == (*opening, *whole, any_tokenizer.eos_token_id)
    assert any_tokenizer.decode(item.input_ids[item.answer_start :], skip_special_tokens=True).strip() == "good"
    assert item.cut == ""


def test_prompt_alone_is_what_stands_before_its_answer(any_tokenizer: Any) -> None:
    alone, answered = encode(any_tokenizer, "good story", ""), encode(any_tokenizer, "good story", "yes")
    assert alone.input_ids == answered.input_ids[: answered.answer_start]
    assert alone.answer_start == len(alone.input_ids)
    assert any_tokenizer.eos_token_id not in alone.input_ids


def test_token_that_spans_the_joint_is_cut_apart() -> None:
    raw = tokenizers.Tokenizer(tokenizers.models.BPE({"<unk>": 0, ":": 1, " ": 2, ": ": 3, "a": 4}, [(":", " ")]))
    tok = hf.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    item = encode_instruction(tok, Example("", "a"), template=lambda prompt: "a:", max_length=9)
    assert item.input_ids == (4, 1, 2, 4)
    assert item.answer_start == 2


def test_tokenizer_without_an_ending_closes_no_answer() -> None:
    tok = tokenizer("gpt2")
    tok.eos_token = None
    item = encode(tok, "good", "yes")
    assert tok.decode(item.input_ids[item.answer_start :]) == " yes"


def test_only_text_of_the_prompt_is_perturbable(any_tokenizer: Any) -> None:
    item = encode(any_tokenizer, "good </s> story é", "yes")
    special = {any_tokenizer.bos_token_id, any_tokenizer.eos_token_id, any_tokenizer.pad_token_id}
    for index, (token, allowed) in enumerate(zip(item.input_ids, item.perturbable, strict=True)):
        assert allowed == (index < item.answer_start and token not in special)
    assert any(item.perturbable)


def test_unknown_word_is_text_unless_it_marks_an_end() -> None:
    tok = tokenizer("llama")
    assert tok.unk_token_id not in marks_of(tok).special
    tok.unk_token = tok.eos_token  # as GPT-2's <|endoftext|> is
    assert tok.eos_token_id in marks_of(tok).special


@settings(max_examples=60, deadline=None)
@given(
    words=st.integers(0, 30), answer_words=st.integers(1, 12), max_length=st.integers(2, 60), which=st.integers(0, 7)
)
def test_truncation_takes_the_prompt_before_the_answer(
    words: int, answer_words: int, max_length: int, which: int
) -> None:
    tok = _CACHE.setdefault(which, tokenizer(*KINDS[which]))
    prompt, answer = " ".join(["film"] * words), " ".join(["good"] * answer_words)
    whole = encode(tok, prompt, answer, max_length=10_000)
    item = encode(tok, prompt, answer, max_length=max_length)
    wanted = whole.input_ids[whole.answer_start :]
    assert len(item.input_ids) == len(item.perturbable) == min(max_length, len(whole.input_ids))
    assert 1 <= item.answer_start < len(item.input_ids)
    kept = item.input_ids[item.answer_start :]
    if item.cut == "":
        assert item == whole
    elif item.cut == "prompt":
        assert kept == wanted
        assert item.input_ids[0] == whole.input_ids[0]
        if item.answer_start > 1:  # the cue for the answer stays
            assert item.input_ids[item.answer_start - 1] == whole.input_ids[whole.answer_start - 1]
    else:
        assert item.cut == "answer"
        assert len(wanted) >= max_length
        assert kept == wanted[: max_length - 1]


_CACHE: dict[int, Any] = {}


def test_truncation_is_counted() -> None:
    tok = tokenizer("gpt2")
    encoded = [encode(tok, "film " * n, "good", max_length=20) for n in (1, 30, 40)]
    encoded.append(encode(tok, "film", "good " * 40, max_length=20))
    assert truncation(encoded) == {"examples": 4, "cut_prompts": 2, "cut_answers": 1}
    assert truncation([]) == {"examples": 0, "cut_prompts": 0, "cut_answers": 0}


def test_chat_template_marks_the_text_itself() -> None:
    tok = tokenizer("gpt2", "<s> $A", chat=CHAT)
    render = chat_template(tok)
    assert render("good") == "<s>user: good</s>bot:"
    item = encode_instruction(tok, Example("good", "yes"), template=render, max_length=99, is_chat=True)
    assert tok.decode(item.input_ids) == "<s>user: good</s>bot: yes</s>"
    assert item.input_ids.count(tok.bos_token_id) == 1
    marked = [index for index, token in enumerate(item.input_ids) if token in (tok.bos_token_id, tok.eos_token_id)]
    assert not any(item.perturbable[index] for index in marked)


def test_templates_by_name() -> None:
    plain, chatty = tokenizer("gpt2"), tokenizer("gpt2", chat=CHAT)
    assert template_named("auto", plain)("x") == alpaca_template("x")
    assert template_named("auto", chatty)("x") == "<s>user: x</s>bot:"
    assert template_named("plain", chatty)("x") == "x\nAnswer:"
    assert alpaca_template("x").endswith("### Instruction:\nx\n\n### Response:\n")
    with pytest.raises(DataError, match="needs a tokenizer with a chat template"):
        template_named("chat", plain)
    with pytest.raises(DataError, match="no template 'vicuna'"):
        template_named("vicuna", plain)


class TestTexts:
    @pytest.fixture
    def bert(self, zoo: Callable[[str], Any]) -> Any:
        return hf.AutoTokenizer.from_pretrained(zoo("bert-classifier"))

    def test_label_counts_from_the_tasks_first_class(self, bert: Any) -> None:
        item = encode_texts(bert, Example("a film", pair="a story", label=2), classes=range(2, 5), max_length=40)
        assert (item.label, item.classes, item.cut) == (4, (2, 5), "")
        assert item.answer_start == len(item.input_ids)
        assert encode_texts(bert, Example("a film"), classes=range(2), max_length=40).label == -1

    def test_structure_is_not_perturbable(self, bert: Any) -> None:
        item = encode_texts(bert, Example("a film", pair="bad xyz"), classes=range(2), max_length=40)
        tokens = bert.convert_ids_to_tokens(item.input_ids)
        assert [not allowed for allowed in item.perturbable] == [token in ("[CLS]", "[SEP]") for token in tokens]
        assert item.token_type_ids is not None
        assert item.token_type_ids[-1] == 1

    @pytest.mark.parametrize(("label", "classes"), [(2, range(2)), (-1, range(2)), (3, range(4, 7))])
    def test_label_of_no_class_is_refused(self, bert: Any, label: int, classes: range) -> None:
        with pytest.raises(DataError, match=f"label {label} of task 'sst2' is not one of its {len(classes)} classes"):
            encode_texts(bert, Example("a", label=label, task="sst2"), classes=classes, max_length=40)

    def test_cut_is_told_from_just_fitting(self, bert: Any) -> None:
        example = Example("a film is good", pair="bad")
        size = len(encode_texts(bert, example, classes=range(2), max_length=99).input_ids)
        fitting = encode_texts(bert, example, classes=range(2), max_length=size)
        shorter = encode_texts(bert, example, classes=range(2), max_length=size - 1)
        assert (fitting.cut, len(fitting.input_ids)) == ("", size)
        assert (shorter.cut, len(shorter.input_ids)) == ("prompt", size - 1)
        assert shorter.input_ids[-2:] == fitting.input_ids[-2:]  # the longer text lost

    @pytest.mark.parametrize("max_length", [1, 2, 3])
    def test_limit_without_room_for_text_is_refused(self, bert: Any, max_length: int) -> None:
        with pytest.raises(DataError, match=f"data.max_length is {max_length}, which leaves no room for text"):
            encode_texts(bert, Example("a film", pair="bad"), classes=range(2), max_length=max_length)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_text_without_a_token_is_refused_where_the_tokenizer_adds_none(kind: str) -> None:
    with pytest.raises(DataError, match="text '' of task 'sst2' has no token"):
        encode_texts(tokenizer(kind), Example("", label=0, task="sst2"), classes=range(2), max_length=40)
    bare = encode_texts(tokenizer(kind, "<s> $A"), Example("", label=0, task="sst2"), classes=range(2), max_length=40)
    assert len(bare.input_ids) == 1


def test_batch_supervises_the_answers_and_pads_on_the_right() -> None:
    first = Encoded((5, 6, 7, 8), (True, True, False, False), answer_start=2)
    second = Encoded((5, 9), (True, False), answer_start=1)
    batch = collate([first, second], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.perturbable.tolist() == [[True, True, False, False], [True, False, False, False]]
    assert batch.rows.tolist() == [1, 2, 4]
    assert batch.targets.tolist() == [7, 8, 9]
    assert batch.samples.tolist() == [0, 0, 1]
    assert batch.classes is None


def test_first_token_of_a_sequence_is_predicted_by_nothing() -> None:
    other = Encoded((1, 2), (True, False), answer_start=1)
    batch = collate([Encoded((5, 6), (False, False), answer_start=0), other], pad_id=0)
    assert batch.rows.tolist() == [0, 2]
    assert batch.targets.tolist() == [6, 2]


def test_classes_become_one_row_a_sample() -> None:
    items = [Encoded((5,), (True,), 1, label=3, classes=(2, 5)), Encoded((5, 6), (True,) * 2, 2, 0, (0, 2), (0, 1))]
    batch = collate(items[::-1], pad_id=0)
    assert batch.rows.tolist() == [0, 1]
    assert batch.targets.tolist() == [0, 3]
    assert batch.classes is not None
    assert batch.classes.tolist() == [[0, 2], [2, 5]]


@pytest.mark.parametrize(
    "bad",
    [
        Encoded((1, 2), (True, True), answer_start=2),  # a prompt alone
        Encoded((1,), (False,), answer_start=0),
        Encoded((1, 2), (True, True), answer_start=2, label=-1),
    ],
)
def test_training_example_without_a_target_is_refused(bad: Encoded) -> None:
    good = Encoded((1, 2), (True, False), answer_start=1)
    require_targets([good], source="client 3")
    with pytest.raises(DataError, match=r"client 3: 1 of 2 examples have no answer or no label .* number 2"):
        require_targets([good, bad], source="client 3")
    with pytest.raises(DataError, match="client 3 has no training examples"):
        require_targets([], source="client 3")


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=90), size=st.integers(1, 9), seed=st.integers(0, 5))
def test_batches_hold_every_example_once(lengths: list[int], size: int, seed: int) -> None:
    batches = length_grouped(lengths, size, generator=torch.Generator().manual_seed(seed))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= size for batch in batches)
    assert batches == length_grouped(lengths, size, generator=torch.Generator().manual_seed(seed))


def test_batches_of_like_length_pad_little() -> None:
    lengths = torch.randint(1, 200, (640,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = length_grouped(lengths, 8, generator=torch.Generator().manual_seed(0))
    padded = sum(len(group) * max(lengths[i] for i in group) for group in groups)
    assert padded < 1.12 * sum(lengths)  # in random batches it is 1.7 times


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=80),
    size=st.integers(1, 9),
    tokens=st.integers(1, 120),
    seed=st.integers(0, 5),
)
def test_batches_stay_within_their_tokens_and_hold_every_example_once(
    lengths: list[int], size: int, tokens: int, seed: int
) -> None:
    groups = length_grouped(lengths, size, generator=torch.Generator().manual_seed(seed), tokens=tokens)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) <= size
        assert len(group) == 1 or len(group) * max(lengths[index] for index in group) <= tokens


def test_token_budget_beyond_reach_changes_no_batch() -> None:
    lengths = [3 + index % 17 for index in range(70)]
    bounded = length_grouped(lengths, 4, generator=torch.Generator().manual_seed(1), tokens=10**6)
    assert bounded == length_grouped(lengths, 4, generator=torch.Generator().manual_seed(1))
