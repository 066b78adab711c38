"""Every command and every snippet of the README runs."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from fedeat import cli, config, demo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str, page: str = README) -> list[str]:
    """A page's fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def short_demo(place: Path) -> None:
    """What `make demo` leaves behind and snippets use, without its runs; one round is enough to try a command."""
    settings = demo.configuration(place)
    short = config.with_values(settings, {"federation.rounds": 1, "client.max_steps": 1})
    (place / "config.toml").write_text(config.to_toml(short))


def commands() -> list[list[str]]:
    """The README's shell commands in order, as words; a backslash goes on in the next line."""
    joined = (block.replace("\\\n", " ") for block in blocks("sh"))
    lines = (line for block in joined for line in block.splitlines() if line.strip())
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_snippet_runs(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_the_federation_with_a_rule_of_ones_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "aggregation.md").read_text()
    (code,) = (block for block in blocks("python", page) if "experiment.prepare" in block)
    short_demo(tmp_path / "demo-out")
    monkeypatch.chdir(tmp_path)
    told: dict[str, Any] = {}
    exec(compile(code, "aggregation.md", "exec"), told)
    assert [row["task"] for row in told["rows"]] == ["sst2", "qqp", "mnli", "qnli"]
    assert sorted(told["result"].weights.values()) == [0.0] * 5 + [0.2] * 5
    assert (tmp_path / "near-half" / "adapter_model.safetensors").is_file()


def test_every_command_is_make_or_fedeat() -> None:
    assert {words[0] for words in commands()} == {"make", "fedeat"}


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for words in commands():
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE)


@pytest.mark.slow
def test_fedeat_commands_run_in_order_after_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("src", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    short_demo(tmp_path / "demo-out")
    monkeypatch.chdir(tmp_path)
    for words in commands():
        if words[0] == "fedeat":
            # In this process: each of its own would import torch and transformers for longer than it works.
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as left:
                cli.main()
            assert left.value.code in (0, None), f"{shlex.join(words)}\n{capsys.readouterr().err}"
