"""Commands that train: one run, a comparison, the radius to train with, and the demo."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedeat import terminal
from fedeat.cli.application import ConfigFile, Overrides, choice, parse_radii, prepare_directory, show_rows
from fedeat.errors import FedeatError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def run(
    config_file: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.toml]", help="The configuration; not with --resume.")
    ] = None,
    set_: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run directory. Default: runs/<name of CONFIG>.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Go on with the run in DIR after a kill.")] = None,
    engine: Annotated[
        str, typer.Option(help="Where clients train: in-process, flower-simulation (processes), or flower (nodes).")
    ] = "in-process",
    superlink: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="For flower: of the fedeat serve on this machine.")
    ] = "127.0.0.1:9092",
    keys: Annotated[Path | None, typer.Option(metavar="DIR", help="For flower: what fedeat keys wrote.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="For flower: the server speaks plaintext.")] = False,
) -> None:
    """Run one federation and leave a PEFT adapter.

    Trains the base model's adapter over the configured clients and rounds, evaluates it, and writes a run directory:
    adapter/ (loads with `peft.PeftModel.from_pretrained`), checkpoints/, metrics.jsonl, evaluation.json, report.html.
    A run that was killed goes on from its last finished round, to the same bits as one that never stopped: give the
    same command again, or --resume.

    Example: `fedeat run my.toml --set aggregation.rule=mean --set federation.rounds=3`
    """
    from fedeat import config, experiment, records, report

    if (config_file is None) == (resume is None):
        raise FedeatError("give either CONFIG.toml or --resume DIR. Example: fedeat run my.toml")
    if resume is not None and (set_ or output):
        raise FedeatError("--resume goes on with the configuration in its directory: --set and --out do not apply.")
    choice("--engine", engine, ("in-process", "flower-simulation", "flower"))
    directory = resume or output or Path("runs") / (config_file.stem if config_file else "")
    with terminal.stage_bars() as tell:
        if resume is not None and (engine == "in-process" or records.read_evaluation(resume) is not None):
            rows = experiment.resume(resume, progress=tell)
        elif engine == "flower-simulation":
            from fedeat.flower.simulation import simulate

            logging.getLogger("flwr").setLevel(logging.WARNING)
            settings = config.load(config_file or directory / "config.toml", set_ or ())
            rows = simulate(settings, directory, progress=tell)
        elif engine == "flower":
            raw = config.read(config_file or directory / "config.toml", set_ or ())
            _run_on_nodes(raw, directory, superlink, keys, insecure, tell)
            rows = (records.read_evaluation(directory) or {"rows": []})["rows"]
        else:
            assert config_file is not None
            rows = experiment.run(config.load(config_file, set_ or ()), directory, progress=tell)
    page = report.write_report(directory)
    show_rows(rows)
    terminal.show_places({"adapter": directory / "adapter", "report": page, "run directory": directory})


def _run_on_nodes(
    raw: Mapping[str, Any],
    directory: Path,
    superlink: str,
    keys: Path | None,
    insecure: bool,
    tell: Callable[[str, int, int], None],
) -> None:
    """Submits a run to the server on this machine and waits for it."""
    from fedeat import config
    from fedeat.experiment.inputs import absolute_paths
    from fedeat.flower import quiet

    quiet.require_insecure_or(keys is not None, insecure, "--keys")
    quiet.hush()
    from fedeat.flower import control
    from fedeat.flower.server_app import server_config

    settings = server_config(raw, deployed=True)
    settings = config.with_values(settings, absolute_paths(settings))
    client = control.open_client(superlink, None if keys is None else keys / "ca.pem")
    try:
        number = control.submit(client, config.to_toml(settings), directory.resolve())
        control.follow(client, number, directory, lambda done: tell("rounds", done, settings.federation.rounds))
    finally:
        client.close()


def compare(
    config_file: ConfigFile,
    set_: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory. Default: runs/<name of CONFIG>.")
    ] = None,
) -> None:
    """Run methods x attacks x fractions x seeds: one table, one report (the paper's Tables 2-5).

    The configuration describes FedEAT; its [compare] table says what varies. Finished cells are not run again, so the
    same command goes on after a kill. Writes results.json (one row a cell and task), runs/, report.html, figures/.

    Example: `fedeat compare my.toml --set compare.seeds=[0,1,2] --set compare.processes=2`
    """
    from fedeat import config, report
    from fedeat.experiment import comparison

    directory = output or Path("runs") / config_file.stem
    settings = config.load(config_file, set_ or ())
    try:
        with terminal.grid_bars() as tell:
            rows = comparison.compare(settings, directory, progress=tell)
    except comparison.CellsFailed:
        report.write_report(directory)  # of the cells that finished
        raise
    page = report.write_report(directory)
    show_rows(rows, directory)
    terminal.show_places({"results": directory / "results.json", "report": page, "adapters": directory / "runs"})


def calibrate(
    config_file: ConfigFile,
    set_: Overrides = None,
    output: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where the plot and the figures go.")
    ] = Path("calibration"),
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Calibrate with this adapter in the model.")
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Training examples used, drawn at random.")] = 64,
    radii: Annotated[str, typer.Option(metavar="R,R,...", help="Relative radii to try.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Ascent steps, more than training uses.")] = 10,
) -> None:
    """Find the radius that suits a model: losses and accuracies along a grid of radii.

    A radius is relative to the model's mean token-embedding norm. Writes calibration.json and calibration.png and
    prints the radius it recommends: the largest at which the attack leaves half of the accuracy above chance.

    Example: `fedeat calibrate my.toml --adapter runs/my/adapter --radii 0.02,0.05,0.1`
    """
    import torch

    from fedeat import config, experiment, records, report, seeding
    from fedeat.experiment import calibration
    from fedeat.model import load_model

    tried = parse_radii(radii) or calibration.GRID
    settings = config.load(config_file, set_ or ())
    prepare_directory(output)
    rows = experiment.training_examples(settings)
    pool = [example for example in rows if not example.away]
    if len(pool) < len(rows):
        note = "%d harmful answers left out: there an attack makes the answer likelier, not less likely."
        logging.getLogger(__name__).info(note, len(rows) - len(pool))
    order = torch.randperm(len(pool), generator=seeding.generator(settings.seed, "calibration")).tolist()
    drawn = [pool[i] for i in order[:examples]]
    source = experiment.model_source(settings, pool)
    network = load_model(source, lora=None, adapter=adapter, seed=settings.seed)
    network.check_embeddings()
    with terminal.stage_bars() as tell:
        found = calibration.calibrate(
            network,
            [network.encode(example) for example in drawn],
            tasks=[example.task for example in drawn],
            radii=tried,
            steps=steps,
            norm=settings.perturbation.norm,
            batch_size=settings.client.batch_size,
            seed=settings.seed,
            progress=tell,
        )
    records.write_json(output / "calibration.json", found.record())
    points = [dataclasses.asdict(point) for point in found.points]
    report.calibration_figure(points, found.recommended).savefig(output / "calibration.png", dpi=150)
    terminal.show_calibration(found)
    terminal.show_places({"figures": output / "calibration.json", "plot": output / "calibration.png"})


def demo(
    output: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where everything goes.")] = Path(
        "demo-out"
    ),
) -> None:
    """See it work in minutes: four methods, with and without malicious clients, on a small model that ships along.

    No accelerator, no model hub, no account. Ten clients with skewed data fine-tune a small causal language model of
    a small English world; 30 % of them send scaled, sign-flipped updates in half of the runs. Writes results.json,
    report.html and one run directory a run, each with a PEFT adapter.
    """
    from fedeat import demo as embedded
    from fedeat import report
    from fedeat.experiment import comparison

    settings = embedded.configuration(output)
    with terminal.grid_bars() as tell:
        rows = comparison.compare(settings, output, progress=tell)
    page = report.write_report(output)
    show_rows(rows, output)
    terminal.show_places({"results": output / "results.json", "report": page, "adapters": output / "runs"})
