"""Private training from a configuration to its records, and the epsilon it costs."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from fedeat import experiment
from fedeat.config import load
from fedeat.errors import ConfigError
from fedeat.experiment import privacy
from fedeat.updates import ClientUpdate

MakeConfig = Callable[..., Path]
OPACUS = importlib.util.find_spec("opacus") is not None


@pytest.mark.filterwarnings("ignore")  # of Opacus' own imports
def test_epsilon_is_the_accountants_and_grows_with_the_rounds(make_config: MakeConfig, tmp_path: Path) -> None:
    accountants = pytest.importorskip("opacus.accountants")
    section = {"noise_multiplier": 4.0, "clip": 0.1, "delta": 1e-4, "seeded": True}
    settings = {"privacy": section, "client": {"local_epochs": 2}, "evaluation": {"data": []}}
    config = load(make_config(**settings))
    experiment.run(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    clients = [line for line in lines if line["kind"] == "client"]
    for line in clients:
        accountant = accountants.RDPAccountant()
        for _ in range(2 * (line["round"] + 1)):
            accountant.step(noise_multiplier=4.0, sample_rate=1.0)
        assert line["epsilon"] == pytest.approx(accountant.get_epsilon(delta=1e-4))
        # The Gaussian mechanism's bound by zero-concentrated privacy (Bun and Steinke, 2016), which a Renyi one meets.
        rho = 2 * (line["round"] + 1) / (2 * 4.0**2)
        assert line["epsilon"] <= rho + 2 * math.sqrt(rho * math.log(1e4))
        assert "loss" not in line
    rounds = [line for line in lines if line["kind"] == "round"]
    assert rounds[0]["epsilon"] < rounds[1]["epsilon"]
    # Seeded noise is the same again.
    experiment.run(config, tmp_path / "again")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "again" / "metrics.jsonl").read_bytes()


@pytest.mark.usefixtures("accountant")
def test_epsilon_is_the_servers_own_count_of_epochs(make_config: MakeConfig, tmp_path: Path) -> None:
    settings = {"privacy": {"noise_multiplier": 4.0, "seeded": True}, "client": {"local_epochs": 3}}
    config = load(make_config(**settings, evaluation={"data": []}))
    experiment.run(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {(line["kind"], line["round"], line["epsilon"]) for line in lines} == {
        ("round", 0, 3.0),
        ("client", 0, 3.0),
        ("round", 1, 6.0),
        ("client", 1, 6.0),
    }
    assert privacy.spent(load(make_config()), 0) is None
    # No engine reports it, so that none can report less.
    engine = privacy.telling_little(lambda *given: [ClientUpdate(0, {}, 1, {"loss": 1.0, "steps": 2.0})], config)
    assert engine(None, [0], 0)[0].metrics == {"steps": 2.0}


@pytest.mark.skipif(OPACUS, reason="the extra is installed")
def test_without_the_extra_privacy_is_refused_by_its_name(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"fedeat\[privacy\]"):
        load(make_config(privacy={"noise_multiplier": 1.0}))


def test_batches_by_length_are_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="looks at lengths, which privacy forbids"):
        load(make_config(privacy={"noise_multiplier": 1.0}, client={"tokens_per_batch": 100}))
