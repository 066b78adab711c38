"""The command line: parse, call one function, print what came out.

Heavy imports wait until a command runs, so that help is quick.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedeat import terminal
from fedeat.errors import FedeatError, explanation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from fedeat.evaluation import Row
    from fedeat.model import AdaptedModel

app = typer.Typer(
    name="fedeat",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Robust federated fine-tuning of large language models.

Clients train LoRA adapters on worst-case perturbations of the input embeddings; the server takes the geometric median
of their updates. One run: `fedeat run`. The paper's ablation: `fedeat compare`. To see it work at once: `fedeat demo`.
""",
    epilog="Exit codes: 0 done; 1 a defect of fedeat; 2 something given was wrong, the message says what; 130 stopped "
    "with Ctrl-C.",
)

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG.toml", help="The configuration; docs/configuration.md lists its keys.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as `aggregation.rule=mean`. Repeatable."),
]


@app.command()
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
    _choice("--engine", engine, ("in-process", "flower-simulation", "flower"))
    directory = resume or output or Path("runs") / (config_file.stem if config_file else "")
    with terminal.stage_bars() as tell:
        if engine == "flower-simulation":
            from fedeat.flower.simulation import simulate

            logging.getLogger("flwr").setLevel(logging.WARNING)
            settings = config.load(config_file or directory / "config.toml", set_ or ())
            rows = simulate(settings, directory, progress=tell)
        elif engine == "flower":
            raw = config.read(config_file or directory / "config.toml", set_ or ())
            _run_on_nodes(raw, directory, superlink, keys, insecure, tell)
            rows = (records.read_evaluation(directory) or {"rows": []})["rows"]
        elif resume is not None:
            rows = experiment.resume(resume, progress=tell)
        else:
            assert config_file is not None
            rows = experiment.run(config.load(config_file, set_ or ()), directory, progress=tell)
    page = report.write_report(directory)
    _show(rows)
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


@app.command()
def keys(
    output: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the keys go.")] = Path("keys"),
    server: Annotated[bool, typer.Option("--server", help="Make the authority and the server's certificate.")] = False,
    host: Annotated[
        list[str] | None, typer.Option(help="Name or address by which nodes reach the server. Repeatable.")
    ] = None,
    node: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Make a node's key pair. Repeatable.")] = None,
) -> None:
    """Make the keys of a federation: an authority and a server certificate, and a key pair for each node.

    A node may make its own pair and send only nodes/NAME.pub; the server registers what lies in its nodes/ directory.

    Example: `fedeat keys --server --host federation.example.org`, and on a node `fedeat keys --node clinic-a`
    """
    if not server and not node:
        raise FedeatError("nothing to make: give --server, --node NAME, or both.")
    from fedeat.flower import quiet

    quiet.hush()
    from fedeat.flower import keys as make

    written = make.make_server_keys(output, host or ()) if server else []
    for name in node or ():
        written += make.make_node_key(output, name)
    terminal.show_places({path.name: path for path in written})


@app.command()
def serve(
    keys: Annotated[Path | None, typer.Option(metavar="DIR", help="What fedeat keys --server wrote.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 for all, where only nodes are served.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 9092,
    state: Annotated[Path, typer.Option(metavar="DIR", help="Where state and logs go.")] = Path("server-state"),
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Plaintext, and anybody who reaches the port may join as a client.")
    ] = False,
) -> None:
    """Run the server of a federation until Ctrl-C: nodes join it, and `fedeat run --engine flower` runs on them.

    State is on disk: a process that is killed is started again and goes on. Put a node's public key into DIR/nodes and
    it may join.

    Example: `fedeat serve --keys keys --host 0.0.0.0`
    """
    from fedeat.flower import quiet

    quiet.require_insecure_or(keys is not None, insecure, "--keys")
    quiet.hush()
    from fedeat.flower import deployment

    deployment.serve(deployment.Server(state, keys, host, port), terminal.show_note)


@app.command()
def join(
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="Of the server.")],
    data: Annotated[list[Path], typer.Option(metavar="FILE", help="This node's own data. Repeatable.")],
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="This node's private key.")] = None,
    ca: Annotated[Path | None, typer.Option(metavar="FILE", help="The federation's ca.pem.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model here; by default where the server's configuration says.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="sst2, qqp, ..., where the data's columns do not tell.")] = None,
    state: Annotated[Path, typer.Option(metavar="DIR", help="Where logs and state go.")] = Path("node-state"),
    share_counts: Annotated[
        bool, typer.Option("--share-counts", help="Tell the server how many examples of each label are here.")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Plaintext and no authentication: everybody on the way reads adapters.")
    ] = False,
) -> None:
    """Join a federation with this machine's data until Ctrl-C. The data stays here.

    The base model is loaded once, by a worker that is started again when it dies. No code that the server sends is run.

    Example: `fedeat join --superlink federation.example.org:9092 --key clinic-a.key --ca ca.pem --data notes.jsonl`
    """
    from fedeat.flower import quiet

    quiet.require_insecure_or(key is not None and ca is not None, insecure, "--key and --ca")
    quiet.hush()
    from fedeat.flower import deployment

    silo = deployment.Silo(superlink, tuple(data), state, key, ca, task, model, share_counts)
    deployment.join(silo, terminal.show_note)


@app.command()
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
    _show(rows, directory)
    terminal.show_places({"results": directory / "results.json", "report": page, "adapters": directory / "runs"})


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="Base model: a local directory or a hub name.")],
    data: Annotated[
        list[Path], typer.Option(metavar="FILE", help="GLUE rows, or original/modified pairs. Repeatable.")
    ],
    files: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="More evaluation files.")] = None,
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="PEFT adapter directory.")] = None,
    task: Annotated[
        str | None, typer.Option(help="sst2, qqp, mnli, qnli or rte, where the columns do not tell.")
    ] = None,
    scorer: Annotated[
        str, typer.Option(help="likelihood of each answer, or generation judged by its words.")
    ] = "likelihood",
    template: Annotated[str, typer.Option(help="auto, alpaca, chat or plain.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts a forward pass.")] = 32,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens a prompt may have. Default: 512, or what the model was made for.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Benign rows used of each file, drawn at random.")] = None,
    output: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.json", help="Also write rows and predictions.")
    ] = None,
) -> None:
    """Accuracy and attack success rate of a model, with counts and 95 % intervals.

    Reads TrustLLM's AdvGLUE JSON, AdvGLUE dev with its originals, and GLUE rows (JSON, JSON lines, CSV, Parquet, also
    gzipped). ASR = wrong on the modified text / right on the original. A model that gives one answer to nearly
    everything is flagged: its ASR means nothing.

    Example: `fedeat evaluate --model M --adapter runs/my/adapter --data advglue.json --data sst2_dev.jsonl`
    """
    from fedeat import evaluation, experiment, records
    from fedeat.config import Source

    _choice("--scorer", scorer, ("likelihood", "generation"))
    sources = [Source(path=str(path), task=task, limit=limit) for path in [*data, *(files or [])]]
    sets = experiment.evaluation_sets(sources)
    network = _load(model, adapter, dtype=dtype, template=template, max_length=max_length)
    sets = experiment.answerable(sets, network.heads if network.kind == "sequence-classification" else None)
    with terminal.stage_bars() as tell:
        rows, predictions = evaluation.evaluate(
            network,
            sets,
            scorer="generation" if scorer == "generation" else "likelihood",
            batch_size=batch_size,
            progress=lambda done, total: tell("evaluate", done, total),
        )
    named = {
        "method": "base" if adapter is None else _adapter_name(adapter),
        "attack": "none",
        "byzantine_fraction": 0.0,
        "seed": 0,
    }
    rows = [{**named, **row} for row in rows]
    _show(rows)
    if output is not None:
        records.make_directory(output.resolve().parent)
        records.write_json(output, {"rows": rows, "predictions": predictions})
        terminal.show_places({"rows and predictions": output})


@app.command()
def attack(
    data: Annotated[
        list[Path], typer.Option(metavar="FILE", help="GLUE rows, or pairs whose originals are attacked. Repeatable.")
    ],
    kind: Annotated[str, typer.Option(help="typos, substitution, distraction, adaptive or embedding.")],
    output: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.json", help="Where the pairs, or a curve, go.")],
    model: Annotated[
        str | None, typer.Option(help="Base model; typos and distraction need none. A directory or a hub name.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="PEFT adapter directory.")] = None,
    task: Annotated[
        str | None, typer.Option(help="sst2, qqp, mnli, qnli or rte, where the columns do not tell.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Texts used of each file, drawn at random.")] = None,
    rate: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of a text's words changed at most.")] = 0.15,
    budget: Annotated[int, typer.Option(min=1, help="adaptive: times the model is asked about a text at most.")] = 300,
    radii: Annotated[str, typer.Option(metavar="R,R,...", help="embedding: relative radii.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="embedding: ascent steps, more than training used.")] = 20,
    restarts: Annotated[int, typer.Option(min=1, help="embedding: starts of each attack.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    template: Annotated[str, typer.Option(help="auto, alpaca, chat or plain.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts a forward pass.")] = 32,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens a prompt may have. Default: 512, or what the model was made for.")
    ] = None,
) -> None:
    """Attack texts: new original/modified pairs, or the robust accuracy along the radius.

    Writes pairs in TrustLLM's schema, which `fedeat evaluate` reads; `substitution` takes near words of the model's
    embedding table, `adaptive` asks the model which words to change. `embedding` perturbs embeddings, by FGSM, PGD and
    at random, and writes a curve and its picture.

    Example: `fedeat attack --model M --adapter runs/my/adapter --data sst2_dev.jsonl --kind adaptive --out pairs.json`
    """
    from fedeat import experiment, records, report
    from fedeat.attacks.embedding import RADII
    from fedeat.config import Source
    from fedeat.experiment import attacking

    _choice("--kind", kind, attacking.KINDS)
    if model is None and kind not in attacking.WITHOUT_MODEL:
        raise FedeatError(f"--kind {kind} needs --model: it looks into the model or asks it.")
    sets = experiment.evaluation_sets([Source(path=str(path), task=task) for path in data])
    network = None
    if model is not None and kind not in attacking.WITHOUT_MODEL:
        network = _load(model, adapter, dtype=dtype, template=template, max_length=max_length)
        sets = experiment.answerable(sets, network.heads if network.kind == "sequence-classification" else None)
    items = attacking.texts_of(sets, limit=limit)
    records.make_directory(output.resolve().parent)
    with terminal.stage_bars() as tell:
        if kind == "embedding":
            assert network is not None
            curve = attacking.curve(
                network,
                items,
                radii=_radii(radii) or RADII,
                steps=steps,
                restarts=restarts,
                batch_size=batch_size,
                seed=seed,
                progress=tell,
            )
            records.write_json(output, curve)
            report.robustness_figure(curve["points"]).savefig(output.with_suffix(".png"), dpi=150)
        else:
            found = attacking.attack_texts(
                kind, items, network, rate=rate, budget=budget, batch_size=batch_size, seed=seed, progress=tell
            )
            records.write_json(output, attacking.pair_rows(found))
    if kind == "embedding":
        terminal.show_curve(curve)
        terminal.show_places({"curve": output, "plot": output.with_suffix(".png")})
    else:
        terminal.show_attack(found)
        terminal.show_places({"pairs": output})


@app.command()
def refusal(
    model: Annotated[str, typer.Option(help="Base model, a causal language model: a directory or a hub name.")],
    data: Annotated[
        list[Path], typer.Option(metavar="FILE", help="Requests: AdvBench's, HarmBench's, or a column prompt.")
    ],
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="PEFT adapter directory.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Requests used of each file, the first ones.")] = None,
    radii: Annotated[str, typer.Option(metavar="R,R,...", help="Relative radii of the attack.")] = "0.05,0.1",
    steps: Annotated[int, typer.Option(min=1, help="Ascent steps of the attack.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of the spelling errors.")] = 0,
    template: Annotated[str, typer.Option(help="auto, alpaca, chat or plain.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 16,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens a prompt may have. Default: 512, or what the model was made for.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.json", help="Also write the rates.")
    ] = None,
) -> None:
    """How often harmful requests are refused: as they are, misspelt, and with their embeddings attacked.

    Measures a defence: judged by the usual list of refusal phrases. No harmful text ships with this package, none is
    made, and the answers are not kept.

    Example: `fedeat refusal --model M --adapter runs/my/adapter --data harmful_behaviors.csv --limit 100`
    """
    from fedeat import records
    from fedeat.attacks.refusal import refusal_rates
    from fedeat.evaluation.refusal import read_behaviours

    behaviours = [item for path in data for item in read_behaviours(path)[:limit]]
    network = _load(model, adapter, dtype=dtype, template=template, max_length=max_length)
    with terminal.stage_bars() as tell:
        rates = refusal_rates(
            network,
            behaviours,
            radii=_radii(radii),
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            progress=lambda done, total: tell("evaluate", done, total),
        )
    found = [rate.record() for rate in rates]
    terminal.show_refusals(found)
    if output is not None:
        records.make_directory(output.resolve().parent)
        records.write_json(output, found)
        terminal.show_places({"rates": output})


@app.command()
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

    settings = config.load(config_file, set_ or ())
    pool = experiment.training_examples(settings)
    order = torch.randperm(len(pool), generator=seeding.generator(settings.seed, "calibration")).tolist()
    source = experiment.model_source(settings, pool)
    network = load_model(source, lora=None, adapter=adapter, seed=settings.seed)
    network.check_embeddings()
    with terminal.stage_bars() as tell:
        found = calibration.calibrate(
            network,
            [network.encode(pool[i]) for i in order[:examples]],
            radii=_radii(radii) or calibration.GRID,
            steps=steps,
            norm=settings.perturbation.norm,
            batch_size=settings.client.batch_size,
            seed=settings.seed,
            progress=tell,
        )
    records.make_directory(output)
    records.write_json(output / "calibration.json", found.record())
    points = [dataclasses.asdict(point) for point in found.points]
    report.calibration_figure(points, found.recommended).savefig(output / "calibration.png", dpi=150)
    terminal.show_calibration(found)
    terminal.show_places({"figures": output / "calibration.json", "plot": output / "calibration.png"})


@app.command("report")
def report_(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run or comparison directories.")],
    output: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="For several directories: where their common page goes."),
    ] = None,
) -> None:
    """Write the HTML page, the PNG figures and the CSV tables again, from the records alone.

    One directory gets its page in its own place; several get one page together under --out.

    Example: `fedeat report runs/a runs/b --out runs/both`
    """
    from fedeat import report

    if len(directories) == 1 and output is None:
        page = report.write_report(directories[0])
    elif output is None:
        raise FedeatError("several directories need --out DIR, the place of their common page.")
    else:
        page = report.write_report_for(directories, output)
    terminal.show_places({"report": page})


@app.command()
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
    _show(rows, output)
    terminal.show_places({"results": output / "results.json", "report": page, "adapters": output / "runs"})


def main() -> None:
    """Entry point: prints what went wrong in one message, without a traceback, and exits with the code for it."""
    _quieten()
    try:
        with terminal.notes():
            app()
    except FedeatError as error:
        terminal.show_error(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        _stopped()
    except SystemExit as leaving:
        if leaving.code == _STOPPED:  # typer turns Ctrl-C into this, and says nothing
            _stopped()
        raise
    except Exception as error:
        known = explanation(error)
        if known is not None:
            terminal.show_error(known)
            sys.exit(2)
        if os.environ.get("FEDEAT_TRACEBACK"):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        terminal.show_error(
            f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno}). This is a defect of "
            "fedeat, not of what you gave it. Please report it, with what FEDEAT_TRACEBACK=1 in front shows."
        )
        sys.exit(1)


_STOPPED = 130


def _stopped() -> None:
    terminal.err.print("stopped. A run or a comparison goes on where it was when the same command is given again.")
    sys.exit(_STOPPED)


def _show(rows: Sequence[Row], comparison: Path | None = None) -> None:
    from fedeat import report

    if rows:
        report.print_tables(rows, terminal.out, None if comparison is None else report.differences_in(comparison))
    else:
        terminal.out.print("Nothing was evaluated: evaluation.data is empty.")


def _load(model: str, adapter: Path | None, *, dtype: str, template: str, max_length: int | None) -> AdaptedModel:
    from fedeat.model import ModelSource, load_model

    _choice("--template", template, ("auto", "alpaca", "chat", "plain"))
    _choice("--dtype", dtype, ("float32", "bfloat16", "float16"))
    length = max_length or int(min(512, _positions(model)))
    source = ModelSource(model, dtype=dtype, template=template, max_length=length)
    return load_model(source, lora=None, adapter=adapter)


def _positions(model: str) -> float:
    """How many tokens a model was made for, infinity where it does not say or cannot be read."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(model).get_text_config()
    except Exception:  # loading the model says what is wrong with it
        return math.inf
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else math.inf


def _adapter_name(adapter: Path) -> str:
    """What a table calls an adapter: its directory, or the run's where that is only called adapter."""
    path = adapter.resolve()
    return path.parent.name if path.name == "adapter" else path.name


def _radii(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        values = (0.0,)
    if any(not 0 < value < float("inf") for value in values):
        raise FedeatError(f"--radii {text}: expected positive numbers with commas between, such as 0.02,0.05,0.1.")
    return values


def _choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise FedeatError(f"{option} {value}: expected one of {', '.join(allowed)}.")


def _quieten() -> None:
    """Keeps other libraries' notes out of the terminal; what a person must know, our own messages say."""
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


if __name__ == "__main__":
    main()
