"""What closes MoBA's gap to dense attention, trained from random weights? One recipe, arms that differ in attention.

    python benchmarks/from_scratch.py train dense:0 moba:0 dense:1 moba:1 --out runs/gap.jsonl
    python benchmarks/from_scratch.py report runs/gap.jsonl --out benchmarks/results/gap-h200

A run is an arm and a seed: of the weights and of the rows' order, which are the same for all arms. `train` tries each
arm for some steps, then trains, measures on held-out rows, and appends a line for every run that has ended. It goes on
where it was; an arm that fails is left out. `report` compares arms with dense seed by seed.
"""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import torch._dynamo
import typer
from from_scratch_measure import HeldOut, fastest_dense, flops
from from_scratch_report import report
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import get_scheduler

from moba import MoBAConfig
from moba.hf import provide_route_by, set_moba_config
from moba.hf.attention_modules import attentions
from moba.hf.indexer_training import indexer_loss
from moba.hf.schedule import Schedule, apply_schedule
from moba_lab.bench.machine import describe
from moba_lab.data import Shards, open_shards
from moba_lab.train.loss import cross_entropy
from moba_lab.train.model import build_model, compile_layers, num_parameters
from moba_lab.train.optimizer import learning_schedule, make_optimizer
from moba_lab.train.recipe import Recipe, read_recipe
from moba_lab.train.run import training_rows

app = typer.Typer(add_completion=False, help=__doc__)

_START = ["attention.schedule=activation", "attention.at=0.1"]
ARMS: dict[str, list[str]] = {
    "dense": ["attention.schedule=full"],
    "moba": [],
    "recent": ["attention.keep_recent=1"],
    "recent, dense start": ["attention.keep_recent=1", *_START],
    "mixed": ["attention.schedule=mixed", "attention.every=8"],
    "dense start": _START,
    # Windows with rotary positions before each layer of MoBA, which has none.
    "local": ["model.architecture=smollm3", "model.shape.use_sliding_window=true"],
    # Its loss cannot be compiled.
    "indexer": ["attention.router=indexer", "training.compile=false"],
    # Routed by random queries and keys.
    "random": ["attention.router=unrotated"],
    "64x16": ["attention.block_size=64", "attention.topk=16"],
}
# Of an H200 in bf16.
PEAK = 989e12
# Steps that each stage of an arm is tried for: what is compiled in, and what is timed.
WARM, TIMED = 4, 16
# Seconds, roughly, that decide whether a run fits.
COMPILING, MEASURING = 30.0, 8.0


def arm_recipe(path: Path, arm: str, seed: int, changes: list[str]) -> Recipe:
    """The recipe of a run."""
    changes = [*changes, f"training.seed={seed}"]
    base = read_recipe(path, changes)
    more = []
    if arm == "indexer":
        more = [f"indexer={{warmup_steps={max(1, base.num_steps // 10)}}}"]
    if arm == "local":
        kinds = ["sliding_attention", "full_attention"] * (base.model.shape["num_hidden_layers"] // 2)
        more = [
            f"model.shape.sliding_window={base.data.context // 8}",
            f"model.shape.layer_types={json.dumps(kinds)}",
            f"model.shape.no_rope_layers={json.dumps([int(kind != 'full_attention') for kind in kinds])}",
        ]
    return read_recipe(path, [*changes, *ARMS[arm], *more])


class Training:
    """A run's model, its optimizer, and steps on rows that lie on the device."""

    def __init__(self, recipe: Recipe, arm: str, shards: Shards, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.dtype = torch.bfloat16 if device.type == "cuda" and recipe.training.precision == "bf16" else torch.float32
        model, _ = build_model(recipe, shards.manifest)
        if arm == "random":
            for module in attentions(model):
                provide_route_by(module, "unrotated", lambda module, q, k: (torch.randn_like(q), torch.randn_like(k)))
        self.model: Any = model.to(device)
        if recipe.training.compile:
            compile_layers(model)
        self.optimizer: Any = make_optimizer(recipe, model)
        name, options, num_warmup_steps = learning_schedule(recipe)
        self.learning_rate = get_scheduler(name, self.optimizer, num_warmup_steps, recipe.num_steps, options)
        # Compiled, it reads the logits in bf16.
        self.loss = torch.compile(cross_entropy) if recipe.training.compile else cross_entropy

    def precision(self) -> AbstractContextManager[Any]:
        """As the recipe says, on a GPU."""
        return torch.autocast("cuda", self.dtype) if self.dtype == torch.bfloat16 else nullcontext()

    def step(self, rows: Tensor) -> Tensor:
        """One step on rows int [R, T]; the loss."""
        total = torch.zeros((), device=self.device)
        parts = rows.long().split(self.recipe.training.rows_at_once)
        for part in parts:
            with self.precision():
                hidden = self.model.base_model(input_ids=part, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
                weight, labels = self.model.get_output_embeddings().weight, part[:, 1:].flatten()
                loss = self.loss(hidden, weight, labels, self.dtype) / (len(parts) * len(labels))
            total += loss.detach()
            if self.recipe.indexer is not None:
                loss = loss + self.recipe.indexer.weight * indexer_loss(self.model) / len(parts)
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.training.max_grad_norm)
        self.optimizer.step()
        self.learning_rate.step()
        self.optimizer.zero_grad()
        return total


def run_steps(training: Training, rows: Tensor, schedule: Schedule | None, warm: int) -> tuple[Tensor, float]:
    """Train on rows [steps, R, T], by a schedule or as the model is; the losses, and seconds of a step after `warm`."""
    losses = torch.zeros(len(rows), device=rows.device)
    begin = 0.0
    for step, part in enumerate(rows):
        if step == warm:
            wait(rows.device)
            begin = time.perf_counter()
        if schedule is not None:
            apply_schedule(training.model, schedule, step / len(rows))
        losses[step] = training.step(part)
    wait(rows.device)
    return losses, (time.perf_counter() - begin) / max(1, len(rows) - warm)


def try_arm(recipe: Recipe, arm: str, shards: Shards, rows: Tensor, device: torch.device) -> float:
    """Seconds of a step, averaged over the training's stages; everything is compiled then.

    Raises:
        ValueError: if a loss is no number.
    """
    training = Training(recipe, arm, shards, device)
    schedule = recipe.schedule
    starts = [*(start for start, _ in schedule.stages), 1.0]
    shares: dict[MoBAConfig, float] = {}
    num_layers = recipe.model.shape["num_hidden_layers"]
    for start, stop in pairwise(starts):
        config = schedule.at(start, num_layers)
        shares[config] = shares.get(config, 0.0) + stop - start
    result = 0.0
    for config, share in shares.items():
        begin = time.perf_counter()
        set_moba_config(training.model, config)
        losses, seconds = run_steps(training, rows[: WARM + TIMED], None, WARM)
        said = f"{losses[0]:.3f} … {losses[-1]:.3f}"
        if not losses.isfinite().all():
            raise ValueError(f"{arm}: the loss is no number: {losses.tolist()}")
        first = time.perf_counter() - begin - TIMED * seconds
        name = "full" if config.full_layers == num_layers else f"{config.block_size} x {config.topk}"
        tell(f"{arm}, {name}: {rows[0].numel() / seconds:,.0f} tokens/s, first steps {first:.0f} s, loss {said}")
        result += share * seconds
    return result


def train_run(recipe: Recipe, arm: str, shards: Shards, held_out: HeldOut, device: torch.device) -> dict[str, Any]:
    """Train and measure one run; its record."""
    begin = time.perf_counter()
    rows = read_rows(recipe, shards, recipe.num_steps, device)
    training = Training(recipe, arm, shards, device)
    losses, seconds = run_steps(training, rows, recipe.schedule, min(WARM, recipe.num_steps - 1))
    trained = time.perf_counter() - begin
    # Reading is short, and would be compiled once more.
    training.model.eval()
    with torch.compiler.set_stance("force_eager"):
        measured = held_out.measure(training)
    rate = rows[0].numel() / seconds
    return {
        "arm": arm,
        "seed": recipe.training.seed,
        **measured,
        "train": [round(loss, 4) for loss in losses.tolist()],
        "tokens_per_s": rate,
        "flops_share": rate * flops(recipe, training.model) / PEAK,
        "parameters": num_parameters(training.model)[0],
        "seconds": {"training": trained, "measuring": time.perf_counter() - begin - trained},
        "memory": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "recipe": recipe.to_dict(),
        "header": describe(device),
    }


def read_rows(recipe: Recipe, shards: Shards, steps: int, device: torch.device) -> Tensor:
    """The rows of a training's first steps: int32 [steps, rows_per_step, context]."""
    rows, count = training_rows(recipe, shards), recipe.training.rows_per_step
    tokens = [rows[i]["input_ids"].int() for i in range(steps * count)]
    return torch.stack(tokens).view(steps, count, -1).to(device)


class Runs:
    """The arms of a command as they are tried and trained; every run that ends becomes a line of a file."""

    def __init__(self, path: Path, changes: list[str], out: Path, num_rows: int, device: torch.device) -> None:
        self.path, self.changes, self.out, self.device = path, changes, out, device
        done = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
        self.ended = {(record["arm"], record["seed"]) for record in done}
        self.broken = {record["arm"] for record in done if "error" in record}
        self.seconds: dict[str, float] = {}  # of a run of each arm that was tried
        self.eager: set[str] = set()  # arms that torch.compile cannot compile
        plain = self._recipe("moba", 0)
        fixed = {"optimizer": "muon", "learning_schedule": "cosine", "checkpoint_activations": False}
        if other := [name for name, value in fixed.items() if getattr(plain.training, name) != value]:
            raise typer.BadParameter(f"training.{other[0]} must be {fixed[other[0]]!r} here")
        self.shards = open_shards(plain.data.folder)
        self.held_out = HeldOut(Path(plain.data.folder), plain.data.context, num_rows)
        self.first_rows = read_rows(plain, self.shards, WARM + TIMED, device)
        self.dense_backends = fastest_dense(plain, device) if device.type == "cuda" else []
        out.parent.mkdir(parents=True, exist_ok=True)

    def try_once(self, arm: str) -> None:
        """Find out how long a run of this arm takes, unless that is known or the arm is broken."""
        if arm in self.seconds or arm in self.broken:
            return
        recipe = self._recipe(arm, 0)
        took = self._attempt(try_arm, recipe, arm, self.first_rows, may_fail=recipe.training.compile)
        if took is None and arm not in self.broken:
            # Slower, but the comparison is the same.
            tell(f"{arm}: tried again without torch.compile")
            self.eager.add(arm)
            took = self._attempt(try_arm, self._recipe(arm, 0), arm, self.first_rows)
        if took is not None:
            self.seconds[arm] = took * recipe.num_steps + MEASURING

    def train(self, arm: str, seed: int) -> dict[str, Any] | None:
        """Train and measure a run; its record, None if it fails."""
        begin = time.perf_counter()
        record: dict[str, Any] | None = self._attempt(train_run, self._recipe(arm, seed), arm, self.held_out)
        if record is not None:
            self._write(record)
            self.seconds[arm] = time.perf_counter() - begin
        return record

    def _recipe(self, arm: str, seed: int) -> Recipe:
        eager = ["training.compile=false"] if arm in self.eager else []
        return arm_recipe(self.path, arm, seed, [*self.changes, *eager])

    def _attempt(self, what: Callable[..., Any], recipe: Recipe, arm: str, given: Any, may_fail: bool = False) -> Any:
        """The result; None if it fails, which breaks the arm unless it may."""
        # cuDNN's masks are slower, where it takes them.
        is_masked = self.device.type == "cuda" and arm == "local"
        try:
            with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if is_masked else nullcontext():
                return what(recipe, arm, self.shards, given, self.device)
        except Exception as error:
            traceback.print_exc()
            message = f"{type(error).__name__}: {error}"[:2000]
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        # Fails, and ends the process, where the error has left the GPU unusable.
        wait(self.device)
        if not may_fail:
            self.broken.add(arm)
            self._write({"arm": arm, "seed": recipe.training.seed, "error": message})
        return None

    def _write(self, record: dict[str, Any]) -> None:
        with self.out.open("a") as file:
            file.write(json.dumps(record) + "\n")


@app.command()
def train(
    runs: Annotated[list[str], typer.Argument(help="ARM:SEED, in this order.")],
    out: Annotated[Path, typer.Option(help="A .jsonl file, which runs are added to.")],
    recipe: Annotated[Path, typer.Option(help="A recipe of MoBA.")] = Path("recipes/gap.toml"),
    settings: Annotated[list[str] | None, typer.Option("-s", help="key=value, changes of the recipe.")] = None,
    rows: Annotated[int, typer.Option(help="Held-out rows of each source.", min=2)] = 32,
    try_first: Annotated[int, typer.Option(help="So many arms are tried before the first run.", min=0)] = 4,
    minutes: Annotated[float, typer.Option(help="A run that would end later is not begun.")] = 1e9,
) -> None:
    """Train and measure runs."""
    begin = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Every arm's attention is compiled for itself, and layers share their code.
    torch._dynamo.config.recompile_limit = 64
    wanted = [(arm, int(seed)) for arm, _, seed in (run.rpartition(":") for run in runs)]
    if unknown := sorted({arm for arm, _ in wanted} - set(ARMS)):
        raise typer.BadParameter(f"there is no arm {unknown[0]!r}; arms: {', '.join(ARMS)}")
    known = Runs(recipe, settings or [], out, rows, device)
    left = [run for run in wanted if run not in known.ended]
    with sdpa_kernel(known.dense_backends, set_priority=True) if known.dense_backends else nullcontext():
        for arm in list(dict.fromkeys(arm for arm, _ in left))[:try_first]:
            known.try_once(arm)
        for arm, seed in left:
            now = time.perf_counter() - begin
            # What an arm takes that was not tried is not known yet, but for what compiling takes.
            least = min(known.seconds.values(), default=0.0) + (COMPILING if arm not in known.seconds else 0.0)
            if now + least < 60 * minutes:
                known.try_once(arm)
            now = time.perf_counter() - begin
            if arm in known.broken or arm not in known.seconds or now + known.seconds[arm] * 1.03 > 60 * minutes:
                tell(f"{arm}, seed {seed}: left out after {now:.0f} s")
            elif (record := known.train(arm, seed)) is not None:
                took = known.seconds[arm]
                tell(told(record) + f"; {took:.0f} s, {now + took:.0f} s in all")


def told(record: dict[str, Any]) -> str:
    """A run in a line."""
    losses = ", ".join(f"{source} {loss:.4f}" for source, loss in record["loss"].items())
    rate = f"{record['tokens_per_s']:,.0f} tokens/s, {record['flops_share']:.0%} of the peak"
    return f"{record['arm']}, seed {record['seed']}: {losses}; covered {record.get('covered')}; {rate}"


def wait(device: torch.device) -> None:
    """Until a GPU has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tell(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


@app.command("report")
def write(
    files: Annotated[list[Path], typer.Argument(help="What `train` wrote, or an earlier report's .json.")],
    out: Annotated[Path, typer.Option(help="PREFIX of .json, .md and .png.")],
) -> None:
    """Compare runs."""
    report(files, out)


if __name__ == "__main__":
    app()
