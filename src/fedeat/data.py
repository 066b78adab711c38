"""From files to batches: examples, prompt templates, tokenisation, collation.

Instruction data becomes (prompt, answer) pairs whose answer tokens alone are supervised; a perturbation may act on
the prompt's tokens alone (Alg. 1, lines 5-8). Classification data becomes one text or a pair of texts and a class.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedeat.errors import DataError

Row = Mapping[str, Any]

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
"""File kinds that are read, each also gzipped as `.gz` except Parquet."""


@dataclass(frozen=True)
class Example:
    """One training or evaluation example, before tokenisation.

    Attributes:
        prompt: what the model is shown: the whole instruction (causal-lm) or the first text (sequence-classification).
        answer: the text to be learned (causal-lm); "" for sequence-classification.
        pair: the second text of a pair (sequence-classification), else None.
        label: class index, None for free text.
        task: task name such as "sst2", or "" for free instruction data.
        group: value of the partition column ("category", "client", ...), else None.
    """

    prompt: str
    answer: str = ""
    pair: str | None = None
    label: int | None = None
    task: str = ""
    group: str | None = None


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example.

    Attributes:
        input_ids: at most `max_length` ids.
        perturbable: one flag a token, True where a perturbation may act.
        answer_start: index of the first supervised token; `len(input_ids)` where none is supervised.
        label: class index for sequence classification, -1 where unknown, else None.
        classes: `(start, stop)` of the classes this example may get; a head a task is a block of one head's rows.
        token_type_ids: segment ids where the tokenizer makes them, else None.
        cut: "" or what truncation took: "prompt", "answer".
    """

    input_ids: tuple[int, ...]
    perturbable: tuple[bool, ...]
    answer_start: int
    label: int | None = None
    classes: tuple[int, int] | None = None
    token_type_ids: tuple[int, ...] | None = None
    cut: str = ""


@dataclass(frozen=True)
class Batch:
    """Tokens of B samples padded on the right to T, and what of them is supervised.

    Attributes:
        input_ids: (B, T) int64.
        attention_mask: (B, T) int64, 1 at tokens, 0 at padding.
        perturbable: (B, T) bool, True where a perturbation may act: prompt tokens, never padding, special tokens
            or the answer.
        rows: (N,) int64, flat positions `b * T + t` whose logits are supervised, sorted; for sequence
            classification `arange(B)`, one pooled row a sample.
        targets: (N,) int64, the token or class that each supervised row must predict.
        samples: (N,) int64, the sample b in 0..B-1 that each supervised row belongs to.
        classes: (B, 2) int64 `start, stop` of the classes a sample may get (sequence classification), else None.
        token_type_ids: (B, T) int64 where the tokenizer makes them (BERT pairs), else None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    perturbable: Tensor
    rows: Tensor
    targets: Tensor
    samples: Tensor
    classes: Tensor | None = None
    token_type_ids: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return Batch(*(None if tensor is None else tensor.to(device) for tensor in tensors))


def read_json(path: Path) -> Any:
    """The one JSON value in a `.json` or `.json.gz` file.

    Raises:
        DataError: the file is missing, unreadable, or not JSON.
    """
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {error}. Is the file complete?") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON list, JSON lines, CSV or Parquet file, the first three also gzipped.

    Raises:
        DataError: the file is missing, of another kind, broken, empty, or holds rows that are not objects.
    """
    kind = _kind(path)
    if kind == ".parquet":
        rows = _read_parquet(path)
    elif kind == ".csv":
        rows = list(csv.DictReader(_read_text(path).splitlines(keepends=True)))
    elif kind == ".jsonl":
        rows = list(_parse_lines(path, _read_text(path)))
    else:
        rows = _rows_of_json(path)
    if not rows:
        raise DataError(f"{path} holds no rows. Expected at least one example.")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: expected an object with named fields, got {type(row).__name__}.")
    return rows


def read_hub(name: str, *, split: str = "train") -> list[dict[str, Any]]:
    """Rows of one split of a data set on the Hugging Face hub.

    Raises:
        DataError: the data set cannot be loaded, for example because there is no network.
    """
    import datasets  # heavy, and needed for hub names alone

    try:
        return [dict(row) for row in datasets.load_dataset(name, split=split)]
    except Exception as error:
        raise DataError(
            f"data set {name!r} (split {split!r}) could not be loaded: {error}. Expected a local file "
            f"({', '.join(SUFFIXES)}) or a data set name on a hub this machine can reach."
        ) from error


def is_local(source: str) -> bool:
    """Whether a data source names a file rather than a data set on the hub."""
    path = Path(source)
    return path.exists() or path.is_absolute() or source.startswith(".") or path.name.endswith((*SUFFIXES, ".gz"))


def _kind(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return suffix
    raise DataError(f"{path} is of a kind that is not read. Expected one of {', '.join(SUFFIXES)}, or these with .gz.")


def _read_text(path: Path) -> str:
    if not path.exists():
        raise DataError(f"data file {path} does not exist. Check the path; a relative one starts at {Path.cwd()}.")
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.name.endswith(".gz") else data).decode("utf-8-sig")
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}. Is the file complete?") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}. Convert it to UTF-8.") from None


def _parse_lines(path: Path, text: str) -> Iterator[Any]:
    # Not str.splitlines(): it also breaks at characters such as U+2028 that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number} is not valid JSON: {error}. Is the file complete?") from None


def _rows_of_json(path: Path) -> list[Any]:
    text = _read_text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        # Many data sets name JSON lines ".json".
        if error.msg == "Extra data":
            return list(_parse_lines(path, text))
        raise DataError(f"{path} is not valid JSON: {error}. Is the file complete?") from None
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        for key in ("data", "rows", "examples", "train"):
            if isinstance(value.get(key), list):
                return list(value[key])
        return [value]
    raise DataError(f"{path} holds a JSON {type(value).__name__}. Expected a list of objects.")


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise DataError(f"data file {path} does not exist. Check the path; a relative one starts at {Path.cwd()}.")
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"{path} needs pyarrow to be read: pip install pyarrow.") from None
    try:
        return list(parquet.read_table(path).to_pylist())
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}.") from None


# The names that public instruction sets use: Alpaca, Dolly, and plain pairs. The first that is present counts.
INSTRUCTION_FIELDS = ("instruction", "prompt", "question", "query")
INPUT_FIELDS = ("input", "context")
OUTPUT_FIELDS = ("output", "response", "answer", "completion")


def instruction_examples(rows: Sequence[Row], *, source: str, column: str | None = None) -> list[Example]:
    """Instruction rows as examples: Alpaca's, Dolly's, or any with a prompt-like and an answer-like field.

    Args:
        rows: objects with one of `INSTRUCTION_FIELDS`, one of `OUTPUT_FIELDS` and perhaps one of `INPUT_FIELDS`.
        source: where the rows come from, for messages.
        column: field to keep as `Example.group`, None for none.

    Raises:
        DataError: a row lacks a field it must have, or a field is not text; names the row.
    """
    examples = []
    for number, row in enumerate(rows, start=1):
        instruction = _text(row, INSTRUCTION_FIELDS, source, number)
        answer = _text(row, OUTPUT_FIELDS, source, number)
        extra = next((str(row[name]) for name in INPUT_FIELDS if row.get(name)), "")
        group = None if column is None else _group(row, column, source, number)
        examples.append(Example(f"{instruction}\n\n{extra}" if extra else instruction, answer, group=group))
    return examples


def _text(row: Row, names: Sequence[str], source: str, number: int) -> str:
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise DataError(
            f"{source}, row {number} has none of the fields {', '.join(names)}. Expected Alpaca fields (instruction, "
            f"input, output), got {', '.join(sorted(map(str, row))) or 'no field'}. Rename the columns."
        )
    if not isinstance(row[name], str):
        raise DataError(f"{source}, row {number}: field {name!r} must be text, got {type(row[name]).__name__}.")
    return str(row[name])


def _group(row: Row, column: str, source: str, number: int) -> str:
    if row.get(column) is None:
        raise DataError(
            f"{source}, row {number} has no column {column!r} to partition by. Got {', '.join(sorted(map(str, row)))}. "
            "Set partition.by to one of these."
        )
    return str(row[column])


Template = Callable[[str], str]
"""Prompt -> the text the model is shown, ending where the answer begins."""


def alpaca_template(prompt: str) -> str:
    """Stanford Alpaca's wording without an input field; a row's input follows its instruction after a blank line."""
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{prompt}\n\n### Response:\n"
    )


def plain_template(prompt: str) -> str:
    """The prompt and a cue for the answer, for small models to which every token counts."""
    return f"{prompt}\nAnswer:"


def chat_template(tokenizer: Any) -> Template:
    """The tokenizer's own chat template, one turn of the person and the model's turn opened.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            'data.template = "chat" needs a tokenizer with a chat template; this one has none. Use "alpaca".'
        )

    def render(prompt: str) -> str:
        turns = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    return render


def template_named(name: str, tokenizer: Any) -> Template:
    """Template called "alpaca", "plain", "chat", or "auto": chat where the tokenizer has a template, else Alpaca."""
    if name == "auto":
        name = "chat" if getattr(tokenizer, "chat_template", None) else "alpaca"
    return chat_template(tokenizer) if name == "chat" else {"alpaca": alpaca_template, "plain": plain_template}[name]


def encode_instruction(
    tokenizer: Any, example: Example, *, template: Template, max_length: int, is_chat: bool = False
) -> Encoded:
    """Token ids of a prompt and its answer, the answer closed by the end-of-sequence token.

    Too long an example loses prompt tokens first, from the middle of the prompt, so that the instruction's beginning
    and the cue for the answer stay; only an answer that alone exceeds `max_length` is cut, at its end.

    Args:
        is_chat: the template writes the beginning-of-sequence token itself.
    """
    text = template(example.prompt)
    prefix = tokenizer(text, add_special_tokens=not is_chat)["input_ids"]
    if prefix and prefix[-1] == tokenizer.eos_token_id and not is_chat:
        prefix = prefix[:-1]  # some tokenizers close every text
    answer: list[int] = []
    if example.answer:
        # Tokenised apart, so that scoring compares answers behind one and the same prompt tokens.
        joint = "" if text[-1:].isspace() else " "
        answer = tokenizer(joint + example.answer, add_special_tokens=False)["input_ids"]
        answer += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    cut = ""
    if len(prefix) + len(answer) > max_length:
        # At least one prompt token stays: the first answer token must be predicted from something.
        room = max(max_length - len(answer), 1)
        if len(prefix) > room:
            prefix, cut = _cut_middle(prefix, room), "prompt"
        if len(prefix) + len(answer) > max_length:
            answer, cut = answer[: max_length - len(prefix)], "answer"
    special = special_ids(tokenizer)
    perturbable = [token not in special for token in prefix] + [False] * len(answer)
    return Encoded((*prefix, *answer), tuple(perturbable), answer_start=len(prefix), cut=cut)


def encode_texts(tokenizer: Any, example: Example, *, classes: range, max_length: int) -> Encoded:
    """Token ids of one text or a pair of texts to be classified; the longer text is cut first.

    Args:
        classes: the head's rows that stand for this example's task; its label counts from their start.
    """
    texts = (example.prompt,) if example.pair is None else (example.prompt, example.pair)
    full = tokenizer(*texts, truncation="longest_first", max_length=max_length, return_overflowing_tokens=False)
    ids, types = full["input_ids"], full.get("token_type_ids")
    special = special_ids(tokenizer)
    return Encoded(
        tuple(ids),
        tuple(token not in special for token in ids),
        answer_start=len(ids),
        label=-1 if example.label is None else classes.start + example.label,
        classes=(classes.start, classes.stop),
        token_type_ids=None if types is None else tuple(types),
        cut="prompt" if len(ids) >= max_length else "",
    )


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that mark structure rather than text: begin, end, padding, chat turns."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {index for index, token in added.items() if getattr(token, "special", False)}
    unknown = getattr(tokenizer, "unk_token_id", None)
    return frozenset((marked | set(tokenizer.all_special_ids)) - {unknown})


def _cut_middle(tokens: list[int], length: int) -> list[int]:
    head = (length + 1) // 2
    return tokens[:head] + tokens[len(tokens) - (length - head) :]


def collate(encoded: Sequence[Encoded], *, pad_id: int) -> Batch:
    """Pads encoded examples on the right and lists their supervised rows.

    Row `t` of the logits predicts token `t + 1`, so the rows of an answer start one before its first token.
    """
    length = max(len(item.input_ids) for item in encoded)
    shape = (len(encoded), length)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    perturbable = torch.zeros(shape, dtype=torch.bool)
    types = None if encoded[0].token_type_ids is None else torch.zeros(shape, dtype=torch.long)
    classes = None if encoded[0].classes is None else torch.tensor([item.classes for item in encoded])
    rows: list[int] = []
    targets: list[int] = []
    samples: list[int] = []
    for b, item in enumerate(encoded):
        size = len(item.input_ids)
        input_ids[b, :size] = torch.tensor(item.input_ids)
        attention_mask[b, :size] = 1
        perturbable[b, :size] = torch.tensor(item.perturbable)
        if types is not None and item.token_type_ids is not None:
            types[b, :size] = torch.tensor(item.token_type_ids)
        if item.label is not None:
            rows.append(b)
            targets.append(item.label)
            samples.append(b)
            continue
        positions = range(item.answer_start, size)
        rows.extend(b * length + t - 1 for t in positions)
        targets.extend(item.input_ids[t] for t in positions)
        samples.extend(b for _ in positions)
    return Batch(
        input_ids,
        attention_mask,
        perturbable,
        torch.tensor(rows, dtype=torch.long),
        torch.tensor(targets, dtype=torch.long),
        torch.tensor(samples, dtype=torch.long),
        classes,
        types,
    )


def length_grouped(lengths: Sequence[int], batch_size: int, *, generator: torch.Generator) -> list[list[int]]:
    """Indices in batches of similar length, in random order, so that little padding is computed.

    Examples are shuffled, cut into pools of 16 batches, sorted by length inside a pool, and the batches shuffled.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    pool = 16 * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(order), pool):
        part = sorted(order[start : start + pool], key=lambda index: lengths[index])
        batches.extend(part[i : i + batch_size] for i in range(0, len(part), batch_size))
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def padding_share(batches: Iterable[Batch]) -> float:
    """Share of a set of batches' positions that are padding, in 0..1."""
    masks = [batch.attention_mask for batch in batches]
    positions = sum(mask.numel() for mask in masks)
    return 1.0 - sum(int(mask.sum()) for mask in masks) / positions if positions else 0.0
