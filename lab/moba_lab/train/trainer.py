"""transformers' Trainer, whose checkpoints and models are whole or not there, whatever happens as they are written, and
which can learn from the ends of long rows alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from moba.hf.graph import cache_name
from moba.hf.indexer_training import indexer_loss
from moba.validate import first_line
from moba_lab.models.adapters import write_adapter
from moba_lab.train.checkpoints import UNFINISHED, last_checkpoint, move_into_place
from moba_lab.train.recipe import Recipe


class WholeTrainer(Trainer):
    """A Trainer whose checkpoints appear whole.

    Attributes:
        tokenizer: saved with every checkpoint, so that each can be evaluated; None where there is none.
        indexer_weight: of the indexers' loss, which is added to the model's; None where there are none.
        tail: of rows with more tokens only the last so many are learned (see `read_before`); None: all.
    """

    tokenizer: Any = None
    indexer_weight: float | None = None
    tail: int | None = None
    _indexer_loss: Tensor | None = None
    _draft: Path | None = None

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As transformers', of the tail alone while training; evaluations read whole rows."""
        if self.tail is not None and model.training and inputs["input_ids"].shape[1] > self.tail:
            inputs = read_before(model, inputs, self.tail)
        result: Any = super().compute_loss(model, inputs, *args, **kwargs)
        if self.indexer_weight is None or not model.training:
            return result
        loss = indexer_loss(model)
        self._indexer_loss = loss.detach()
        # The model's loss is the micro-batch's part of the step's where it was given the step's number of labels.
        if self.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None:
            loss = loss / self.current_gradient_accumulation_steps
        return result + self.indexer_weight * loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As transformers', with the indexers' loss in the last micro-batch, without its weight."""
        if "loss" in logs and self._indexer_loss is not None:
            logs["indexer_loss"] = self._indexer_loss.item()
        super().log(logs, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.args.output_dir if self._draft is None else self._draft)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        out = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        self._draft = out / UNFINISHED
        try:
            super()._save_checkpoint(model, trial)
            if self.tokenizer is not None and self.args.should_save:
                self.tokenizer.save_pretrained(self._draft / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                move_into_place(self._draft / name, out / name)
                rotate_checkpoints(output_dir=str(out), save_total_limit=self.args.save_total_limit, use_mtime=False)
        except Exception as error:
            free = shutil.disk_usage(out).free
            shutil.rmtree(self._draft, ignore_errors=True)
            last = last_checkpoint(out)
            raise OSError(
                f"{name} could not be saved, {free / 2**30:.1f} GiB were free on the disk: {first_line(error)}; "
                + ("there is no earlier one" if last is None else f"{last.name} is whole, and the run goes on from it")
            ) from error
        finally:
            self._draft = None
        self.accelerator.wait_for_everyone()


def read_before(model: nn.Module, inputs: dict[str, Any], tail: int) -> dict[str, Any]:
    """Read all but the last tokens of rows as a prompt is read, without gradients, into a cache.

    Queries, keys and values of the tail then learn; the text before it is what they look back at, at the cost of
    reading it once.

    Args:
        model: a causal language model.
        inputs: input_ids and labels [B, T]; `skipped` [B], if there, are the positions skipped before the tail.
        tail: tokens of a row that are left, < T.

    Returns:
        what the model reads now: input_ids, labels and position_ids [B, tail], and its cache.
    """
    input_ids, labels = inputs["input_ids"], inputs["labels"]
    num_read = input_ids.shape[1] - tail
    positions: Tensor = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    rest = positions[:, num_read:] + (inputs["skipped"][:, None] if "skipped" in inputs else 0)
    name = cache_name(model)
    with torch.no_grad():
        read = model(
            input_ids=input_ids[:, :num_read], position_ids=positions[:, :num_read], use_cache=True, logits_to_keep=1
        )
    return {
        "input_ids": input_ids[:, num_read:],
        "labels": labels[:, num_read:],
        "position_ids": rest,
        name: getattr(read, name),
        "use_cache": True,
    }


def save_results(trainer: WholeTrainer, model: Any, recipe: Recipe) -> None:
    """Write OUT/model, with the trainer's tokenizer, and with LoRA the adapter; all processes call it.

    Args:
        trainer: that has trained.
        model: what it trained, adapters included.
        recipe: of the run.

    Raises:
        OSError: if something cannot be written; the checkpoints are as good as before.
    """
    out = Path(str(trainer.args.output_dir))

    def save(folder: str) -> None:
        if recipe.lora is None:
            trainer.save_model(folder)
        elif trainer.args.should_save:
            model.merge_and_unload().save_pretrained(folder)
        if trainer.tokenizer is not None and trainer.args.should_save:
            trainer.tokenizer.save_pretrained(folder)

    if recipe.lora is not None:
        _replace(trainer, out / "adapter", trainer.save_model)
        if trainer.args.should_save:
            scale = recipe.lora.alpha / recipe.lora.rank
            config = model.config.get_text_config(decoder=True)
            write_adapter(out / "adapter", config, str(recipe.model.base), scale, out / "adapter.safetensors")
    _replace(trainer, out / "model", save)


def _replace(trainer: Trainer, target: Path, save: Callable[[str], None]) -> None:
    """`save` into a folder that then takes the place of `target`; all processes take part, the first moves it."""
    draft = target.parent / UNFINISHED / target.name
    try:
        save(str(draft))
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            move_into_place(draft, target)
    except Exception as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise OSError(f"{target} could not be saved: {first_line(error)}; the checkpoints are whole") from error
    trainer.accelerator.wait_for_everyone()
