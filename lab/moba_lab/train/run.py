"""The recipe over transformers' Trainer: shards in, checkpoints, logs and a model out.

OUT/recipe.json     what decides the run; another recipe does not go on from it
OUT/log.jsonl       one line for each logged step and evaluation
OUT/tensorboard/    the same, to look at
OUT/checkpoint-N/   weights, optimizer, random state: complete, or not there
OUT/model/          the trained model, with its MoBA config and tokenizer
OUT/adapter/        with LoRA, whose weights OUT/model/ has merged: the adapter alone, as peft saves it
OUT/adapter.safetensors  the same in one small file, with the configs, for `--model` and `model.base`
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from moba.files import read_json, write_json
from moba.hf.schedule import MoBASchedule
from moba.parallel.models import cut_batch, parallelize
from moba.validate import first_line
from moba_lab.checks import require_folder
from moba_lab.data import Shards, open_shards, tokenizer_hash
from moba_lab.lines import locked
from moba_lab.train.checkpoints import UNFINISHED, check_architecture, check_files, last_checkpoint
from moba_lab.train.log import Log, tensorboard
from moba_lab.train.loss import use_fused_loss
from moba_lab.train.model import add_adapters, build_model, checkpoint_activations, compile_layers, num_parameters
from moba_lab.train.optimizer import learning_schedule, make_optimizer
from moba_lab.train.packing import PackedDataset, SharedRows, by_source, collate
from moba_lab.train.recipe import Recipe, same_run
from moba_lab.train.trainer import WholeTrainer, save_results

Say = Callable[[str], None]


def train(recipe: Recipe, *, say: Say = print, callbacks: list[TrainerCallback] | None = None) -> Path:
    """Run a recipe to its end, from the newest checkpoint in its folder if there is one.

    Under `accelerate launch` every process calls this.

    Args:
        recipe: what to train on what.
        say: prints a line about the run; only the first process calls it.
        callbacks: further ones of transformers' Trainer, such as a progress bar.

    Returns:
        the folder of the trained model.

    Raises:
        ValueError: for data, a model, or an earlier run in the folder that do not fit the recipe; another run that
            writes to the folder now; not enough memory.
        OSError: if something cannot be written; the newest checkpoint is as good as before.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    tell: Say = say if state.is_main_process else lambda text: None
    out = Path(recipe.out).expanduser()
    rows_at_a_time = _rows_at_a_time(recipe, state.num_processes)
    shards = open_shards(recipe.data.folder)
    shards.verify()
    rows = training_rows(recipe, shards)
    held_out = _held_out(recipe)
    require_folder("out", out)
    with _alone(out, state):
        checkpoint = _check_run(recipe, out, shards)
        model, tokenizer = build_model(recipe, shards.manifest)
        check_tokenizer(shards, model, tokenizer)
        if checkpoint is not None:
            check_architecture(checkpoint, model)
        _begin(recipe, out, shards, state)
        with _enough_memory(recipe):
            loss = use_fused_loss(model.to(state.device), recipe.training.loss)
        trained: Any = model if recipe.lora is None else add_adapters(model, recipe.lora)
        if recipe.training.recomputes:
            checkpoint_activations(model)
        if recipe.training.compile:
            compile_layers(model)
        total, learning = num_parameters(trained)
        tell(
            f"{total / 1e6:,.1f}M parameters, {learning / 1e6:,.1f}M of them trained; loss: {loss}; "
            f"{rows.num_tokens:,} tokens in {len(rows.rows):,} rows, {recipe.num_steps:,} steps"
        )
        tell("from the beginning" if checkpoint is None else f"going on from {checkpoint}")
        if tokenizer is None:
            tell("the tokenizer that made the data cannot be loaded here: the model will be saved without it")
        arguments = _arguments(recipe, out, rows_at_a_time, held_out)
        trainer = WholeTrainer(
            model=trained,
            args=arguments,
            **_data(recipe, arguments, rows, held_out, model, state),
            optimizers=(make_optimizer(recipe, trained), None),
            callbacks=[
                MoBASchedule(recipe.schedule),
                Log(out, recipe.training.rows_per_step * recipe.data.context),
                *tensorboard(out, checkpoint, state),
                *(callbacks or []),
            ],
        )
        trainer.tokenizer, trainer.tail = tokenizer, recipe.training.tail
        trainer.indexer_weight = None if recipe.indexer is None else recipe.indexer.weight
        trainer.remove_callback(PrinterCallback)
        with _enough_memory(recipe):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        save_results(trainer, trained, recipe)
        tell(f"trained: {out / 'model'}")
        return out / "model"


def check_run(recipe: Recipe) -> tuple[PackedDataset, int, int]:
    """The rows that `train` would read, the model's parameters, and those that are trained; nothing is written.

    Raises:
        ValueError: as `train` would.
    """
    shards = open_shards(recipe.data.folder)
    rows = training_rows(recipe, shards)
    model, tokenizer = build_model(recipe, shards.manifest)
    check_tokenizer(shards, model, tokenizer)
    return rows, *num_parameters(model if recipe.lora is None else add_adapters(model, recipe.lora))


def _rows_at_a_time(recipe: Recipe, num_processes: int) -> int:
    """Rows that all processes compute at once.

    Raises:
        ValueError: if the processes cannot share rows as the recipe says, or no whole number of times makes a step.
    """
    across = recipe.training.context_parallel
    if num_processes % across:
        raise ValueError(
            f"training.context_parallel = {across} needs a multiple of {across} processes, got {num_processes}: "
            f"start them with accelerate launch --num_processes {across} -m moba_lab train …"
        )
    rows = recipe.training.rows_at_once * num_processes // across
    if recipe.training.rows_per_step % rows:
        raise ValueError(
            f"training.rows_per_step must be a multiple of rows_at_once times {num_processes // across} "
            f"processes with rows of their own = {rows}, got {recipe.training.rows_per_step}"
        )
    return rows


def check_tokenizer(shards: Shards, model: PreTrainedModel, tokenizer: Any) -> None:
    """Check that the model reads the tokens that the shards were made of.

    Raises:
        ValueError: if it does not.
    """
    manifest = shards.manifest
    size = model.config.get_text_config(decoder=True).vocab_size
    if tokenizer is not None and tokenizer_hash(tokenizer) != manifest["tokenizer_hash"]:
        raise ValueError(
            f"tokenizer mismatch: {shards.folder} was made with the tokenizer of {manifest['tokenizer']}, not with "
            "this model's; build the data with `moba data --tokenizer` of the model"
        )
    if size < manifest["vocab_size"]:
        raise ValueError(
            f"tokenizer mismatch: {shards.folder} has a vocabulary of {manifest['vocab_size']:,}, the model of {size:,}"
        )


def training_rows(recipe: Recipe, shards: Shards) -> PackedDataset:
    """The rows that a training reads, in their order."""
    data = recipe.data
    return PackedDataset(
        shards, data.context, num_rows=recipe.num_steps * recipe.training.rows_per_step, seed=recipe.training.seed,
        sources=data.sources or None, min_length=data.min_length, whole_rows=data.whole_rows, span=data.span,
        tail=recipe.training.tail,
    )  # fmt: skip


def _held_out(recipe: Recipe) -> dict[str, PackedDataset] | None:
    """The first rows of each source's held-out documents."""
    if not recipe.training.evaluate_every:
        return None

    def make(shards: Shards, sources: list[str]) -> PackedDataset:
        return PackedDataset(shards, recipe.data.context, seed=None, sources=sources).first(recipe.data.held_out_rows)

    shards = open_shards(recipe.data.folder, "held_out")
    shards.verify()
    return by_source(make, shards)


def data_digest(shards: Shards) -> str:
    """Of the training shards' checksums: two runs with the same one read the same tokens."""
    return hashlib.sha256(json.dumps([shard["sha256"] for shard in shards.manifest["shards"]]).encode()).hexdigest()


def _check_run(recipe: Recipe, out: Path, shards: Shards) -> Path | None:
    """The newest checkpoint of the run in `out`, None if there is none.

    Raises:
        ValueError: if the run in `out` is of another recipe or other data, or not ours.
    """
    checkpoint = last_checkpoint(out)
    if checkpoint is None:
        return None
    path = out / "recipe.json"
    if not path.is_file():
        raise ValueError(
            f"{out} has checkpoints but no recipe.json: `moba train` did not write them; choose another out"
        )
    saved = read_json(path)
    if not isinstance(saved.get("recipe"), dict) or "data" not in saved:
        raise ValueError(f"{path}: not what `moba train` writes; choose another out")
    same_run(recipe, saved["recipe"])
    if saved["data"] != data_digest(shards):
        raise ValueError(f"{out} holds a run on other data than {recipe.data.folder} has now; choose another out")
    check_files(checkpoint)
    return checkpoint


@contextmanager
def _alone(out: Path, state: PartialState) -> Iterator[None]:
    """The run's folder, for this run alone, whose processes all go on once the first has it.

    Raises:
        ValueError: if another run is writing to it.
    """
    with locked(out) if state.is_main_process else nullcontext():
        state.wait_for_everyone()
        yield
        if state.is_main_process:
            shutil.rmtree(out / UNFINISHED, ignore_errors=True)


def _begin(recipe: Recipe, out: Path, shards: Shards, state: PartialState) -> None:
    """Say whose folder it is, and take away what a killed run left half written."""
    if state.is_main_process:
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        write_json(out / "recipe.json", {"recipe": recipe.to_dict(), "data": data_digest(shards)}, indent=1)
    state.wait_for_everyone()


def _arguments(
    recipe: Recipe, out: Path, rows_at_a_time: int, held_out: dict[str, PackedDataset] | None
) -> TrainingArguments:
    training = recipe.training
    schedule = learning_schedule(recipe)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=recipe.num_steps,
        per_device_train_batch_size=training.rows_at_once,
        # Trainer averages over batches, so that all must be of one size.
        per_device_eval_batch_size=math.gcd(training.rows_at_once, *map(len, (held_out or {}).values())),
        gradient_accumulation_steps=training.rows_per_step // rows_at_a_time,
        learning_rate=training.learning_rate,
        lr_scheduler_type=schedule.name,
        lr_scheduler_kwargs=schedule.options,
        warmup_steps=schedule.num_warmup_steps,
        weight_decay=training.weight_decay,
        adam_beta2=training.beta2,
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
        bf16=training.precision == "bf16",
        logging_steps=training.log_every,
        # Else every batch would wait for the GPU, and a loss that is no number would be left out of the log.
        logging_nan_inf_filter=False,
        eval_strategy="steps" if training.evaluate_every else "no",
        eval_steps=training.evaluate_every or None,
        prediction_loss_only=True,
        save_steps=training.save_every,
        save_total_limit=training.keep,
        seed=training.seed,
        # The rows bring their own order, which a resumed run finds again.
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    # On several GPUs without `accelerate launch`, Trainer would take DataParallel, which splits packed rows.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _data(
    recipe: Recipe,
    arguments: TrainingArguments,
    rows: PackedDataset,
    held_out: dict[str, PackedDataset] | None,
    model: PreTrainedModel,
    state: PartialState,
) -> dict[str, Any]:
    """What Trainer reads; where several processes share a row, the model is told to attend across them."""
    across = recipe.training.context_parallel
    if across == 1:
        return {"train_dataset": rows, "eval_dataset": held_out, "data_collator": collate}
    shape = (state.num_processes // across, across)
    group = init_device_mesh(state.device.type, shape, mesh_dim_names=("data", "context"))["context"]
    parallelize(model, group, transport=recipe.training.transport)
    eval_batch = arguments.per_device_eval_batch_size
    return {
        "train_dataset": SharedRows(rows, across, arguments.per_device_train_batch_size),
        "eval_dataset": held_out and {name: SharedRows(some, across, eval_batch) for name, some in held_out.items()},
        "data_collator": lambda rows: cut_batch(collate(rows), group.get_local_rank(), across),
    }


@contextmanager
def _enough_memory(recipe: Recipe) -> Iterator[None]:
    """Say what takes less where the device has too little memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"not enough GPU memory for {recipe.training.rows_at_once} rows of {recipe.data.context:,} tokens at once: "
            "lower training.rows_at_once or data.context, keep training.checkpoint_activations, or use [lora] or "
            f"several GPUs; the run goes on from its last checkpoint ({first_line(error)})"
        ) from error
