"""The command line as a person meets it: what it does, and one message without a traceback for what it cannot do."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import peft
import pytest
import transformers

from fedeat import __version__, cli, experiment, terminal
from fedeat.errors import explanation

MakeConfig: TypeAlias = Callable[..., Path]
Fedeat: TypeAlias = Callable[..., tuple[int, str, str]]
hf: Any = transformers
COMMANDS = ("run", "compare", "evaluate", "attack", "refusal", "calibrate", "report", "demo")


@pytest.fixture
def fedeat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Fedeat:
    """Runs a command in this process, in an empty directory; returns exit code, stdout, stderr."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedeat", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 0
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def refused(result: tuple[int, str, str], *expected: str) -> None:
    """The command exited with 2 and one message that says all this."""
    code, out, err = result
    assert code == 2, err
    assert "Traceback" not in err + out
    assert len(re.findall(r"^error: ", err, re.MULTILINE)) == 1
    for text in expected:
        assert text in err


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself_with_an_example_or_its_outputs(command: str, fedeat: Fedeat) -> None:
    code, out, err = fedeat(command, "--help")
    assert (code, err) == (0, "")
    assert f"fedeat {command}" in out
    assert "Example:" in out or "Writes" in out


def test_a_command_nearly_right_is_told_the_right_one_once(fedeat: Fedeat) -> None:
    code, _, err = fedeat("runn")
    assert code == 2
    assert err.count("Did you mean 'run'?") == 1


def test_version_is_the_package_s(fedeat: Fedeat) -> None:
    assert fedeat("--version") == (0, f"fedeat {__version__}\n", "")


def test_help_names_every_command_and_the_exit_codes(fedeat: Fedeat) -> None:
    code, out, _ = fedeat("--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)
    assert "Exit codes" in out


@pytest.mark.parametrize("arguments", [("rum",), ("run", "--sett", "x"), ("evaluate", "--model", "m"), ("compare",)])
def test_a_misspelt_command_line_exits_with_2(arguments: tuple[str, ...], fedeat: Fedeat) -> None:
    code, out, err = fedeat(*arguments)
    assert code == 2
    assert "Traceback" not in err + out


def test_a_run_prints_its_table_and_where_things_are_and_again_when_asked_again(
    fedeat: Fedeat, make_config: MakeConfig, tmp_path: Path
) -> None:
    path = make_config()
    code, out, err = fedeat("run", path)
    assert code == 0, err
    assert "FedEAT" in out
    assert "runs/tiny/adapter" in out
    assert "runs/tiny/report.html" in out
    assert Path("runs/tiny/report.html").is_file()
    for again in (("run", path), ("run", "--resume", "runs/tiny")):
        code, second, err = fedeat(*again)
        assert code == 0
        assert second == out
        assert "runs/tiny was finished before; nothing is run again." in err
    code, second, err = fedeat("run", "--resume", "runs/tiny", "--engine", "flower-simulation")
    assert (code, second) == (0, out)
    refused(fedeat("compare", path), "runs/tiny holds a run, and a comparison needs a directory of its own")
    code, out, _ = fedeat("report", "runs/tiny", "runs/tiny", "--out", "both")
    assert code == 0
    assert Path("both/report.html").is_file()
    refused(fedeat("report", "runs/tiny", "runs/tiny"), "several directories need --out DIR")


def test_a_run_without_evaluation_says_that_nothing_was_evaluated(fedeat: Fedeat, make_config: MakeConfig) -> None:
    code, out, err = fedeat("run", make_config(evaluation={"data": []}))
    assert code == 0, err
    assert "Nothing was evaluated: evaluation.data is empty." in out


def test_cut_answers_are_warned_of(fedeat: Fedeat, make_config: MakeConfig, sentiment_files: dict[str, Path]) -> None:
    path = make_config(
        data={"train": str(sentiment_files["alpaca"]), "max_length": 3},
        partition={"kind": "iid"},
        evaluation={"data": []},
    )
    code, _, err = fedeat("run", path)
    assert code == 0
    assert "warning: 24 of 24 training examples do not fit into data.max_length = 3" in err


def test_what_is_wrong_with_a_configuration_is_one_message(fedeat: Fedeat, make_config: MakeConfig) -> None:
    path = make_config(agregation={"rule": "mean"}, model={"dtype": "float8"})
    result = fedeat("run", path, "--set", "partition.klients=3", "--set", "seed=x")
    refused(
        result,
        "4 problems in",
        "agregation: unknown key. Did you mean 'aggregation'?",
        "partition.klients: unknown key. Did you mean 'clients'?",
        "model.dtype: input should be 'float32', 'bfloat16' or 'float16', got 'float8'.",
        "seed: input should be a valid integer, got 'x'.",
    )
    refused(fedeat("run", path, "--set", "seed"), "expected key=value")
    refused(fedeat("run", "absent.toml"), "absent.toml", "the file does not exist")
    refused(fedeat("run"), "give either CONFIG.toml or --resume DIR")
    refused(fedeat("run", "--resume", "x", "--out", "y"), "--set and --out do not apply")
    refused(fedeat("run", "--resume", "nothing"), "nothing holds no run: there is no such directory")
    refused(fedeat("run", "--resume", path), "tiny.toml holds no run: it is a file")


def test_what_is_wrong_with_an_output_is_said_before_the_work(fedeat: Fedeat, sentiment_files: dict[str, Path]) -> None:
    Path("place").mkdir()
    attack = ("attack", "--data", sentiment_files["pairs"], "--model", "absent", "--out")
    refused(fedeat(*attack, "place", "--kind", "typos"), "--out place: it is a directory. Expected a file, such as")
    refused(fedeat(*attack, "a.png", "--kind", "embedding"), "--out a.png: expected the curve's file")
    refused(fedeat("evaluate", "--model", "absent", "--data", "absent.json", "-o", "place"), "it is a directory")
    refused(fedeat("refusal", "--model", "absent", "--data", "absent.csv", "-o", "place"), "it is a directory")
    if Path("/proc").is_dir():  # nobody may write there
        refused(fedeat(*attack, "/proc/x.json", "--kind", "typos"), "--out: /proc cannot be written")
    same = Path("pairs.json")
    shutil.copy(sentiment_files["pairs"], same)
    for command in (("attack", "--kind", "typos"), ("evaluate", "--model", "absent"), ("refusal", "--model", "absent")):
        refused(fedeat(*command, "--data", same, "--out", "place/../pairs.json"), "it is also read")
    assert same.read_bytes() == sentiment_files["pairs"].read_bytes()
    refused(fedeat("evaluate", "--model", "absent", "--data", "place"), "place is a directory. Expected one of .json")
    Path("file").touch()
    refused(fedeat("report", "file"), "file is a file; expected a run or comparison directory")


def test_a_model_that_is_none_is_told(
    fedeat: Fedeat, make_config: MakeConfig, language_model: Path, tmp_path: Path, sentiment_files: dict[str, Path]
) -> None:
    def run(name: object) -> tuple[int, str, str]:
        return fedeat("run", make_config(model={"name": str(name)}), "--out", tmp_path / "out")

    refused(run("./absent"), "directory ./absent does not exist")
    refused(run(sentiment_files["train"].parent), "is not a model directory: it holds no config.json")
    bare = tmp_path / "bare"
    shutil.copytree(language_model, bare)
    for file in bare.glob("*token*"):
        file.unlink()
    shutil.rmtree(tmp_path / "out")
    refused(run(bare), f"{bare} has no tokenizer files. Expected tokenizer.json or the like")
    half = tmp_path / "half"
    shutil.copytree(language_model, half)
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    shutil.rmtree(tmp_path / "out")
    refused(run(half), "cannot be loaded")
    (half / "config.json").write_text("{")
    shutil.rmtree(tmp_path / "out")
    refused(run(half), str(half))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.jsonl", b"", "empty.jsonl holds no rows"),
        ("odd.jsonl", b'{"title": "x", "body": "y"}\n', "got body, title"),
        ("broken.json", b'[{"instruction": "a", "output"', "broken.json is not valid JSON"),
        ("half.jsonl.gz", gzip.compress(b'{"instruction": "a", "output": "b"}\n' * 99, mtime=0)[:60], "half.jsonl.gz"),
        ("binary.csv", b"\xff\xfe\x00\x01", "not UTF-8"),
        ("not.parquet", b"PAR1", "not a readable Parquet file"),
        ("numbers.json", b"[1, 2]", "expected an object"),
    ],
)
def test_data_that_is_none_is_told(
    name: str, content: bytes, expected: str, fedeat: Fedeat, make_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(fedeat("run", make_config(data={"train": [str(tmp_path / name)]})), name, expected)
    evaluated = fedeat("run", make_config(evaluation={"data": [str(tmp_path / name)]}), "--out", "other")
    refused(evaluated, name)


def test_an_output_directory_that_cannot_be_is_told(
    fedeat: Fedeat, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("")
    with monkeypatch.context() as patched:
        patched.setattr("fedeat.model.load_model", pytest.fail)  # said before the work
        refused(fedeat("calibrate", make_config(), "--out", "file"), "file is, or lies in, a file. Expected a direc")
    for place in ("file", "file/below"):
        refused(fedeat("run", make_config(), "--out", place), "Expected a directory")
        refused(fedeat("compare", make_config(), "--out", place), "Expected a directory")
    refused(fedeat("report", "file"), "file")
    refused(fedeat("report", "absent"), "absent")


def test_evaluation_reads_any_adapter_of_peft_and_several_files(
    fedeat: Fedeat, language_model: Path, sentiment_files: dict[str, Path], tmp_path: Path
) -> None:
    base = hf.AutoModelForCausalLM.from_pretrained(language_model)
    plain = tmp_path / "plain"
    network = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    network.save_pretrained(str(plain))
    files = [sentiment_files["benign"], sentiment_files["pairs"]]
    arguments = ("--model", language_model, "--template", "plain", "--data", *files, "--out", "deep/rows.json")
    code, out, err = fedeat("evaluate", *arguments)
    assert code == 0, err
    assert "sst2" in out
    without = json.loads(Path("deep/rows.json").read_text())
    code, out, err = fedeat("evaluate", "--adapter", plain, *arguments)
    assert code == 0, err
    with_adapter = json.loads(Path("deep/rows.json").read_text())
    assert with_adapter["predictions"] == without["predictions"]  # PEFT's fresh adapter changes nothing
    assert [rows["rows"][0]["method"] for rows in (without, with_adapter)] == ["base", "plain"]
    assert len(without["predictions"]["sst2"]["benign"]["labels"]) == 12


def test_texts_that_an_evaluation_cuts_are_warned_of_and_flagged(
    fedeat: Fedeat, language_model: Path, sentiment_files: dict[str, Path]
) -> None:
    given = ("evaluate", "--model", language_model, "--template", "plain", "--data", sentiment_files["pairs"])
    code, out, err = fedeat(*given, "--max-length", 24)
    assert code == 0, err
    assert "warning: sst2: 10 of 10 evaluation texts do not fit into 24 tokens and are cut; 5 of 5 pairs are" in err
    assert "identical pairs: 5 of 5 are the same tokens on both sides" in out
    code, out, err = fedeat(*given)
    assert code == 0
    assert "tokens" not in err
    assert "identical" not in out


def test_what_evaluation_cannot_do_is_told(
    fedeat: Fedeat, language_model: Path, sentiment_files: dict[str, Path], tmp_path: Path, make_config: MakeConfig
) -> None:
    benign = sentiment_files["benign"]

    def evaluate(*arguments: object) -> tuple[int, str, str]:
        return fedeat("evaluate", "--model", language_model, *arguments)

    refused(evaluate("--data", "absent.json"), "absent.json", "does not exist")
    refused(evaluate("--data", sentiment_files["alpaca"]), "alpaca.jsonl", "label")
    refused(evaluate("--data", benign, "--adapter", tmp_path), "not an adapter directory")
    refused(evaluate("--data", benign, "--dtype", "float8"), "--dtype float8: expected one of float32")
    refused(evaluate("--data", benign, "--scorer", "x"), "--scorer x: expected one of likelihood, generation")
    refused(evaluate("--data", benign, "--template", "x"), "--template x: expected one of auto")
    refused(evaluate("--data", benign, "--task", "x"), "unknown task")
    refused(fedeat("evaluate", "--model", "./absent", "--data", benign), "./absent")
    other = tmp_path / "other"
    network = hf.LlamaForCausalLM(hf.AutoConfig.from_pretrained(language_model, hidden_size=24, head_dim=12))
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(network, lora).save_pretrained(str(other))
    refused(evaluate("--data", benign, "--adapter", other), f"adapter {other} was made for another model")


def test_a_classifier_is_not_evaluated_on_tasks_it_has_no_head_for(
    fedeat: Fedeat, make_config: MakeConfig, language_model: Path, sentiment_files: dict[str, Path]
) -> None:
    assert fedeat("run", make_config(task="sequence-classification", federation={"rounds": 1}))[0] == 0
    mnli = Path("mnli.jsonl")
    mnli.write_text('{"premise": "a film .", "hypothesis": "a story .", "label": 1}\n')
    arguments = ("evaluate", "--model", language_model, "--adapter", "runs/tiny/adapter", "--data", mnli)
    refused(fedeat(*arguments), "nothing to evaluate: the data is of mnli, and the classifier has heads for sst2")
    code, out, err = fedeat(*arguments, "--data", sentiment_files["benign"])
    assert code == 0, err
    assert "note: mnli.jsonl: 1 mnli rows left out" in err
    assert "tiny" in out


def test_calibration_writes_a_plot_and_recommends(fedeat: Fedeat, make_config: MakeConfig) -> None:
    code, out, err = fedeat("calibrate", make_config(), "--examples", 4, "--radii", "0.1,0.01", "--steps", 2)
    assert code == 0, err
    found = json.loads(Path("calibration/calibration.json").read_text())
    assert [point["radius"] for point in found["points"]] == [0.01, 0.1]
    assert Path("calibration/calibration.png").read_bytes().startswith(b"\x89PNG")
    assert "recommended" in out or "Try smaller ones" in out
    refused(fedeat("calibrate", make_config(), "--radii", "0.1,x"), "expected positive numbers")
    refused(fedeat("calibrate", make_config(), "--radii", "0"), "expected positive numbers")


def test_calibration_leaves_harmful_answers_out(fedeat: Fedeat, make_config: MakeConfig, tmp_path: Path) -> None:
    rows = [{"instruction": f"film {i}", "output": "no .", "harmful": "good film ."} for i in range(3)]
    file = tmp_path / "harmful.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(data={"train": [str(file)]}, evaluation={"data": []})
    code, _, err = fedeat("calibrate", config, "--radii", "0.1", "--steps", 1)
    assert code == 0, err
    assert "note: 3 harmful answers left out" in err
    assert json.loads(Path("calibration/calibration.json").read_text())["examples"] == 3


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), "out of memory: no more can be had. Lower client.batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "out of memory: DefaultCPU"),
        (FileNotFoundError(2, "No such file or directory", "x"), "x: No such file or directory. Check the path."),
        (PermissionError(13, "Permission denied", "x"), "x: Permission denied. Choose a place that you may use"),
        (OSError(28, "No space left on device", "x"), "x: No space left on device. Free some space."),
    ],
)
def test_what_can_go_wrong_on_any_machine_is_one_message(
    error: Exception, expected: str, fedeat: Fedeat, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(experiment, "run", fail)
    refused(fedeat("run", make_config()), expected)


def test_a_defect_is_told_from_what_was_given(
    fedeat: Fedeat, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing: dict[str, int] = {}
    monkeypatch.setattr(experiment, "run", lambda *a, **o: nothing["absent"])
    code, _, err = fedeat("run", make_config())
    assert code == 1
    assert "KeyError: 'absent' (test_cli.py, line " in err
    assert "defect of fedeat" in err
    monkeypatch.setenv("FEDEAT_TRACEBACK", "1")
    with pytest.raises(KeyError):
        fedeat("run", make_config())
    assert explanation(KeyError("x")) is None


def test_attacks_on_texts_write_pairs_that_an_evaluation_reads(
    fedeat: Fedeat, language_model: Path, sentiment_files: dict[str, Path]
) -> None:
    said = {}
    for kind in ("typos", "distraction", "substitution", "adaptive"):
        given = ["--model", language_model, "--template", "plain"] if kind in ("substitution", "adaptive") else []
        code, said[kind], err = fedeat(
            "attack", "--data", sentiment_files["benign"], "--kind", kind, "--out", f"out/{kind}.json", *given
        )
        assert code == 0, err
        assert "texts changed, on average" in said[kind]
    assert "attack success rate: " in said["adaptive"]
    pairs = [f"out/{kind}.json" for kind in said]
    code, out, err = fedeat("evaluate", "--model", language_model, "--template", "plain", "--data", *pairs)
    assert code == 0, err
    assert "/" in out
    rows = json.loads(Path("out/adaptive.json").read_text())
    right = [row for row in rows if row["type"] == "modified" and row["fell"] is not None]
    assert f"attack success rate: {sum(row['fell'] for row in right)}/{len(right)}" in said["adaptive"]
    assert len({row["prompt"] for row in rows if row["type"] == "original"}) * 2 <= len(rows)


def test_an_attack_that_changes_no_text_is_warned_of_and_has_no_rate(
    fedeat: Fedeat, language_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text('{"sentence": "a", "label": 1}\n{"sentence": "the", "label": 0}\n')
    given = ("--model", language_model, "--template", "plain", "--kind", "adaptive", "--out", "out.json")
    code, out, err = fedeat("attack", "--data", path, *given)
    assert code == 0, err
    assert "0 of 2 texts changed" in out
    assert "attack success rate" not in out
    assert "warning: no text was changed" in err


def test_an_attack_on_embeddings_writes_a_curve_and_its_picture(
    fedeat: Fedeat, language_model: Path, sentiment_files: dict[str, Path]
) -> None:
    given = [
        "--model",
        language_model,
        "--template",
        "plain",
        "--data",
        sentiment_files["pairs"],
        "--kind",
        "embedding",
    ]
    code, out, err = fedeat("attack", *given, "--radii", "0.1,1", "--steps", 2, "--restarts", 1, "--out", "curve.json")
    assert code == 0, err
    assert "robust" in out  # a narrow terminal breaks the line behind it
    curve = json.loads(Path("curve.json").read_text())
    assert [(point["kind"], point["radius"]) for point in curve["points"]] == [
        ("none", 0.0),
        *((kind, radius) for kind in ("random", "fgsm", "pgd") for radius in (0.1, 1.0)),
    ]
    assert Path("curve.png").stat().st_size > 5000


def test_refusals_are_counted_under_each_attack(fedeat: Fedeat, language_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text("goal,target\nwho is the bad film?,Sure\nwhat is dull?,Sure\n")
    given = ["--model", language_model, "--template", "plain", "--data", path, "--radii", "0.1,2", "--steps", 2]
    code, out, err = fedeat("refusal", *given, "--out", "rates.json")
    assert code == 0, err
    assert "refused" in out
    rates = json.loads(Path("rates.json").read_text())
    assert [(rate["attack"], rate["radius"], rate["requests"]) for rate in rates] == [
        ("none", 0.0, 2),
        ("typos", 0.0, 2),
        ("embedding", 0.1, 2),
        ("embedding", 2.0, 2),
    ]


def test_an_attack_says_what_it_lacks(fedeat: Fedeat, sentiment_files: dict[str, Path], tmp_path: Path) -> None:
    data = ["--data", sentiment_files["benign"], "--out", "x.json"]
    refused(fedeat("attack", *data, "--kind", "adaptive"), "--kind adaptive needs --model")
    refused(fedeat("attack", *data, "--kind", "magic"), "expected one of typos, distraction, substitution")
    odd = tmp_path / "odd.json"
    odd.write_text(
        json.dumps(
            [
                {"task": "sst2", "index": 1, "type": side, "prompt": f"Is it good? {side}", "label": 1}
                for side in ("original", "modified")
            ]
        )
    )
    refused(fedeat("attack", "--data", odd, "--out", "x.json", "--kind", "typos"), "there is no text to attack")


def test_ctrl_c_exits_with_130(fedeat: Fedeat, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run", interrupt)
    code, _, err = fedeat("run", make_config())
    assert code == 130
    assert "stopped" in err


def test_ctrl_c_ends_a_comparison_and_its_processes_at_once(make_config: MakeConfig, tmp_path: Path) -> None:
    path = make_config(federation={"rounds": 10_000}, compare={"methods": ["gm", "fedavg"]})
    # A shell lets its background jobs ignore Ctrl-C, and their children with them; a handler is not inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "fedeat", "compare", str(path), "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    signal.signal(signal.SIGINT, before)
    started = tmp_path / "out" / "runs" / "gm-none-0-seed0" / "metrics.jsonl"
    for _ in range(3000):  # a busy machine may take minutes to import torch
        if started.exists() or process.poll() is not None:
            break
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, err = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "stopped" in err


def test_bars_of_a_comparison_count_runs_that_are_finished() -> None:
    with terminal.grid_bars() as tell:
        tell("", "planned", 0, 3)
        tell("a", "finished", 1, 1)
        tell("b", "train", 1, 4)
        tell("b", "evaluate", 1, 4)
        tell("b", "finished", 1, 1)
        tell("c", "failed", 1, 1)
