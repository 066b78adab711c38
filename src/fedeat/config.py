"""A run's configuration: TOML in, frozen values out, every problem reported at once.

    task = "causal-lm"
    [model]
    name = "google/gemma-1.1-2b-it"
    [data]
    train = ["alpaca.jsonl"]

Everything else has a default. `docs/configuration.md` lists each key with its range and default, made from this file.
"""

from __future__ import annotations

import difflib
import importlib.util
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fedeat import aggregation
from fedeat.aggregation import CoordinateRule, Rule
from fedeat.data import is_local
from fedeat.errors import ConfigError

RuleName = Literal["mean", "geometric_median", "coordinate_median", "trimmed_mean", "krum", "multi_krum"]
RULES: Mapping[RuleName, Rule | CoordinateRule] = {
    "mean": aggregation.mean,
    "geometric_median": aggregation.geometric_median,
    "coordinate_median": aggregation.coordinate_median,
    "trimmed_mean": aggregation.trimmed_mean,
    "krum": aggregation.krum,
    "multi_krum": aggregation.multi_krum,
}
AttackName = Literal["none", "sign_flip", "gaussian", "label_flip", "nan"]
Methods = ("fedavg", "eat", "gm", "fedeat")


class Section(BaseModel):
    """A table of the configuration: frozen, and no key that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelSection(Section):
    name: str = Field(min_length=1, description="local model directory or hub name")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the base weights")
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = Field(
        None, description="attention implementation; the model's default where it is not set"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, a third more time")
    load_in_4bit: bool = Field(False, description="quantise the base on loading; needs fedeat[quantization] and CUDA")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA where there is one")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    trust_remote_code: bool = Field(False, description="run Python code that the model repository brings")


class LoraSection(Section):
    rank: int = Field(8, ge=1, description="r")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input, in training steps")
    target_modules: str | tuple[str, ...] = Field("all-linear", description="module names, or all-linear")


class Source(Section):
    path: str = Field(min_length=1, description="file or hub data set")
    task: str | None = Field(None, description="sst2, qqp, mnli, qnli; found from the columns where it is not set")
    split: str = Field("train", description="split of a hub data set")
    limit: int | None = Field(None, ge=1, description="rows used, drawn with the run's seed; all where it is not set")


def _source(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


Sources = tuple[Annotated[Source, BeforeValidator(_source)], ...]


class DataSection(Section):
    train: Sources = Field((), description="training data: paths, hub names, or tables with path, task, split, limit")
    template: Literal["auto", "alpaca", "chat", "plain"] = Field(
        "auto", description="prompt template; auto is the tokenizer's chat template, or Alpaca's where it has none"
    )
    max_length: int = Field(512, ge=2, description="tokens an example may have")


class PartitionSection(Section):
    kind: Literal["iid", "dirichlet", "column"] = Field("dirichlet", description="how examples spread over clients")
    clients: int = Field(10, ge=1, description="n; found from the data where kind is column")
    alpha: float = Field(0.5, gt=0, description="Dirichlet concentration; small is more skewed")
    by: str = Field("label", description="what dirichlet skews or column splits: label, or a column's name")


class FederationSection(Section):
    rounds: int = Field(10, ge=1, description="T")
    clients_per_round: int | None = Field(None, ge=1, description="m; all clients where it is not set")
    quorum: int | None = Field(None, ge=1, description="usable updates a round needs; a majority where it is not set")
    keep_checkpoints: int | None = Field(None, ge=1, description="newest checkpoints kept; all where it is not set")


class ClientSection(Section):
    local_epochs: int = Field(1, ge=1, description="E")
    max_steps: int | None = Field(None, ge=1, description="optimiser steps a round at most")
    batch_size: int = Field(8, ge=1, description="examples a step")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="fresh every round")
    learning_rate: float = Field(2e-4, gt=0, description="constant within a run")
    weight_decay: float = Field(0.0, ge=0, description="of the adapter")
    max_grad_norm: float | None = Field(1.0, gt=0, description="gradients are clipped to this L2 norm")


class PerturbationSection(Section):
    kind: Literal["pgd", "fgsm", "random", "none"] = Field("pgd", description="how the perturbation is found")
    radius: float = Field(0.05, ge=0, description="of the ball, relative to the model's mean token-embedding norm")
    steps: int = Field(3, ge=1, description="K, ascent steps of pgd")
    step_size: float | None = Field(None, gt=0, description="relative like radius; 2.5 radius / K where not set")
    norm: Literal["l2", "l2-sequence", "linf"] = Field("l2", description="per token, per sample, per coordinate")
    projection: Literal["accumulated", "step"] = Field(
        "accumulated", description="standard PGD, or each step alone as the paper prints Eq. 3"
    )
    start: Literal["zero", "random"] = Field("zero", description="where the ascent begins")
    radius_warmup: int = Field(0, ge=0, description="rounds over which the radius grows from 0; for a fresh head")
    objective: Literal["adversarial", "mixed"] = Field(
        "adversarial", description="adversarial loss alone (Alg. 1), or clean + weight * adversarial (Eq. 2)"
    )
    weight: float = Field(1.0, description="lambda >= 0 of the mixed objective")


class AggregationSection(Section):
    rule: RuleName = Field("geometric_median", description="how updates become one")
    byzantine: int | None = Field(None, ge=0, description="f to withstand; the most the rule can where it is not set")
    prior_weights: Literal["uniform", "num_examples"] = Field(
        "uniform", description="num_examples is a number that a client may choose freely"
    )
    space: Literal["factors", "product"] = Field("factors", description="where updates are compared")
    tolerance: float = Field(1e-9, gt=0, lt=1, description="certified relative gap of the geometric median")


class AttackSection(Section):
    kind: AttackName = Field("none", description="what malicious clients do")
    fraction: float = Field(0.0, ge=0, lt=0.5, description="of the clients that are malicious")
    scale: float = Field(4.0, gt=0, description="of the flipped update, or of the noise relative to the update")


class EvaluationSection(Section):
    data: Sources = Field((), description="GLUE rows, or original/modified pairs in TrustLLM's or AdvGLUE's form")
    scorer: Literal["likelihood", "generation"] = Field("likelihood", description="how a causal LM's answer is read")
    batch_size: int = Field(32, ge=1, description="texts a forward pass")
    every: int = Field(0, ge=0, description="evaluate benign data every so many rounds; 0 is after the last alone")


class CompareSection(Section):
    methods: tuple[str, ...] = Field(Methods, min_length=1, description="fedavg, eat, gm, fedeat, or variants' names")
    attacks: tuple[AttackName, ...] = Field(("sign_flip",), description="run at each fraction above 0")
    fractions: tuple[Annotated[float, Field(ge=0, lt=0.5)], ...] = Field((0.0,), min_length=1, description="malicious")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="each cell is run with each")
    processes: int = Field(1, ge=1, description="cells run side by side, each with its share of the cores")
    base: bool = Field(False, description="also evaluate the base model as it came")
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="further methods: name -> dotted keys that differ from this configuration"
    )


class Config(Section):
    """Everything that decides a run's result."""

    task: Literal["causal-lm", "sequence-classification"] = Field("causal-lm", description="what the model is for")
    method: str = Field("fedeat", description="a label for tables; it decides nothing")
    seed: int = Field(0, ge=0, description="of everything random")
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0 is torch's choice")
    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    partition: PartitionSection = PartitionSection()
    federation: FederationSection = FederationSection()
    client: ClientSection = ClientSection()
    perturbation: PerturbationSection = PerturbationSection()
    aggregation: AggregationSection = AggregationSection()
    attack: AttackSection = AttackSection()
    evaluation: EvaluationSection = EvaluationSection()
    compare: CompareSection = CompareSection()


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file, applies `key=value` overrides, and checks everything.

    Args:
        path: the file.
        overrides: dotted keys with TOML values, such as `aggregation.rule=mean`; a bare word is a string.

    Raises:
        ConfigError: with every problem found.
    """
    if not path.is_file():
        raise ConfigError(
            [f"the file does not exist. Check the path; a relative one starts at {Path.cwd()}."], source=str(path)
        )
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"it is not valid TOML: {error}."], source=str(path)) from None
    return parse(override(raw, overrides), source=str(path))


def parse(raw: Mapping[str, Any], *, source: str = "configuration") -> Config:
    """Validates a nested mapping.

    Raises:
        ConfigError: with every problem found: unknown keys, wrong values, missing files, and keys that do not fit
            together.
    """
    problems: list[str] = []
    remaining: dict[str, Any] = _copy(raw)
    config: Config | None = None
    # What is wrong is taken out and the rest is checked again, so that one wrong key does not hide a missing file.
    for _ in range(8):
        try:
            config = Config.model_validate(remaining)
            break
        except ValidationError as error:
            before = len(problems)
            for item in error.errors():
                problems.append(_explain(item))
                _remove(remaining, item["loc"])
            if any(item["type"] == "missing" for item in error.errors()) or len(problems) == before:
                break
    if config is not None:
        problems.extend(contradictions(config))
    if problems or config is None:
        raise ConfigError(problems, source=source)
    return config


def override(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `raw` with dotted `key=value` entries set.

    Raises:
        ConfigError: an entry has no `=`, or its key runs through a value that is not a table.
    """
    result = _copy(raw)
    problems = []
    for entry in overrides:
        key, equals, text = entry.partition("=")
        if not equals or not key.strip():
            problems.append(f"--set {entry}: expected key=value, such as aggregation.rule=mean.")
            continue
        if not _set(result, key.strip().split("."), _value(text.strip())):
            problems.append(f"--set {entry}: {key.strip()!r} runs through a key that is not a table.")
    if problems:
        raise ConfigError(problems, source="--set")
    return result


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """A configuration with dotted keys changed, checked again.

    Raises:
        ConfigError: the result has problems.
    """
    raw = _copy(config.model_dump(mode="json", exclude_none=True))
    for key, value in values.items():
        _set(raw, key.split("."), value)
    return parse(raw)


def to_toml(config: Config) -> str:
    """The resolved configuration, each key with the value used; keys that are not set are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def contradictions(config: Config) -> list[str]:
    """Problems that no single key shows: missing files, and keys that do not fit together."""
    problems = [*_missing_files(config)]
    cohort = config.federation.clients_per_round or config.partition.clients
    if config.partition.kind != "column":
        if cohort > config.partition.clients:
            problems.append(
                f"federation.clients_per_round is {cohort}, more than the {config.partition.clients} clients "
                "(partition.clients)."
            )
        if (config.federation.quorum or 1) > cohort:
            problems.append(f"federation.quorum is {config.federation.quorum}, more than the {cohort} clients a round.")
        problems.extend(_intolerable(config, cohort))
    elif config.partition.by == "label":
        problems.append('partition.kind = "column" needs partition.by, the name of a column, such as "client".')
    if config.perturbation.weight < 0:
        problems.append(
            f"perturbation.weight is {config.perturbation.weight}, expected >= 0. The paper's Eq. 2 prints a minus sign, "
            "which rewards a high adversarial loss; training on it diverges."
        )
    if config.task == "sequence-classification" and config.evaluation.scorer != "likelihood":
        problems.append('evaluation.scorer = "generation" needs task = "causal-lm"; a classifier generates nothing.')
    if config.model.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        problems.append('model.load_in_4bit needs bitsandbytes: pip install "fedeat[quantization]".')
    unknown = [name for name in config.compare.methods if name not in (*Methods, *config.compare.variants)]
    if unknown:
        problems.append(
            f"compare.methods: unknown {', '.join(map(repr, unknown))}. Expected {', '.join(Methods)}, or a table "
            "under compare.variants."
        )
    if config.attack.kind != "none" and config.attack.fraction == 0:
        problems.append(f'attack.kind is "{config.attack.kind}" but attack.fraction is 0. Set a fraction above 0.')
    if config.attack.kind == "none" and config.attack.fraction > 0:
        problems.append(f"attack.fraction is {config.attack.fraction} but attack.kind is none. Set what they do.")
    return problems


def _missing_files(config: Config) -> list[str]:
    problems = []
    for key, sources in (("data.train", config.data.train), ("evaluation.data", config.evaluation.data)):
        for source in sources:
            if is_local(source.path) and not Path(source.path).is_file():
                problems.append(f"{key}: file {source.path} does not exist. A relative path starts at {Path.cwd()}.")
    name = config.model.name
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        problems.append(f"model.name: directory {name} does not exist. A relative path starts at {Path.cwd()}.")
    return problems


def _intolerable(config: Config, cohort: int) -> list[str]:
    most = aggregation.tolerates(RULES[config.aggregation.rule], cohort)
    asked = config.aggregation.byzantine
    if asked is None or asked <= most:
        return []
    return [
        f"aggregation.byzantine is {asked}, but {config.aggregation.rule} over {cohort} clients a round withstands at "
        f"most {most}. No rule withstands half or more. Lower it, or draw more clients a round."
    ]


def _explain(item: Any) -> str:
    """One pydantic error as what, expected, got, remedy."""
    path = [str(part) for part in item["loc"]]
    key = ".".join(path)
    if item["type"] == "extra_forbidden":
        known = _keys_at(path[:-1])
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Expected one of {', '.join(known)}."
        return f"{key}: unknown key. {hint}"
    if item["type"] == "missing":
        return f"{key}: required, and not set."
    got = item["input"]
    shown = f", got {got!r}" if isinstance(got, str | int | float | bool) else f", got {type(got).__name__}"
    return f"{key}: {item['msg'][0].lower()}{item['msg'][1:]}{shown}."


def _keys_at(path: Sequence[str]) -> list[str]:
    section: Any = Config
    for part in path:
        if part.isdecimal():
            section = Source
            continue
        field = section.model_fields.get(part) if hasattr(section, "model_fields") else None
        section = field.annotation if field is not None else None
    return sorted(getattr(section, "model_fields", {}) or Source.model_fields)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(table: dict[str, Any], path: Sequence[str], value: Any) -> bool:
    for part in path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            return False
    table[path[-1]] = value
    return True


def _remove(table: Any, path: Sequence[str | int]) -> None:
    """Takes the innermost existing key of `path` out of nested tables; a list loses the whole list."""
    for part in path[:-1]:
        if not isinstance(table, dict) or not isinstance(table.get(str(part)), dict):
            break
        table = table[str(part)]
    else:
        part = path[-1]
    if isinstance(table, dict):
        table.pop(str(part), None)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value
