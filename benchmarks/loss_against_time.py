"""Which attention gets further in the same time? Dense and MoBA train for the same seconds, from the same weights.

    python benchmarks/loss_against_time.py train dense moba --seconds 120 --out runs/time.jsonl
    python benchmarks/loss_against_time.py report runs/time.jsonl --out benchmarks/results/time-64k-h200

Long contexts are trained last, so both arms go on from one dense training at 8K tokens (`--start-seconds`; 0: random
weights). Only training steps count as time: compiling, and reading held-out rows, do not. The learning rate follows the
time, too. A line is written at every moment when held-out rows are read.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import torch._dynamo
import typer
from from_scratch import PEAK, WARM, Training, read_rows, tell, wait
from from_scratch_measure import HeldOut, fastest_dense, flops
from loss_against_time_report import report
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from moba_lab.bench.machine import describe
from moba_lab.data import Shards, open_shards
from moba_lab.train.model import num_parameters
from moba_lab.train.recipe import Recipe, read_recipe

app = typer.Typer(add_completion=False, help=__doc__)

# Shares of the time after which held-out rows are read.
MOMENTS = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
# What the learning rate falls to.
FINAL = 0.1
START_CONTEXT = 8192
# Seconds between lines of progress.
EVERY = 10.0


def arm_recipe(path: Path, arm: str, changes: list[str]) -> Recipe:
    """The recipe of an arm: "dense", "moba" as the file has it, or MoBA with other blocks, such as "128x8".

    Raises:
        ValueError: for another arm, or one whose attention or optimizer changes while it trains.
    """
    (block_size, _, topk), more = arm.partition("x"), []
    if arm == "dense":
        more = ["attention.schedule=full"]
    elif block_size.isdecimal() and topk.isdecimal():
        more = [f"attention.block_size={block_size}", f"attention.topk={topk}"]
    elif arm != "moba":
        raise ValueError(f"an arm is dense, moba or BLOCK_SIZExTOPK, got {arm!r}")
    recipe = read_recipe(path, [*changes, *more])
    if len(recipe.schedule.stages) > 1:
        raise ValueError(f"attention.schedule must be throughout or full here, got {recipe.attention.schedule!r}")
    if recipe.training.optimizer != "muon" or recipe.indexer is not None:
        raise ValueError("the optimizer is muon here, and an indexer is not trained")
    return recipe


class LongRows(HeldOut):
    """Held-out rows, read between steps."""

    def losses(self, training: Training) -> dict[str, dict[str, Any]]:
        """Loss by source: of whole rows, of their last quarters, and of 16 parts of a row."""
        result: dict[str, dict[str, Any]] = {"loss": {}, "last": {}, "positions": {}}
        training.model.eval()
        # Else reading would be compiled, too.
        with torch.compiler.set_stance("force_eager"):
            for source, rows in self.rows.items():
                losses = self._read(training, rows).double()
                result["loss"][source] = losses.mean().item()
                result["last"][source] = losses[:, -(rows.shape[1] // 4) :].mean().item()
                result["positions"][source] = [round(x.mean().item(), 4) for x in losses.tensor_split(16, dim=1)]
        training.model.train()
        return result


class Clock:
    """Stands where a training expects its schedule of steps; the learning rate follows the share of the time."""

    def __init__(self, training: Training, warmup: float, final: float) -> None:
        self.warmup, self.final = warmup, final
        self.groups = training.optimizer.param_groups
        self.peak = training.recipe.training.learning_rate

    def set(self, share: float) -> None:
        """Set the learning rate for a share of the time, 0 … 1."""
        falling = (max(0.0, share - self.warmup)) / (1 - self.warmup)
        scale = self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, falling)))
        # The first step learns, too.
        scale *= min(1.0, (share + 1e-3) / self.warmup) if self.warmup else 1.0
        for group in self.groups:
            group["lr"] = self.peak * scale

    def step(self) -> None:
        """A step does not change the learning rate."""


def train_for(
    training: Training, rows: Tensor, seconds: float, warmup: float, final: float
) -> Iterator[dict[str, Any]]:
    """Train on rows [steps, R, T], again from the first after the last, for so many seconds.

    Time stands still while the caller holds a record.

    Yields:
        at every moment: the seconds, steps and tokens until then, and [seconds, loss] of each step since the last.
    """
    clock = Clock(training, warmup, final)
    training.learning_rate = clock
    spent, steps, told = 0.0, 0, 0.0
    for moment in MOMENTS:
        losses, times = [], []
        ahead: deque[torch.cuda.Event] = deque()
        wait(training.device)
        begin = time.perf_counter()
        while (now := spent + time.perf_counter() - begin) < moment * seconds:
            clock.set(now / seconds)
            losses.append(training.step(rows[steps % len(rows)]))
            times.append(now)
            steps += 1
            if training.device.type == "cuda":
                # The clock of this process is at most one step ahead of the GPU's.
                ahead.append(torch.cuda.current_stream().record_event())
                if len(ahead) > 1:
                    ahead.popleft().synchronize()
            if now - told > EVERY and len(losses) > 1:
                told, tokens = now, steps * rows[0].numel()
                tell(f"  {now:.0f} s, {tokens:,} tokens, {tokens / now:,.0f} tokens/s, loss {losses[-2].item():.3f}")
        wait(training.device)
        spent += time.perf_counter() - begin
        values = torch.stack(losses).tolist() if losses else []
        train = [[round(at, 3), round(value, 4)] for at, value in zip(times, values, strict=True)]
        yield {"seconds": spent, "steps": steps, "tokens": steps * rows[0].numel(), "train": train}


def weights(training: Training) -> dict[str, Any]:
    """A copy of the weights and the optimizer's state."""
    return copy.deepcopy({"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()})


def restore(training: Training, saved: dict[str, Any]) -> None:
    """Set weights and optimizer to a copy of what was saved."""
    training.model.load_state_dict(saved["model"])
    training.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))


def prepare(
    recipe: Recipe, arm: str, shards: Shards, rows: Tensor, start: dict[str, Any] | None, held_out: LongRows | None
) -> Training:
    """A training at its start, whose steps are compiled, after reading held-out rows, too."""
    training = Training(recipe, arm, shards, rows.device)
    saved = weights(training) if start is None else start
    begin = time.perf_counter()
    for _ in range(2):
        for part in rows[:WARM]:
            training.step(part)
        if held_out is not None:
            held_out.losses(training)
    wait(rows.device)
    tell(f"{arm}: {num_parameters(training.model)[0]:,} parameters, first steps {time.perf_counter() - begin:.0f} s")
    restore(training, saved)
    return training


def train_start(recipe: Recipe, shards: Shards, seconds: float, device: torch.device) -> dict[str, Any]:
    """Weights after so many seconds of dense training on short rows; the learning rate rises and stays."""
    rows = read_rows(recipe, shards, recipe.num_steps, device)
    training = prepare(recipe, "dense", shards, rows, None, None)
    for moment in train_for(training, rows, seconds, recipe.training.warmup, 1.0):
        last = moment
    tell(f"start: {last['tokens']:,} tokens in {last['seconds']:.1f} s")
    return {**weights(training), "about": {**last, "context": recipe.data.context}}


@app.command()
def train(
    arms: Annotated[list[str], typer.Argument(help="dense, moba, or BLOCK_SIZExTOPK, in this order.")],
    out: Annotated[Path, typer.Option(help="A .jsonl file, which moments are added to.")],
    seconds: Annotated[float, typer.Option(help="Of training, for each arm.", min=0.1)] = 120.0,
    start_seconds: Annotated[float, typer.Option(help="Of training on short rows before; 0: none.", min=0)] = 20.0,
    recipe: Annotated[Path, typer.Option(help="A recipe of MoBA.")] = Path("recipes/long.toml"),
    settings: Annotated[list[str] | None, typer.Option("-s", help="key=value, changes of the recipe.")] = None,
    rows: Annotated[int, typer.Option(help="Held-out rows of each source.", min=1)] = 8,
) -> None:
    """Train each arm for the same time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch._dynamo.config.recompile_limit = 64
    changes = settings or []
    try:
        recipes = {arm: arm_recipe(recipe, arm, changes) for arm in arms}
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    plain = next(iter(recipes.values()))
    shards = open_shards(plain.data.folder)
    shards.verify()
    held_out = LongRows(Path(plain.data.folder), plain.data.context, rows)
    read = read_rows(plain, shards, plain.num_steps, device)
    out.parent.mkdir(parents=True, exist_ok=True)
    with sdpa_kernel(fastest_dense(plain, device), set_priority=True) if device.type == "cuda" else nullcontext():
        start = None
        if start_seconds:
            context = min(START_CONTEXT, plain.data.context)
            count = plain.training.rows_per_step * plain.data.context // context
            short = [f"data.context={context}", f"training.rows_per_step={count}", f"training.rows_at_once={count}"]
            start = train_start(arm_recipe(recipe, "dense", [*changes, *short]), shards, start_seconds, device)
        for arm, made in recipes.items():
            gc.collect()
            # Else sizes that differ from the last training's would be compiled as variables.
            torch.compiler.reset()
            training = prepare(made, arm, shards, read, start, held_out)
            warmup = made.training.warmup if start is None else 0.0
            for moment in train_for(training, read, seconds, warmup, FINAL):
                peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
                measured = held_out.losses(training)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats(device)
                record = {"arm": arm, "context": made.data.context, "seed": made.training.seed, **moment, **measured}
                if moment["seconds"] >= seconds:
                    share = moment["tokens"] / moment["seconds"] * flops(made, training.model) / PEAK
                    record |= {"flops_share": share, "memory": peak, "parameters": num_parameters(training.model)[0]}
                    record |= {"start": start["about"] if start else None, "recipe": made.to_dict()}
                    record["header"] = describe(device)
                with out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                said = ", ".join(f"{source} {loss:.4f}" for source, loss in measured["loss"].items())
                tell(f"{arm}: {moment['seconds']:.1f} s, {moment['steps']} steps, held-out {said}")


@app.command("report")
def write(
    files: Annotated[list[Path], typer.Argument(help="What `train` wrote, or an earlier report's .json.")],
    out: Annotated[Path, typer.Option(help="PREFIX of .json, .md and .png.")],
) -> None:
    """Compare arms at the same time, and after the same tokens."""
    report(files, out)


if __name__ == "__main__":
    app()
