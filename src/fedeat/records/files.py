"""Files as records keep them: written beside their place and renamed, or line after line, in finite JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedeat.errors import RecordError


def make_directory(path: Path) -> None:
    """Makes a directory and those above it, where they do not exist.

    Raises:
        RecordError: something else has its name, or it may not be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise RecordError(f"{path} is, or lies in, a file. Expected a directory; choose another place.") from None
    except OSError as error:
        raise RecordError(f"directory {path} cannot be made: {error.strerror}. Choose another place.") from None


def write_json(path: Path, value: Any) -> None:
    """Writes finite JSON in one step; numbers that are not finite become null."""
    write_text(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file beside its place and renames it, so that a reader sees the old text or the new."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    sync(fresh)
    fresh.replace(path)


def finite(value: Any) -> Any:
    """The same nested value with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def append_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Adds lines of finite JSON to a file, and returns when they are on disk."""
    text = "".join(json.dumps(finite(line), allow_nan=False) + "\n" for line in lines)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Has a file's content, or a directory's entries, written to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
