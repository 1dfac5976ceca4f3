"""Which attention each layer uses at each step of training.

A schedule is a short list of stages. Each stage is a MoBAConfig or full attention, and begins at a share of the
training. It depends on the progress alone. So a resumed run continues with the right stage, and torch.compile compiles
each different stage once, however often the training returns to it.

    schedule = hybrid(MoBAConfig(512, 3))                   # MoBA for 90 % of the training, then full attention
    Trainer(..., callbacks=[MoBASchedule(schedule)])        # transformers
    apply_schedule(model, schedule, step / num_steps)       # any other loop, before each step
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moba.config import MoBAConfig, require_int
from moba.hf import get_moba_config, set_moba_config

# Each different stage is one more compilation; torch.compile stops at 8 of one function by default.
MOST_STAGES = 8


@dataclass(frozen=True)
class Schedule:
    """Stages of a training.

    Args:
        stages: (start, config) in order: from the share `start` of the training on, the config holds. None is full
            attention in every layer. The first starts at 0; at most 8 may differ.

    Raises:
        ValueError: if the starts do not ascend from 0 within [0, 1), or too many stages differ.
    """

    stages: tuple[tuple[float, MoBAConfig | None], ...]

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.stages]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)) or not starts[-1] < 1:
            raise ValueError(f"stages must start at 0 and then ascend below 1, got starts {starts}")
        if len({config for _, config in self.stages}) > MOST_STAGES:
            raise ValueError(f"stages: at most {MOST_STAGES} may differ (each is compiled apart), got {len(starts)}")

    def at(self, progress: float, num_layers: int) -> MoBAConfig:
        """The config of the stage at `progress` (0 … 1); for full attention, one whose layers are all full.

        Raises:
            ValueError: if progress is not a number in [0, 1].
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must lie in [0, 1], got {progress!r}")
        config = self.stages[bisect_right(self.stages, progress, key=lambda stage: stage[0]) - 1][1]
        if config is not None:
            return config
        # The blocks of another stage, so that a saved model records them; full layers ignore them.
        blocks = next((config for _, config in self.stages if config is not None), MoBAConfig(1, 1))
        return replace(blocks, full_layers=num_layers)


def throughout(config: MoBAConfig | None) -> Schedule:
    """Use one attention from the first step to the last.

    Args:
        config: MoBA; its `full_layers` stay full (the paper's layer-wise hybrid for fine-tuning). None: full attention.
    """
    return Schedule(((0.0, config),))


def activation(config: MoBAConfig, *, at: float) -> Schedule:
    """Use full attention up to the share `at` of the training, then MoBA.

    Raises:
        ValueError: if `at` is not in (0, 1).
    """
    return Schedule(((0.0, None), (_inner("at", at), config)))


def hybrid(config: MoBAConfig, *, full_from: float = 0.9) -> Schedule:
    """Use MoBA up to the share `full_from` of the training, then full attention: the paper's recipe (section 3.2).

    Raises:
        ValueError: if `full_from` is not in (0, 1).
    """
    return Schedule(((0.0, config), (_inner("full_from", full_from), None)))


def mixed(config: MoBAConfig, *, every: int, num_steps: int, at: float = 0.0) -> Schedule:
    """Use MoBA, and full attention in the first of every `every` steps, which teaches keys that MoBA never reads to be
    quiet ("SSA", arXiv 2511.20102). The last step is MoBA's, so that the model is saved with it; an evaluation or a
    checkpoint behind a step of full attention finds full attention.

    Args:
        every: >= 2. num_steps: of the training, >= 2.
        at: share of the training up to which every step has full attention.

    Raises:
        ValueError: naming the argument, what it was, and what is valid.
    """
    require_int("every", every, 2)
    require_int("num_steps", num_steps, 2)
    if not 0 <= at < 1:
        raise ValueError(f"at must lie in [0, 1), got {at!r}")
    stages: list[tuple[float, MoBAConfig | None]] = []
    for step in range(num_steps):
        is_full = step < num_steps - 1 and (step % every == 0 or step / num_steps < at)
        stage = None if is_full else config
        if not stages or stages[-1][1] != stage:
            stages.append((step / num_steps, stage))
    return Schedule(tuple(stages))


def anneal_topk(
    config: MoBAConfig, *, start: int, until: float = 0.5, num_stages: int = 6, length: int | None = None
) -> Schedule:
    """Lower topk from `start` to the config's, by equal factors.

    Args:
        config: of the last stage.
        start: topk of the first stage, >= the config's.
        until: share of the training at which the last stage begins.
        num_stages: 2 … 8. Stages that round to the same topk are merged.
        length: tokens of the longest sequence. Stages whose topk · block_size covers it become full attention, which
            computes the same in less time. None: all stages are MoBA.

    Raises:
        ValueError: naming the argument, what it was, and what is valid.
    """
    return _anneal("topk", config, start, until, num_stages, length)


def anneal_block_size(
    config: MoBAConfig, *, start: int, until: float = 0.5, num_stages: int = 6, length: int | None = None
) -> Schedule:
    """Lower the block size from `start` to the config's, by equal factors; arguments as in `anneal_topk`."""
    return _anneal("block_size", config, start, until, num_stages, length)


def apply_schedule(model: PreTrainedModel, schedule: Schedule, progress: float) -> bool:
    """Give `model` the attention of `schedule` at `progress`; call it before each step of a training loop.

    Args:
        model: its attention is "moba", "moba_naive", or that of `moba.parallel.models`. It carries the config of the
            stage and is saved with it.
        schedule: the stages.
        progress: share of the training that is done, 0 … 1, in steps or in tokens.

    Returns:
        whether the attention changed.

    Raises:
        ValueError: if the model has another attention, a stage does not fit its layers, or progress is outside [0, 1].
    """
    name = model.config._attn_implementation
    if name not in ("moba", "moba_naive", "moba_parallel"):
        raise ValueError(
            f"the model's attention must be 'moba' or 'moba_naive' for a schedule, got {name!r}: "
            "model.set_attn_implementation('moba')"
        )
    config = schedule.at(progress, model.config.get_text_config(decoder=True).num_hidden_layers)
    if config == get_moba_config(model):
        return False
    set_moba_config(model, config)
    return True


class MoBASchedule(TrainerCallback):
    """A callback for transformers' Trainer that applies a schedule, by the share of optimizer steps done."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Apply the schedule before the first micro-batch of a step."""
        apply_schedule(kwargs["model"], self.schedule, state.global_step / state.max_steps)


def _inner(name: str, value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie between 0 and 1, got {value!r}")
    return float(value)


def _anneal(field: str, config: MoBAConfig, start: int, until: float, num_stages: int, length: int | None) -> Schedule:
    last: int = getattr(config, field)
    require_int("start", start, last)
    if require_int("num_stages", num_stages, 2) > MOST_STAGES:
        raise ValueError(f"num_stages must be at most {MOST_STAGES}, got {num_stages}")
    _inner("until", until)
    stages: list[tuple[float, MoBAConfig | None]] = []
    for i in range(num_stages):
        share = i / (num_stages - 1)
        moba = replace(config, **{field: round(start ** (1 - share) * last**share)})
        is_full = length is not None and moba.topk * moba.block_size >= length
        stage = None if is_full else moba
        if not stages or stages[-1][1] != stage:
            stages.append((until * share, stage))
    return Schedule(tuple(stages))
