"""A run's directory: what was asked, what happened, and the state from which a killed run goes on.

    config.toml          the resolved configuration
    environment.json     versions, processor, threads, command
    partition.json       which client holds how much of what
    metrics.jsonl        a line a round and a client; finite JSON; no clock, so that a resumed run writes the same bytes
    timings.jsonl        seconds and peak memory a round
    adapter/             the newest global adapter, in PEFT's format
    checkpoints/         round-0000/, ...: the adapter after that round and how long metrics.jsonl was then
    evaluation.json      the table's rows and the predictions they were computed from

Whatever state a run goes on from is written beside its place and renamed, so that a kill at any instant leaves the old
state or the new one.

run_directory     writing into it and reading its checkpoints, by one process at a time
contents          what a directory holds, and whether a run of a configuration may go on there
configurations    in which keys two configurations differ
versions          what a run is made with: packages, processor, threads, command
files             text and JSON written in one step, and line after line
"""

from fedeat.records.configurations import changed_keys, differing, read_config, table
from fedeat.records.contents import check, has_results, is_settled, kind_of, read_evaluation
from fedeat.records.files import finite, make_directory, write_json, write_text
from fedeat.records.run_directory import Checkpoint, RunDirectory
from fedeat.records.versions import ENVIRONMENT, environment, threads_before

__all__ = [
    "ENVIRONMENT",
    "Checkpoint",
    "RunDirectory",
    "changed_keys",
    "check",
    "differing",
    "environment",
    "finite",
    "has_results",
    "is_settled",
    "kind_of",
    "make_directory",
    "read_config",
    "read_evaluation",
    "table",
    "threads_before",
    "write_json",
    "write_text",
]
