"""A model's attention modules, and whether hooks on their projections are still there."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def attentions(model: PreTrainedModel) -> list[Any]:
    """The attention modules of a model, those with projections of their own.

    Raises:
        ValueError: if there are none.
    """
    found = [
        module
        for module in model.modules()
        if all(hasattr(module, name) for name in ("q_proj", "k_proj", "layer_idx", "config"))
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no layers with projections of their own (q_proj, k_proj)")
    return found


def require_hook(module: nn.Module, owner: object, name: str, maker: str) -> None:
    """Check that a module, called `name`, still has the hook that was made as `partial(function, owner, …)`.

    Raises:
        ValueError: if not; it says that `maker` must be called later.
    """
    if torch.compiler.is_compiling():
        return
    hooks = module._forward_hooks.values()
    if not any(isinstance(hook, partial) and hook.args and hook.args[0] is owner for hook in hooks):
        raise ValueError(f"{name} was replaced behind its hook: add adapters before {maker}")
