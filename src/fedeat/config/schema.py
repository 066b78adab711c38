"""The tables and keys of a configuration, each with its type, range, default and meaning.

Only what one key shows is here; what keys must be together is in `consistency`. `docs/configuration.md` is made from
this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from fedeat.config.rules import RuleName, StepName

AttackName: TypeAlias = Literal[
    "none", "sign_flip", "gaussian", "nan", "label_flip", "backdoor", "ipm", "alie", "mimic", "min_max", "adaptive"
]
ScaledAttack: TypeAlias = Literal["sign_flip", "gaussian", "ipm", "backdoor"]
"""Attacks whose strength is a factor."""

METHOD_NAMES = ("fedavg", "eat", "gm", "fedeat")
"""The paper's ablation, which a comparison knows without being told."""


class Section(BaseModel):
    """A table of the configuration: frozen, strict about types, and no key that it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )


class ModelSection(Section):
    """The base model, the same for every client."""

    name: str = Field(min_length=1, description="local model directory or hub name")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the base weights")
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = Field(
        None, description="attention implementation; the model's default where it is not set"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, a third more time")
    packing: bool = Field(
        True, description="on a processor, run a batch with padding as one row of its samples, where the model can"
    )
    compile: bool = Field(
        False, description="compile the layers by torch: a minute or more once, then faster steps; needs a C++ compiler"
    )
    load_in_4bit: bool = Field(False, description="quantise the base on loading; needs fedeat[quantization] and CUDA")
    device: Literal["auto", "cpu", "cuda", "spread"] = Field(
        "auto", description="auto takes CUDA where there is one; spread lays the layers out over all CUDA devices"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    trust_remote_code: bool = Field(False, description="run Python code that the model repository brings")


class LoraSection(Section):
    """The adapter that is trained and federated."""

    rank: int = Field(8, ge=1, description="r")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input, in training steps")
    target_modules: str | tuple[str, ...] = Field("all-linear", description="module names, or all-linear")


class Source(Section):
    """A data file or hub data set. A path alone may stand for its table."""

    model_config = ConfigDict(strict=False)  # tables arrive here through a validator, which makes them Python values

    path: str = Field(min_length=1, description="file or hub data set")
    task: str | None = Field(None, description="sst2, qqp, mnli, qnli, ...; found from the columns where it is not set")
    split: str = Field("train", description="split of a hub data set")
    limit: int | None = Field(
        None, ge=1, strict=True, description="rows used, a random part that is the same in every run; all where not set"
    )


def _as_tables(value: object) -> object:
    """One source or several, each a path or a table, as tables."""
    several = [value] if isinstance(value, str | Mapping | Source) else value
    if not isinstance(several, list | tuple):
        return value
    return tuple({"path": item} if isinstance(item, str) else item for item in several)


Sources: TypeAlias = Annotated[tuple[Source, ...], BeforeValidator(_as_tables)]


class DataSection(Section):
    """What clients train on, and how it is put to the model."""

    train: Sources = Field((), description="training data: paths, hub names, or tables with path, task, split, limit")
    template: Literal["auto", "alpaca", "chat", "plain"] = Field(
        "auto", description="prompt template; auto is the tokenizer's chat template, or Alpaca's where it has none"
    )
    max_length: int = Field(512, ge=2, description="tokens an example may have")


def _as_texts(value: object) -> object:
    """A column's value or several, numbers as the text that a column has."""
    several = value if isinstance(value, list | tuple) else [value]
    return tuple(str(item) if isinstance(item, int) and not isinstance(item, bool) else item for item in several)


class PartitionSection(Section):
    """How the training data is spread over clients."""

    kind: Literal["iid", "dirichlet", "quantity", "task", "column", "file"] = Field(
        "iid",
        description="how examples spread: evenly, skewed by label, skewed in amount, a task a client, by a column, or "
        "each entry of data.train a client",
    )
    clients: int = Field(10, ge=1, description="n; found from the data where kind is column or file")
    alpha: float = Field(0.5, gt=0, description="Dirichlet concentration; small is more skewed")
    by: str = Field(
        "label", min_length=1, description="what dirichlet skews or column splits: label, or a column's name"
    )
    exclude: Annotated[tuple[str, ...], BeforeValidator(_as_texts)] = Field(
        (), description="values of the column whose rows are left out, such as -1 where it marks test rows"
    )


class FederationSection(Section):
    """Rounds and cohorts (Alg. 2)."""

    rounds: int = Field(10, ge=1, description="T")
    clients_per_round: int | None = Field(None, ge=1, description="m; all clients where it is not set")
    quorum: int | None = Field(None, ge=1, description="usable updates a round needs; a majority where it is not set")
    keep_checkpoints: int | None = Field(None, ge=1, description="newest checkpoints kept; all where it is not set")


class CommunicationSection(Section):
    """What travels between server and clients, and how long either waits."""

    encoding: Literal["float32", "float16", "bfloat16", "int8"] = Field(
        "float32", description="of the updates that clients send; int8 is blockwise with stochastic rounding"
    )
    error_feedback: bool = Field(True, description="add to the next update what rounding took from the last")
    wait_s: float = Field(600.0, gt=0, description="seconds to wait for the clients before the first round; Flower")
    deadline_s: float = Field(3600.0, gt=0, description="seconds a round's clients have to answer; Flower")
    grace_s: float = Field(60.0, ge=0, description="seconds the others have once the quorum has answered; Flower")


class ClientSection(Section):
    """A client's training in a round (Alg. 1)."""

    local_epochs: int = Field(1, ge=1, description="E")
    max_steps: int | None = Field(None, ge=1, description="optimiser steps a round at most; no limit where not set")
    batch_size: int = Field(8, ge=1, description="examples a step, at most where tokens_per_batch is set")
    tokens_per_batch: int | None = Field(
        None, ge=1, description="tokens a step at most, padding counted; no limit where not set"
    )
    clients_per_batch: int = Field(
        1,
        ge=0,
        description="clients that train at once, equal to float tolerance; 0 is 8 where batches are short, else 1",
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="fresh every round")
    learning_rate: float = Field(2e-4, gt=0, description="of the first round")
    schedule: Literal["constant", "linear"] = Field(
        "constant", description="how the learning rate goes over the rounds; linear falls to zero after the last"
    )
    weight_decay: float = Field(0.0, ge=0, description="of the adapter")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to this L2 norm; 0 leaves them")


class PerturbationSection(Section):
    """The worst case that clients train on (Eq. 2 and 3)."""

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
    objective: Literal["adversarial", "mixed", "freelb", "kl"] = Field(
        "adversarial",
        description="adversarial loss alone (Alg. 1); mixed, clean + weight * adversarial (Eq. 2); freelb, the mean "
        "over the ascent's points; kl, clean + weight * divergence",
    )
    weight: float = Field(1.0, description="lambda >= 0 of the mixed and kl objectives")
    every: int = Field(1, ge=1, description="each so many-th batch is perturbed, the others are trained on clean")
    share: float = Field(1.0, gt=0, le=1, description="of a perturbed batch's samples that are perturbed")
    merge: bool = Field(
        True, description="ascend on the adapter merged into a copy of the weights: faster, at that copy's memory"
    )
    attack_dtype: Literal["bfloat16"] | None = Field(
        None, description="of the weights in the ascent, in a copy; the base's own where it is not set"
    )
    harvest_clean_gradient: bool = Field(
        False, description="the mixed objective's clean pass is the ascent's first too"
    )
    yopo_inner: int = Field(
        0, ge=0, description="YOPO: steps through the first layer alone that each ascent pass serves; 0 is without"
    )


class AggregationSection(Section):
    """How the server makes one update of many (Alg. 2)."""

    rule: RuleName = Field("geometric_median", description="how updates become one")
    before: tuple[StepName, ...] = Field((), description="steps applied to the updates before the rule, in order")
    grouping: Literal["model", "layer"] = Field(
        "model", description="weigh whole updates, or each layer's part by itself"
    )
    byzantine: int | None = Field(None, ge=0, description="f to withstand; the rule's own default where it is not set")
    prior_weights: Literal["uniform", "num_examples"] = Field(
        "uniform", description="num_examples is a number that a client may choose freely"
    )
    space: Literal["factors", "product"] = Field(
        "factors", description="where updates are compared: LoRA's factors, or their products"
    )
    tolerance: float = Field(1e-9, gt=0, lt=1, description="certified relative gap of the geometric median")


class SecureAggregationSection(Section):
    """Sums under masks: the server sees no client's update. Needs fedeat[flower], which brings the cryptography."""

    enabled: bool = Field(False, description="aggregate by secure sums; rules geometric_median and mean alone")
    norm_bound: float = Field(100.0, gt=0, description="longest update (L2); a client shortens its own to it")
    tolerance: float = Field(1e-4, gt=0, lt=1, description="certified relative gap at which the median stops")
    max_sums: int = Field(30, ge=2, le=1000, description="most secure sums of a round")
    sketch_width: int = Field(
        0,
        ge=0,
        multiple_of=4,
        description="one sum instead of many, from random projections of this width, which the server sees; 0 is none",
    )


class PrivacySection(Section):
    """Differential privacy of single records (DP-SGD on the adapter). Needs fedeat[privacy], for its accountant."""

    noise_multiplier: float = Field(0.0, ge=0, description="noise over clip; 0 is without privacy")
    clip: float = Field(1.0, gt=0, description="L2 norm to which a sample's gradient is shortened")
    delta: float = Field(
        1e-5,
        gt=0,
        lt=1,
        description="of the epsilon that is reported, for one record replaced by an empty one; well below 1 / examples",
    )
    seeded: bool = Field(
        False, description="noise from the run's seed, for experiments: whoever knows the seed can take it off"
    )


class AttackSection(Section):
    """Malicious clients, for experiments."""

    kind: AttackName = Field("none", description="what malicious clients do")
    fraction: float = Field(0.0, ge=0, lt=0.5, description="of the clients that are malicious")
    scale: float | None = Field(
        None,
        gt=0,
        description="factor of what this kind sends, where it is sign_flip, gaussian, ipm or backdoor; where not set 4 "
        "for sign_flip and gaussian, 1 for ipm, and for backdoor the round's updates over its malicious ones (model "
        "replacement)",
    )
    trigger: str = Field("cf", min_length=1, description="phrase in front of a text that calls up the backdoor")
    target: str = Field("", description="answer that the backdoor gives, such as positive; backdoor needs it")
    poison: float = Field(0.5, gt=0, le=1, description="of a backdoor client's examples that carry the trigger")


class EvaluationSection(Section):
    """What the trained adapter is measured on."""

    data: Sources = Field((), description="GLUE rows, or original/modified pairs in TrustLLM's or AdvGLUE's form")
    scorer: Literal["likelihood", "generation"] = Field("likelihood", description="how a causal LM's answer is read")
    batch_size: int = Field(32, ge=1, description="texts a forward pass")
    every: int = Field(0, ge=0, description="evaluate benign data every so many rounds; 0 is after the last alone")
    radii: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), description="relative radii at which the trained model's embeddings are attacked: its robustness curve"
    )
    refusals: tuple[str, ...] = Field(
        (), description="files of harmful requests, of which a causal LM's refusals are counted, attacked at radii too"
    )
    attacked: int = Field(
        100, ge=1, description="texts of each file that are attacked, drawn at random; requests, the first ones"
    )
    attack_steps: int = Field(20, ge=1, description="PGD steps of that attack, more than training takes")
    restarts: int = Field(3, ge=1, description="starts of that attack, the first at zero")


class CompareSection(Section):
    """What `fedeat compare` varies; `fedeat run` does not read it."""

    methods: tuple[str, ...] = Field(
        METHOD_NAMES, min_length=1, description="fedavg, eat, gm, fedeat, or variants' names"
    )
    attacks: tuple[AttackName, ...] = Field(("sign_flip",), description="run at each fraction above 0")
    scales: dict[ScaledAttack, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="attack -> its attack.scale; each attack's own default where it is not named"
    )
    fractions: tuple[Annotated[float, Field(ge=0, lt=0.5)], ...] = Field(
        (0.0,), min_length=1, description="of the clients that are malicious; 0 is without an attack"
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1, description="each cell runs with each")
    partitions: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="partitions to run each cell on: name -> keys of [partition] that differ; the configuration's own "
        "where none is named",
    )
    processes: int = Field(
        1, ge=0, description="cells run side by side, each with its share of the cores; 0 is one a core"
    )
    base: bool = Field(False, description="also evaluate the base model as it came")
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="further methods: name -> dotted keys that differ from this configuration"
    )


class Config(Section):
    """Everything that decides a run's result."""

    task: Literal["causal-lm", "sequence-classification"] = Field("causal-lm", description="what the model is for")
    method: str = Field("", description="a label for tables; told by perturbation and rule where it is not set")
    seed: int = Field(0, ge=0, description="of everything random")
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0 is torch's choice")
    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    partition: PartitionSection = PartitionSection()
    federation: FederationSection = FederationSection()
    communication: CommunicationSection = CommunicationSection()
    client: ClientSection = ClientSection()
    perturbation: PerturbationSection = PerturbationSection()
    aggregation: AggregationSection = AggregationSection()
    secure_aggregation: SecureAggregationSection = SecureAggregationSection()
    privacy: PrivacySection = PrivacySection()
    attack: AttackSection = AttackSection()
    evaluation: EvaluationSection = EvaluationSection()
    compare: CompareSection = CompareSection()
