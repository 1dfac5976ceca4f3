"""What a training tells while it runs: OUT/log.jsonl, and the same for TensorBoard where it is installed."""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moba.files import replacing
from moba.hf import get_moba_config
from moba_lab.lines import NOT_OURS
from moba_lab.train.checkpoints import step_of


class Log(TrainerCallback):
    """OUT/log.jsonl: what Trainer logs, with the tokens read so far, their rate, and the attention that holds."""

    def __init__(self, out: Path, tokens_per_step: int) -> None:
        self._path = out / "log.jsonl"
        self._tokens_per_step = tokens_per_step
        self._since = (0.0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what a run that was killed logged after its last checkpoint."""
        self._since = (time.perf_counter(), state.global_step)
        if not state.is_world_process_zero or not self._path.is_file():
            return
        # What is behind the last end of a line was being written.
        *lines, _ = self._path.read_bytes().split(b"\n")
        kept = [
            line + b"\n" for number, line in enumerate(lines, start=1) if self._step(line, number) <= state.global_step
        ]
        with replacing(self._path) as file:
            file.writelines(kept)

    def _step(self, line: bytes, number: int) -> int:
        """The step of a line of the log."""
        try:
            return int(json.loads(line)["step"])
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ValueError(f"{self._path}, line {number}: {NOT_OURS}; remove it to go on without it") from None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a line."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        if "loss" in logs:
            (then, step), now = self._since, time.perf_counter()
            self._since = (now, state.global_step)
            logs["tokens_per_s"] = round((state.global_step - step) * self._tokens_per_step / (now - then), 1)
        config = get_moba_config(kwargs["model"])
        record = {"step": state.global_step, "tokens": state.global_step * self._tokens_per_step, **logs}
        if config is not None:
            record["attention"] = {
                "block_size": config.block_size, "topk": config.topk, "full_layers": config.full_layers
            }  # fmt: skip
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """An evaluation's time is not the training's."""
        self._since = (time.perf_counter(), state.global_step)


def tensorboard(out: Path, checkpoint: Path | None, state: PartialState) -> list[TrainerCallback]:
    """The callback that writes OUT/tensorboard behind a checkpoint's step; none without the package."""
    if not state.is_main_process or find_spec("tensorboard") is None:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    # What a killed run wrote behind its last checkpoint is hidden.
    step = 0 if checkpoint is None else step_of(checkpoint)
    return [TensorBoardCallback(SummaryWriter(str(out / "tensorboard"), purge_step=step + 1))]
