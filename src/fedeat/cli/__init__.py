"""The command line: parse, call one function, print what came out.

Heavy imports wait until a command runs, so that help is quick.

application   the application and what commands share
training      run, compare, calibrate, demo
measuring     evaluate, attack, refusal, report
nodes         keys, serve, join
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated

import typer

from fedeat import __version__, terminal
from fedeat.cli.application import app
from fedeat.cli.measuring import attack, evaluate, refusal, report_
from fedeat.cli.nodes import join, keys, serve
from fedeat.cli.training import calibrate, compare, demo, run
from fedeat.errors import FedeatError, explanation

__all__ = ["app", "main"]

_STOPPED = 130


def _print_version(asked: bool) -> None:
    if asked:
        terminal.out.print(f"fedeat {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of `fedeat` itself."""


for command in (run, compare, evaluate, attack, refusal, calibrate, report_, demo, keys, serve, join):
    app.command(command.__name__.rstrip("_"))(command)


def main() -> None:
    """Entry point: prints what went wrong in one message, without a traceback, and exits with the code for it."""
    _quieten()
    try:
        with terminal.notes():
            app()
    except FedeatError as error:
        terminal.show_error(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        _stopped()
    except SystemExit as leaving:
        if leaving.code == _STOPPED:  # typer turns Ctrl-C into this, and says nothing
            _stopped()
        raise
    except Exception as error:
        known = explanation(error)
        if known is not None:
            terminal.show_error(known)
            sys.exit(2)
        if os.environ.get("FEDEAT_TRACEBACK"):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        terminal.show_error(
            f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno}). This is a defect of "
            "fedeat, not of what you gave it. Please report it, with what FEDEAT_TRACEBACK=1 in front shows."
        )
        sys.exit(1)


def _stopped() -> None:
    terminal.err.print("stopped. A run or a comparison goes on where it was when the same command is given again.")
    sys.exit(_STOPPED)


def _quieten() -> None:
    """Keeps other libraries' notes out of the terminal; what a person must know, our own messages say."""
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
