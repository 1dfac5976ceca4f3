"""Adapters in one file: what a training with `[lora]` changed, and the config the changed model runs with.

A safetensors file. For each linear layer NAME that has one, `NAME.A` [r, in] and `NAME.B` [out, r] in bf16: the layer's
weight is the base model's plus B · A (the scaling is in B). Layers that were trained whole are there in their own dtype
under the names of their weights. The metadata's `adapter` is a JSON object: `base`, the name of the model that it
changes, and `config`, what the changed model's config says of MoBA and of the rotary embedding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from moba.files import replacing

ENDING = ".safetensors"
# The adapter that comes with the package (NOTICE says what it is made from), by the name that stands for it as a model.
ACTIVATED = "activated"
ACTIVATED_FILE = Path(__file__).parent / f"{ACTIVATED}{ENDING}"

_PEFT_FILE = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_CARRIED = ("moba", "rope_parameters", "max_position_embeddings")


def adapter_file(model: str | None) -> Path | None:
    """The file of a model that is an adapter, None of every other model."""
    if model == ACTIVATED:
        return ACTIVATED_FILE
    return Path(model).expanduser() if model is not None and model.endswith(ENDING) else None


def read_about(path: Path) -> dict[str, Any]:
    """What an adapter's file says of itself: `base` and `config`.

    Raises:
        ValueError: if there is no such file or it is not an adapter's.
    """
    if not path.is_file():
        raise ValueError(f"model: there is no {str(path)!r}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is cut short or no safetensors file: copy it again from where it is whole ({error})"
        ) from None
    try:
        about: dict[str, Any] = json.loads(metadata["adapter"])
        about["base"], about["config"]["moba"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not an adapter that `moba train` wrote: {error!r}") from None
    return about


def apply_adapter(model: nn.Module, path: Path) -> None:
    """Change a model's weights by an adapter; its config is left as it is.

    Numerics: B · A is computed in fp32 and added to the weight, which keeps its dtype.

    Raises:
        ValueError: if the adapter does not fit the model.
    """
    tensors = load_file(path)
    weights = dict(model.named_parameters())
    changes = {}
    for name in sorted({name[:-2] for name in tensors if name.endswith((".A", ".B"))}):
        a, b = tensors.get(f"{name}.A"), tensors.get(f"{name}.B")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            got = ", ".join(f".{key} {'missing' if x is None else list(x.shape)}" for key, x in (("A", a), ("B", b)))
            raise ValueError(
                f"{path} is no adapter that `moba train` wrote: {name} needs .A [r, in], .B [out, r]: {got}"
            )
        changes[f"{name}.weight"] = b.float() @ a.float()
    whole = {name: value for name, value in tensors.items() if not name.endswith((".A", ".B"))}
    for name, value in (*changes.items(), *whole.items()):
        if name not in weights or weights[name].shape != value.shape:
            raise ValueError(f"{path} does not fit this model: it has no {name} of shape {list(value.shape)}")
    with torch.no_grad():
        for name, change in changes.items():
            weights[name].copy_(weights[name].float() + change)
        for name, value in whole.items():
            weights[name].copy_(value)


def write_adapter(trained: Path, config: Any, base: str, scale: float, out: Path) -> None:
    """Write an adapter's file.

    Args:
        trained: folder of an adapter as peft saves it.
        config: of the trained model.
        base: what was trained: a model's name, or an adapter's file; that one's changes are then part of the new file,
            as matrices of ranks r1 and r2 side by side are one of rank r1 + r2.
        scale: that B · A is multiplied by.
        out: the file; it appears whole.

    Raises:
        ValueError: if the adapter holds something else than factors and weights.
        OSError: if it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for key, value in load_file(trained / _PEFT_FILE).items():
        name = key.removeprefix(_PEFT_PREFIX)
        if name.endswith(".lora_A.weight"):
            tensors[name.replace(".lora_A.weight", ".A")] = value
        elif name.endswith(".lora_B.weight"):
            tensors[name.replace(".lora_B.weight", ".B")] = value * scale
        elif "lora_" in name:
            raise ValueError(f"{trained} holds {name}, which is no factor of a linear layer")
        else:
            tensors[name] = value
    if (path := adapter_file(base)) is not None:
        base = read_about(path)["base"]
        for name, value in load_file(path).items():
            if name not in tensors:
                tensors[name] = value
            elif name.endswith((".A", ".B")):
                tensors[name] = torch.cat([value.float(), tensors[name].float()], dim=0 if name.endswith(".A") else 1)
    carried = {key: getattr(config, key) for key in _CARRIED}
    about = json.dumps({"base": base, "config": carried})
    values = {k: (v.to(torch.bfloat16) if k.endswith((".A", ".B")) else v).contiguous() for k, v in tensors.items()}
    with replacing(out) as file:
        # Not by save_file, whose files nobody else can read, whatever the umask says.
        file.write(save(values, metadata={"adapter": about}))
