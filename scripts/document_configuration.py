"""Writes docs/configuration.md from the configuration's own types, so that the two cannot differ.

python scripts/document_configuration.py            writes the page
python scripts/document_configuration.py --check    exits with 1 where the page is out of date
"""

from __future__ import annotations

import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fedeat.config import Config, Source

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

HEAD = """# Configuration

A run is described by one TOML file. Only `model.name` and `data.train` must be set. Any key can be given on the command
line: `--set aggregation.rule=mean`. A wrong key, a wrong value, a missing file and keys that do not fit together are
reported all at once, before anything runs. Relative paths start at the directory the command is given in. A run
directory keeps the resolved configuration, every key with the value used.

This page is made by `scripts/document_configuration.py` from `src/fedeat/config/schema.py`.
"""

BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def page() -> str:
    """The whole page."""
    parts = [HEAD, "## Top level\n", table(Config, tables=False)]
    for name, field in Config.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            parts += [f"## [{name}]\n", f"{(section.__doc__ or '').strip()}\n", table(section)]
    parts += [
        "## Sources\n",
        "`data.train` and `evaluation.data` hold paths, hub names, or tables with these keys, such as\n"
        '`{ path = "alpaca.jsonl.gz", limit = 5000 }`.\n',
        table(Source),
    ]
    return "\n".join(parts)


def table(section: type[BaseModel], *, tables: bool = True) -> str:
    """A line for each key of a section; without `tables`, for those that are no section themselves."""
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in section.model_fields.items():
        if tables or section_of(field.annotation) is None:
            cells = (f"`{name}`", type_of(field), default_of(field), field.description or "")
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section a key holds, if any."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def type_of(field: FieldInfo) -> str:
    """Type or choices of a key and its range."""
    bounds = [
        f"{sign} {getattr(rule, name):g}"
        for rule in field.metadata
        for name, sign in BOUNDS.items()
        if getattr(rule, name, None) is not None
    ]
    return ", ".join([spelled(field.annotation), *bounds])


def spelled(annotation: Any) -> str:
    """A type as TOML knows it."""
    names = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): ""}
    if annotation in names:
        return names[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(filter(None, (spelled(item) for item in arguments)))
    if origin is tuple:
        return "list of sources" if arguments[0] is Source else f"list of: {spelled(arguments[0])}"
    if origin is typing.Annotated:
        rules = [rule for extra in arguments[1:] for rule in getattr(extra, "metadata", [])]
        bounds = [f"{sign} {getattr(r, n):g}" for r in rules for n, sign in BOUNDS.items() if hasattr(r, n)]
        return ", ".join([spelled(arguments[0]), *bounds])
    return "table" if origin is dict else str(annotation)


def default_of(field: FieldInfo) -> str:
    """Default of a key as TOML writes it."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    return "not set" if value is None else f"`{toml(value)}`"


def toml(value: Any) -> str:
    """A value in TOML's spelling."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    return re.sub(r"e-0", "e-", f"{value:g}") if isinstance(value, float) else str(value)


def main() -> int:
    """Writes or checks the page."""
    text = page()
    if "--check" in sys.argv[1:]:
        return 0 if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
