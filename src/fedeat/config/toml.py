"""A configuration's way in and out: TOML in, frozen values out, every problem reported at once.

    task = "causal-lm"
    [model]
    name = "google/gemma-1.1-2b-it"
    [data]
    train = ["alpaca.jsonl"]

Everything else has a default. `docs/configuration.md` lists each key with its range and default.
"""

from __future__ import annotations

import difflib
import json
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from fedeat.config.consistency import contradictions
from fedeat.config.schema import Config
from fedeat.errors import ConfigError


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file, applies `key=value` overrides, and checks everything; as `read`, and then `parse`.

    Raises:
        ConfigError: with every problem found.
    """
    return parse(read(path, overrides), source=str(path))


def read(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a TOML file and applies `key=value` overrides.

    Args:
        path: the file.
        overrides: dotted keys with TOML values, such as `aggregation.rule=mean`; a bare word is a string.

    Raises:
        ConfigError: it cannot be read, or an override makes no sense.
    """
    if path.is_dir():
        raise ConfigError(["it is a directory. Expected a TOML file."], source=str(path))
    if not path.exists():
        raise ConfigError(
            [f"the file does not exist. Check the path; a relative one starts at {Path.cwd()}."], source=str(path)
        )
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"it is not valid TOML: {error}."], source=str(path)) from None
    except OSError as error:
        raise ConfigError([f"it cannot be read: {error.strerror}."], source=str(path)) from None
    return override(raw, overrides)


def parse(raw: Mapping[str, Any], *, source: str = "configuration") -> Config:
    """Validates a nested mapping.

    Raises:
        ConfigError: with every problem found: unknown keys, wrong values, missing files, and keys that do not fit
            together.
    """
    remaining: dict[str, Any] = _copy(raw)
    problems: dict[str, str] = {}
    config: Config | None = None
    # What is wrong is taken out and the rest is checked again, so that one wrong key does not hide a missing file.
    while config is None:
        try:
            # As JSON: there a list may stand for a tuple although numbers must be numbers.
            config = Config.model_validate_json(json.dumps(remaining, default=str))
        except ValidationError as error:
            for item in error.errors():
                _note(problems, item)
            _take_out(remaining, [item["loc"] for item in error.errors()])
            # Nothing else is required at the top. The name is not on disk, and is no one's once a problem is noted.
            _set(remaining, ("model", "name"), remaining.get("model", {}).get("name", "missing"))
    # A key that is wrong by itself stands at its default now, which is nobody's contradiction.
    noted = {key.partition("[")[0] for key in problems}
    found = [*problems.values(), *(text for text in contradictions(config) if text.partition(" ")[0] not in noted)]
    if found:
        raise ConfigError(found, source=source)
    return config if config.method else config.model_copy(update={"method": _method(config)})


def _method(config: Config) -> str:
    """The paper's name for what a configuration does, or the parts it is made of."""
    kind = config.perturbation.kind
    rule = "+".join([*config.aggregation.before, config.aggregation.rule])  # a mean of clipped updates is no FedAvg
    names = {
        (True, "mean"): "fedavg",
        (False, "mean"): "eat",
        (True, "geometric_median"): "gm",
        (False, "geometric_median"): "fedeat",
    }
    return names.get((kind == "none", rule), rule if kind == "none" else f"{kind}+{rule}")


def override(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `raw` with dotted `key=value` entries set.

    Raises:
        ConfigError: an entry has no `=`, its value is a broken list, table or quoted text, or its key runs through a
            value that is not a table.
    """
    result: dict[str, Any] = _copy(raw)
    problems = []
    for entry in overrides:
        key, equals, text = entry.partition("=")
        if not equals or not key.strip():
            problems.append(f"--set {entry}: expected key=value, such as aggregation.rule=mean.")
        elif (value := _value(text.strip())) is None:
            example = 'compare.methods=["gm", "fedeat"]'
            problems.append(
                f"--set {entry}: what begins with [, {{ or a quote must be TOML, and this is not. Quote each text in "
                f"it, and the whole for the shell: --set '{example}'."
            )
        elif not _set(result, key.strip().split("."), value):
            problems.append(f"--set {entry}: {key.strip()!r} runs through a key that is not a table.")
    if problems:
        raise ConfigError(problems, source="--set")
    return result


def with_values(config: Config, values: Mapping[str, Any], *, source: str = "configuration") -> Config:
    """A configuration with dotted keys changed, checked again.

    Args:
        config: left as it is.
        values: dotted key -> value; None leaves the key at its default.
        source: what a problem is said to be in.

    Raises:
        ConfigError: the result has problems.
    """
    raw = config.model_dump(mode="json", exclude_none=True)
    problems = []
    for key, value in values.items():
        if value is None:
            *tables, name = key.split(".")
            here: Any = raw
            for table in tables:
                here = here.get(table, {}) if isinstance(here, dict) else {}
            if isinstance(here, dict):
                here.pop(name, None)
        elif not _set(raw, key.split("."), _copy(value)):
            problems.append(f"{key}: runs through a key that is not a table.")
    if problems:
        raise ConfigError(problems, source=source)
    return parse(raw, source=source)


def to_toml(config: Config) -> str:
    """The resolved configuration, each key with the value used; keys that are not set are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _note(problems: dict[str, str], item: Any) -> None:
    """Adds one pydantic error as what, expected, got; a key that may be of two types has an error for each."""
    path, known = _locate(item["loc"])
    key = ".".join(path)
    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Expected one of {', '.join(known)}."
        problems.setdefault(key, f"{key}: unknown key. {hint}")
    elif item["type"] == "missing":
        if not any(other == key or key.startswith(f"{other}.") for other in problems):
            problems[key] = f"{key}: required, and not set."
    else:
        expected = item["msg"][0].lower() + item["msg"][1:]
        for foreign, ours in (("array", "list"), ("an object", "a table"), ("valid dictionary", "table")):
            expected = expected.replace(foreign, ours)
        so_far = problems.get(key)
        if so_far is None:
            problems[key] = f"{key}: {expected}, got {_shown(item['input'])}."
        elif expected.removeprefix("input should be ") not in so_far:
            before, got, after = so_far.rpartition(", got ")
            problems[key] = f"{before} or {expected.removeprefix('input should be ')}{got}{after}"


def _locate(location: Sequence[str | int]) -> tuple[list[str], list[str]]:
    """The part of a pydantic location that a person wrote, and the keys known where its last part stands."""
    path: list[str] = []
    section: Any = Config
    known = sorted(Config.model_fields)
    for part in location:
        if isinstance(part, int):
            path[-1] += f"[{part}]"
            continue
        if section is None:
            break  # what follows is pydantic's own, such as the branch of a union
        path.append(part)
        known = sorted(section.model_fields)
        field = section.model_fields.get(part)
        section = None if field is None else _section_of(field.annotation)
    if location[:2] in (("compare", "variants"), ("compare", "scales")):
        path += [str(part) for part in location[len(path) :] if part != "[key]"]
    return path, known


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The table that a key holds, or of which it holds a list; None for a value."""
    candidates = [annotation, *typing.get_args(annotation)]
    return next((item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)), None)


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)


def _value(text: str) -> Any:
    """A TOML value, or a bare word as a text; None for a list, a table or a quoted text that is broken."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return None if text.startswith(("[", "{", '"', "'")) else text


def _set(table: dict[str, Any], path: Sequence[str], value: Any) -> bool:
    for part in path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            return False
    table[path[-1]] = value
    return True


def _take_out(table: dict[str, Any], locations: Sequence[tuple[str | int, ...]]) -> None:
    """Removes what stands at each location, or the innermost that is there."""
    doomed: set[tuple[str | int, ...]] = set()
    for location in locations:
        here: Any = table
        place: tuple[str | int, ...] = ()
        for part in location:
            is_inside = part in here if isinstance(here, dict) else isinstance(here, list) and isinstance(part, int)
            if not is_inside:
                break
            here, place = here[part], (*place, part)
        if place:
            doomed.add(place)
    # The last elements of a list first: the indices of those before them stay.
    for place in sorted(doomed, key=lambda place: [str(part).zfill(9) for part in place], reverse=True):
        here = table
        for part in place[:-1]:
            here = here[part]
        del here[place[-1]]


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value
