"""Checkpoints that are whole or not there: written beside their place, moved into it once nothing is missing."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from moba.files import read_json

UNFINISHED = "unfinished"
# What makes two models of one architecture and size.
_SHAPE = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads")  # fmt: skip
# The files that a run goes on from beside its weights. Under FSDP and DeepSpeed the optimizer's have other names.
_NEEDED = {
    "optimizer.pt": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    "scheduler.pt": ("scheduler.pt",),
    "trainer_state.json": ("trainer_state.json",),
}


def all_checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folders = [path for path in out.glob("checkpoint-*") if path.is_dir()]
    return sorted((path for path in folders if re.fullmatch(r"checkpoint-\d+", path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint of a run, None before the first."""
    return next(reversed(all_checkpoints(out)), None)


def move_into_place(draft: Path, target: Path) -> None:
    """Bring a folder's files to the disk and give it the name it shall have.

    Its files become as readable as the folder: safetensors' own nobody else could read, whatever the umask says.

    Raises:
        OSError: if the disk is full or the folder cannot be moved; `target` is then what it was.
    """
    mode = draft.stat().st_mode & 0o666
    for path in draft.rglob("*"):
        if path.is_file():
            path.chmod(mode)
            with path.open("rb") as file:
                os.fsync(file.fileno())
    old = draft.with_name(draft.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    draft.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def check_files(checkpoint: Path) -> None:
    """Check that a checkpoint's files are there and not cut short, before anything is loaded.

    Raises:
        ValueError: naming the file.
    """
    advice = f"remove {checkpoint.name} to go on without it"
    for name, patterns in _NEEDED.items():
        if not any(path for pattern in patterns for path in checkpoint.glob(pattern)):
            raise ValueError(f"{checkpoint / name} is missing: {advice}")
    for path in sorted(checkpoint.iterdir()):
        try:
            if path.suffix in (".pt", ".pth", ".bin"):
                zipfile.ZipFile(path).close()
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix == ".json":
                read_json(path)
        except (zipfile.BadZipFile, SafetensorError, ValueError) as error:
            raise ValueError(f"{path} is cut short or damaged: {error}; {advice}") from None


def check_architecture(checkpoint: Path, model: PreTrainedModel) -> None:
    """Compare a checkpoint's config, if it has one, with the model that shall go on from it.

    Raises:
        ValueError: naming what differs.
    """
    path = checkpoint / "config.json"
    if not path.is_file():
        return
    saved = read_json(path)
    ours = model.config.to_dict()
    differences = [
        f"{key} {saved[key]!r} instead of {ours[key]!r}"
        for key in _SHAPE
        if key in saved and key in ours and saved[key] != ours[key]
    ]
    if differences:
        raise ValueError(f"{checkpoint} is a checkpoint of another architecture: {', '.join(differences)}")
