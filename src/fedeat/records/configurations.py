"""The configuration in a directory beside another one: which keys differ."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_config(path: Path) -> dict[str, Any]:
    """A directory's config.toml; nothing where it is damaged."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return {}


def table(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A table of a configuration; an empty one where there is none or something else, as after an edit by hand."""
    found = config.get(key)
    return found if isinstance(found, Mapping) else {}


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two configurations, sorted; two spellings of one path do not differ."""
    found = []
    for key in sorted({*before, *after}):
        one, other = before.get(key), after.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += [f"{key}.{name}" for name in changed_keys(one, other)]
        elif _resolved(one) != _resolved(other):
            found.append(key)
    return found


def differing(changes: Sequence[str]) -> str:
    """Of changed keys, what an error says in brackets after what they are the keys of; the first few."""
    if not changes:
        return ""
    return f" ({', '.join(changes[:5])}{', ...' if len(changes) > 5 else ''} differ{'s' * (len(changes) == 1)})"


def _resolved(value: Any) -> Any:
    """The same nested value with texts that name a file or a directory as absolute paths."""
    if isinstance(value, str):
        # Not Path.exists(), which raises for a text that is too long to be a path.
        return str(Path(value).resolve()) if os.path.exists(value) else value
    if isinstance(value, Mapping):
        return {key: _resolved(item) for key, item in value.items()}
    return [_resolved(item) for item in value] if isinstance(value, list) else value
