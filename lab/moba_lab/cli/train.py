"""`moba train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moba_lab.checks import require_packages
from moba_lab.cli.options import OUT, Attention
from moba_lab.cli.session import describe, messages, quieten, say

if TYPE_CHECKING:
    from moba.hf.schedule import Schedule
    from moba_lab.train.recipe import Recipe

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A .toml file; recipes/ has some.")]
SetOption = Annotated[
    list[str],
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Replaces a value, such as training.tokens=1000000."),
]
DataOption = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Shards of `moba data`; the recipe's data.folder.")
]
OutOption = Annotated[
    str | None, typer.Option(*OUT, metavar="FOLDER", help="Checkpoints, logs and the model; the recipe's out.")
]
ContextOption = Annotated[
    int | None,
    typer.Option("--context-parallel", metavar="N", help="Processes that share each row: training.context_parallel."),
]
DryOption = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, print tokens, memory and disk that it will take, and stop.")
]


def train(
    recipe: RecipeArgument,
    change: SetOption = [],  # noqa: B006
    data: DataOption = None,
    out: OutOption = None,
    context_parallel: ContextOption = None,
    dry_run: DryOption = False,
) -> None:
    """Train a model with MoBA, or go on with a training that was interrupted.

    Examples:

        moba data data/mine --from texts/
        moba train recipes/activation.toml --data data/mine --out runs/first --dry-run
        moba train recipes/activation.toml --data data/mine --out runs/first
        accelerate launch --config_file recipes/fsdp2.yaml -m moba_lab train recipes/activation.toml …
        accelerate launch --num_processes 8 -m moba_lab train recipes/activation.toml --context-parallel 8 …

    The same command goes on from the newest checkpoint in its folder, with the losses an uninterrupted run would have.
    """
    require_packages("transformers", "accelerate")
    from moba_lab.train.recipe import read_recipe

    # A path as JSON writes it is a TOML string, whatever is in it.
    paths = {"data.folder": data, "out": out}
    changes = [*change, *(f"{key}={json.dumps(str(path))}" for key, path in paths.items() if path)]
    changes += [f"training.context_parallel={context_parallel}"] if context_parallel is not None else []
    settings = read_recipe(recipe, changes)
    if settings.lora is not None:
        require_packages("peft")
    _require_base(settings, recipe)
    _require_data(settings)
    quieten()
    if dry_run:
        _dry_run(settings)
        return
    import torch.distributed as dist

    from moba.parallel.process import end_process
    from moba_lab.train.run import train as run

    run(settings, say=say, callbacks=[_progress()])
    if dist.is_initialized():
        end_process()


def _require_base(recipe: Recipe, file: Path) -> None:
    """Refuse a base that another recipe beside this one makes, as long as it has not.

    Raises:
        ValueError: naming that recipe.
    """
    from moba_lab.train.recipe import read_recipe

    base = Path(recipe.model.base or "").expanduser()
    if base.exists():
        return
    for other in sorted(file.expanduser().parent.glob("*.toml")):
        try:
            out = read_recipe(other).out
        except (ValueError, OSError):
            continue
        if Path(out).expanduser() in base.parents:
            raise ValueError(f"model.base: there is no {base} yet: `moba train {other}` makes it")


def _require_data(recipe: Recipe) -> None:
    """Refuse a data folder that is not there yet, if the recipe says which command makes it.

    Raises:
        ValueError: naming that command.
    """
    folder, command = recipe.data.folder, recipe.data.made_by
    if command is not None and folder in command.split() and not Path(folder).expanduser().exists():
        raise ValueError(f"data.folder: there is no folder {folder} yet: `{command}` makes it")


def _dry_run(recipe: Recipe) -> None:
    from moba_lab.train.run import check_run

    rows, total, trained = check_run(recipe)
    training, context = recipe.training, recipe.data.context
    num_read, num_held = recipe.num_steps * training.rows_per_step, len(rows.rows)
    # Weights in fp32, with a bf16 copy of them under autocast; gradients and the optimizer's two moments in fp32.
    weights = total * (6 if training.precision == "bf16" else 4) + 12 * trained
    lines = {
        "model": f"{total / 1e6:,.1f}M parameters, {trained / 1e6:,.1f}M of them trained",
        "attention": _told(recipe.schedule),
        "tokens": f"{num_read * context:,} in {recipe.num_steps:,} steps of {training.rows_per_step} × {context:,}; "
        f"the data has {rows.num_tokens:,}, read {num_read / num_held:.2f} times; "
        f"{1 - rows.num_tokens / (num_held * context):.1%} padding",
        "memory": f"{weights / 2**30:.1f} GiB of weights, gradients and optimizer on one device, and the activations",
        # Checkpoints hold what is trained and its two moments; the model is written whole at the end.
        "disk": f"{((training.keep + 1) * 12 * trained + 4 * total) / 2**30:.1f} GiB for {training.keep} checkpoints, "
        "one being written, and the model",
    }
    for what, text in lines.items():
        typer.echo(f"{what:10}{text}")


def _told(schedule: Schedule) -> str:
    """The stages in words."""
    told = [
        (start, "full attention" if config is None else describe(config, Attention.moba))
        for start, config in schedule.stages
    ]
    return "; ".join(f"from {start:.1%} of the steps {how}" if start else how for start, how in told)


def _progress() -> Any:
    """A progress bar on a terminal, lines elsewhere."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        """Shows steps, loss, rate and attention."""

        def __init__(self) -> None:
            self._bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(), TimeRemainingColumn(), console=messages, disable=not messages.is_terminal,
            )  # fmt: skip
            self._task: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                self._bar.start()
                self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, text="")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self._task is not None:
                self._bar.update(self._task, completed=state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if self._task is None or not logs or "train_runtime" in logs:
                return
            text = ", ".join(f"{name} {logs[name]:.4g}" for name in logs if name == "loss" or name.endswith("_loss"))
            text += f", {logs['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in logs else ""
            self._bar.update(self._task, text=text)
            if self._bar.disable:
                say(f"step {state.global_step}/{state.max_steps}: {text}")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._bar.stop()

    return Bar()
