"""The records of a study's runs in one file beside its page: all but the weights, a few kilobytes a run.

Whoever has it computes every figure of the page again without training, and goes on with the study on another machine:
a run counts as finished by its evaluation, which holds its answer to each text.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

FILES = ("config.toml", "environment.json", "evaluation.json", "metrics.jsonl", "partition.json", "timings.jsonl")
"""Of a run."""
ENDING = ".tar.xz"


def pack(file: Path, out: Path, runs: Sequence[Path], others: Iterable[Path], places: Mapping[Path, str]) -> None:
    """Writes the records of runs, the same bytes for the same records.

    Args:
        file: to be written.
        out: directory that all others are in.
        runs: their directories.
        others: files beside runs.
        places: directory -> how configurations and commands are to name it: where it lay is of no use to others.
    """
    paths = [path for run in runs for path in (run / name for name in FILES)]
    found = {path: path.read_text(encoding="utf-8") for path in (*paths, *others) if path.is_file()}
    for path in found:
        if path.name == "config.toml":
            for place, name in places.items():
                found[path] = found[path].replace(f'"{place.as_posix()}/', f'"{name}/')
        elif path.name == "environment.json":
            kept = {key: value for key, value in json.loads(found[path]).items() if key != "command"}
            found[path] = json.dumps(kept, indent=1) + "\n"
    begun = file.with_name(file.name + ".part")
    with tarfile.open(begun, "w:xz", preset=9) as archive:
        for path in sorted(found):
            content = found[path].encode()
            member = tarfile.TarInfo(path.relative_to(out).as_posix())
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    begun.replace(file)


def unpack(file: Path, out: Path, places: Mapping[Path, str]) -> int:
    """Puts the records of runs where they would have been written, but for runs that are there.

    Args:
        file: that `pack` wrote.
        out: directory to put them in.
        places: as `pack` had them, on this machine.

    Returns:
        How many runs it put there.
    """
    try:
        with tarfile.open(file, "r:xz") as archive:
            members = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
            found = {PurePosixPath(name): member.read().decode() for name, member in members.items() if member}
    except (OSError, EOFError, tarfile.TarError, UnicodeDecodeError) as error:
        sys.exit(f"{file} holds no records of runs: {error}. Give the {ENDING} file beside a page.")
    if any(path.is_absolute() or ".." in path.parts for path in found):
        sys.exit(f"{file} names files outside of a study's directory, as no page's records do.")
    for path in found:
        if path.parent == PurePosixPath("base") and (out / path).is_file():
            _require_same_base(file, out / path, found[path])
    there = {path.parent for path in found if (out / path.parent / "evaluation.json").is_file()}
    new = {path.parent for path in found if path.name == "evaluation.json"} - there
    # A run is there from its evaluation on: that comes last.
    for path, text in sorted(found.items(), key=lambda item: item[0].name == "evaluation.json"):
        target = out / path
        if path.parent in there or (path.parent not in new and target.exists()):
            continue
        if path.name == "config.toml":
            for place, name in places.items():
                text = text.replace(f'"{name}/', f'"{place.as_posix()}/')
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return len(new)


def _require_same_base(file: Path, here: Path, text: str) -> None:
    """Ends the program where the base's record, but for its time, differs: its runs would not belong together."""
    first, second = ({**json.loads(record), "seconds": None} for record in (here.read_text(encoding="utf-8"), text))
    if first != second:
        sys.exit(f"{file} holds runs from another base model than {here.parent}. Give another --out.")
