"""Commands that measure what was trained, and show it: evaluate, attack, refusal, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedeat import terminal
from fedeat.cli.application import (
    AdapterOption,
    BatchSizeOption,
    DtypeOption,
    MaxLengthOption,
    TaskOption,
    TemplateOption,
    choice,
    load,
    parse_radii,
    prepare_output,
    show_rows,
)
from fedeat.errors import FedeatError


def evaluate(
    model: Annotated[str, typer.Option(help="Base model: a local directory or a hub name.")],
    data: Annotated[
        list[Path], typer.Option(metavar="FILE", help="GLUE rows, or original/modified pairs. Repeatable.")
    ],
    files: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="More evaluation files.")] = None,
    adapter: AdapterOption = None,
    task: TaskOption = None,
    scorer: Annotated[
        str, typer.Option(help="likelihood of each answer, or generation judged by its words.")
    ] = "likelihood",
    template: TemplateOption = "auto",
    dtype: DtypeOption = "float32",
    batch_size: BatchSizeOption = 32,
    max_length: MaxLengthOption = None,
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
    from fedeat.evaluation.scoring import Scorer
    from fedeat.experiment import measuring

    choice("--scorer", scorer, ("likelihood", "generation"))
    if output is not None:
        prepare_output(output, [*data, *(files or [])])
    sources = [Source(path=str(path), task=task, limit=limit) for path in [*data, *(files or [])]]
    sets = experiment.evaluation_sets(sources)
    network = load(model, adapter, dtype=dtype, template=template, max_length=max_length)
    sets = experiment.answerable(sets, network.heads if network.kind == "sequence-classification" else None)
    chosen: Scorer = "generation" if scorer == "generation" else "likelihood"
    measuring.tell_cuts(network, sets, chosen)
    with terminal.stage_bars() as tell:
        rows, predictions = evaluation.evaluate(
            network,
            sets,
            scorer=chosen,
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
    show_rows(rows)
    if output is not None:
        records.write_json(output, {"rows": rows, "predictions": predictions})
        terminal.show_places({"rows and predictions": output})


def _adapter_name(adapter: Path) -> str:
    """What a table calls an adapter: its directory, or the run's where that is only called adapter."""
    path = adapter.resolve()
    return path.parent.name if path.name == "adapter" else path.name


def attack(
    data: Annotated[
        list[Path], typer.Option(metavar="FILE", help="GLUE rows, or pairs whose originals are attacked. Repeatable.")
    ],
    kind: Annotated[str, typer.Option(help="typos, substitution, distraction, adaptive or embedding.")],
    output: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.json", help="Where the pairs, or a curve, go.")],
    model: Annotated[
        str | None, typer.Option(help="Base model; typos and distraction need none. A directory or a hub name.")
    ] = None,
    adapter: AdapterOption = None,
    task: TaskOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Texts used of each file, drawn at random.")] = None,
    rate: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of a text's words changed at most.")] = 0.15,
    budget: Annotated[int, typer.Option(min=1, help="adaptive: times the model is asked about a text at most.")] = 300,
    radii: Annotated[str, typer.Option(metavar="R,R,...", help="embedding: relative radii.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="embedding: ascent steps, more than training used.")] = 20,
    restarts: Annotated[int, typer.Option(min=1, help="embedding: starts of each attack.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    template: TemplateOption = "auto",
    dtype: DtypeOption = "float32",
    batch_size: BatchSizeOption = 32,
    max_length: MaxLengthOption = None,
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

    choice("--kind", kind, attacking.KINDS)
    if model is None and kind not in attacking.WITHOUT_MODEL:
        raise FedeatError(f"--kind {kind} needs --model: it looks into the model or asks it.")
    if kind == "embedding" and output.suffix == ".png":
        raise FedeatError(f"--out {output}: expected the curve's file, such as curve.json; its plot is put beside it.")
    prepare_output(output, data)
    sets = experiment.evaluation_sets([Source(path=str(path), task=task) for path in data])
    network = None
    if model is not None and kind not in attacking.WITHOUT_MODEL:
        network = load(model, adapter, dtype=dtype, template=template, max_length=max_length)
        sets = experiment.answerable(sets, network.heads if network.kind == "sequence-classification" else None)
    items = attacking.texts_of(sets, limit=limit)
    with terminal.stage_bars() as tell:
        if kind == "embedding":
            assert network is not None
            curve = attacking.curve(
                network,
                items,
                radii=parse_radii(radii) or RADII,
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


def refusal(
    model: Annotated[str, typer.Option(help="Base model, a causal language model: a directory or a hub name.")],
    data: Annotated[
        list[Path], typer.Option(metavar="FILE", help="Requests: AdvBench's, HarmBench's, or a column prompt.")
    ],
    adapter: AdapterOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Requests used of each file, the first ones.")] = None,
    radii: Annotated[str, typer.Option(metavar="R,R,...", help="Relative radii of the attack.")] = "0.05,0.1",
    steps: Annotated[int, typer.Option(min=1, help="Ascent steps of the attack.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of the spelling errors.")] = 0,
    template: TemplateOption = "auto",
    dtype: DtypeOption = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 16,
    max_length: MaxLengthOption = None,
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

    if output is not None:
        prepare_output(output, data)
    behaviours = [item for path in data for item in read_behaviours(path)[:limit]]
    network = load(model, adapter, dtype=dtype, template=template, max_length=max_length)
    with terminal.stage_bars() as tell:
        rates = refusal_rates(
            network,
            behaviours,
            radii=parse_radii(radii),
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            progress=lambda done, total: tell("evaluate", done, total),
        )
    found = [rate.record() for rate in rates]
    terminal.show_refusals(found)
    if output is not None:
        records.write_json(output, found)
        terminal.show_places({"rates": output})


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
