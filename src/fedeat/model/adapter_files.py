"""An adapter directory: PEFT's two files, and a third with what PEFT does not keep.

Each file is replaced in one step, so that a reader, or a run that is killed, meets the old one or the new one; and
the same adapter gives the same bytes.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from safetensors.torch import save

from fedeat.errors import ModelError
from fedeat.model.loading import ModelSource, attempt
from fedeat.updates import Adapter

_log = logging.getLogger(__name__)

SIDECAR = "fedeat.json"
"""Beside PEFT's two files in an adapter directory: what PEFT does not keep (template, heads, maximum length)."""


def write_adapter(directory: Path, adapter: Adapter, config: PeftConfig, sidecar: Mapping[str, Any]) -> None:
    """Writes an adapter so that plain `PeftModel.from_pretrained` loads it.

    Args:
        directory: made where it does not exist.
        adapter: the tensors, in PEFT's names.
        config: PEFT's.
        sidecar: JSON values that PEFT does not keep.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # PEFT itself writes sets as lists in an order that changes from process to process.
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    values["inference_mode"] = True
    _replace(directory / "adapter_config.json", json.dumps(values, indent=2, sort_keys=True).encode())
    _replace(directory / SIDECAR, (json.dumps(dict(sidecar), indent=2) + "\n").encode())
    tensors = {name: adapter[name].contiguous() for name in sorted(adapter)}
    _replace(directory / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))


def read_adapter(base: Any, directory: Path) -> PeftModel:
    """The base with a saved LoRA adapter in it, trainable.

    Raises:
        ModelError: the directory holds no adapter, or one that is not LoRA or was made for another model.
    """
    _require_adapter(directory)
    config = attempt(f"adapter {directory}", lambda: PeftConfig.from_pretrained(str(directory)))
    if config.peft_type != "LORA":
        raise ModelError(f"adapter {directory} is of PEFT's type {config.peft_type}. Expected LORA.")
    made_for, name = str(config.base_model_name_or_path or ""), str(base.name_or_path)
    of = f", {made_for}" if made_for else ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            network = attempt(
                f"adapter {directory}", lambda: PeftModel.from_pretrained(base, str(directory), is_trainable=True)
            )
        except ModelError as error:
            if "size mismatch" not in str(error.__cause__):
                raise
            raise ModelError(
                f"adapter {directory} was made for another model{of}: its tensors have other shapes than the "
                f"{type(base).__name__} {name} needs. Give the base model that it was trained on."
            ) from None
    # PEFT only warns of tensors that an adapter for another model lacks here, and leaves them fresh.
    missing = [str(warning.message) for warning in caught if "missing adapter keys" in str(warning.message)]
    if missing:
        raise ModelError(f"adapter {directory} was not made for {type(base).__name__}: {missing[0][:300]}")
    if made_for and not _are_one_place(made_for, name):
        _log.warning(
            "adapter %s was made for the base model %s, and this is %s. Unless they are the same, its answers mean "
            "nothing.",
            directory, made_for, name,
        )  # fmt: skip
    return network


def with_sidecar(source: ModelSource, directory: Path) -> ModelSource:
    """The source with what an adapter was trained with: kind, heads, maximum length, and the template where "auto".

    Raises:
        ModelError: the directory holds no adapter, or a broken sidecar.
    """
    _require_adapter(directory)
    path = directory / SIDECAR
    if not path.is_file():
        return source
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        template = kept["template"] if source.template == "auto" and kept["template"] else source.template
        return replace(
            source,
            kind=kept["kind"],
            template=template,
            max_length=kept["max_length"],
            heads=kept["heads"] or source.heads,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} is broken: {type(error).__name__}: {error}. Expected what `fedeat run` wrote; without this file "
            "the adapter is read as PEFT alone would."
        ) from None


def _are_one_place(first: str, second: str) -> bool:
    """Whether two names of models are one hub name or one directory."""
    return first == second or Path(first).resolve() == Path(second).resolve()


def _require_adapter(directory: Path) -> None:
    if not (directory / "adapter_config.json").is_file():
        raise ModelError(
            f"{directory} is not an adapter directory: it holds no adapter_config.json. Expected what "
            "`fedeat run` leaves under adapter/, or what PEFT's save_pretrained wrote."
        )


def _replace(path: Path, content: bytes) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(content)
    fresh.replace(path)
