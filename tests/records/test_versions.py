"""What a run says it was made with."""

from __future__ import annotations

import json

import torch

from fedeat import records


def test_the_environment_is_json_with_versions() -> None:
    found = json.loads(json.dumps(records.environment(3)))
    assert found["threads"] == 3
    assert found["torch"] == torch.__version__
    assert {"fedeat", "python", "transformers", "peft", "platform", "cpu", "command"} <= found.keys()
