"""What the commands share: the application, options that mean the same in each, and what they open and show."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedeat import terminal
from fedeat.errors import FedeatError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedeat.evaluation import Row
    from fedeat.model import AdaptedModel

app = typer.Typer(
    name="fedeat",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    suggest_commands=False,  # Click names the nearest command by itself, and Typer would once more
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Robust federated fine-tuning of large language models.

Clients train LoRA adapters on worst-case perturbations of the input embeddings; the server takes the geometric median
of their updates. One run: `fedeat run`. The paper's ablation: `fedeat compare`. To see it work at once: `fedeat demo`.
""",
    epilog="Exit codes: 0 done; 1 a defect of fedeat; 2 something given was wrong, the message says what; 130 stopped "
    "with Ctrl-C.",
)

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG.toml", help="The configuration; docs/configuration.md lists its keys.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as `aggregation.rule=mean`. Repeatable."),
]
AdapterOption = Annotated[Path | None, typer.Option(metavar="DIR", help="PEFT adapter directory.")]
TaskOption = Annotated[str | None, typer.Option(help="sst2, qqp, mnli, qnli or rte, where the columns do not tell.")]
TemplateOption = Annotated[str, typer.Option(help="auto, alpaca, chat or plain.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Texts a forward pass.")]
MaxLengthOption = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens a text may have. Default: the adapter's, or 512, or what the model was made for."),
]


def show_rows(rows: Sequence[Row], comparison: Path | None = None) -> None:
    """Prints the tables of evaluated rows; with a comparison's directory, also which differences are shown."""
    from fedeat import report

    if rows:
        report.print_tables(rows, terminal.out, None if comparison is None else report.differences_in(comparison))
    else:
        terminal.out.print("Nothing was evaluated: evaluation.data is empty.")


def load(model: str, adapter: Path | None, *, dtype: str, template: str, max_length: int | None) -> AdaptedModel:
    """A model and its adapter for measuring, with the options as the command line gave them."""
    from fedeat.model import ModelSource, load_model

    choice("--template", template, ("auto", "alpaca", "chat", "plain"))
    choice("--dtype", dtype, ("float32", "bfloat16", "float16"))
    source = ModelSource(model, dtype=dtype, template=template, max_length=int(min(512, _positions(model))))
    return load_model(source, lora=None, adapter=adapter, max_length=max_length)


def _positions(model: str) -> float:
    """How many tokens a model was made for, infinity where it does not say or cannot be read."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(model).get_text_config()
    except Exception:  # loading the model says what is wrong with it
        return math.inf
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else math.inf


def parse_radii(text: str) -> tuple[float, ...]:
    """The radii of a list with commas; none of an empty text.

    Raises:
        FedeatError: one is no positive number.
    """
    try:
        values = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        values = (0.0,)
    if any(not 0 < value < float("inf") for value in values):
        raise FedeatError(f"--radii {text}: expected positive numbers with commas between, such as 0.02,0.05,0.1.")
    return values


def prepare_output(file: Path, read: Sequence[Path] = ()) -> None:
    """Makes the directory of a file that a command writes at its end; what is wrong with it is said before the work.

    Args:
        file: what is written.
        read: what the command reads.

    Raises:
        FedeatError: it is a directory or one of the files that are read, or it cannot be written.
    """
    if file.is_dir():
        raise FedeatError(f"--out {file}: it is a directory. Expected a file, such as {file / 'out.json'}.")
    if file.resolve() in [path.resolve() for path in read]:
        raise FedeatError(f"--out {file}: it is also read, and would be overwritten. Choose another file.")
    prepare_directory(file.resolve().parent)


def prepare_directory(directory: Path) -> None:
    """Makes a directory that a command writes into at its end, and tries to; as `prepare_output`.

    Raises:
        FedeatError: it cannot be made or written.
    """
    from fedeat import records

    records.make_directory(directory)
    probe = directory / ".fedeat.new"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise FedeatError(f"--out: {directory} cannot be written: {error.strerror}. Choose another place.") from None


def choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises an error that lists what is allowed, unless the value is."""
    if value not in allowed:
        raise FedeatError(f"{option} {value}: expected one of {', '.join(allowed)}.")
