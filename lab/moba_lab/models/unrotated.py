"""Queries and keys from before the rotary embedding, for router="unrotated": hooks hand them to the attention function.

Letters: B batch, T query tokens, S key tokens, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from moba.config import MoBAConfig
from moba.hf import provide_route_by, set_moba_config
from moba.hf.attention_modules import attentions, require_hook
from moba_lab.models.cached_rows import cache_layer, remember

ROWS = "unrotated keys"
# What models call the norms of queries and keys between their projections and the rotary embedding.
_IS_NORM = re.compile(r"(q|k|qk|query|key)_?(layer)?_?norms?")
NORMS = {"q": ("q_norm", "q_layernorm"), "k": ("k_norm", "k_layernorm")}


class Projections:
    """What an attention module's projections gave in the call that is running, and its cache."""

    def __init__(self) -> None:
        self.is_open = False
        self.clear()

    def clear(self) -> None:
        """Let go of everything."""
        self.q: Tensor | None = None
        self.k: Tensor | None = None
        self.raw: dict[str, Tensor] = {}
        self.cache_layer: Any = None


def watch_projections(model: PreTrainedModel) -> None:
    """Let a model's layers route by queries and keys from before the rotary embedding: router="unrotated".

    Rotated keys of a block point in many directions, and their mean loses what they have in common; those from before
    do not. Taken behind the layer's own norms of queries and keys, where it has them. With a cache, the unrotated keys
    are kept beside the others (half as much again as keys and values take), and their means are computed at every step,
    so this serves to find out what routing can do rather than to save memory. `apply_config` calls this where the
    router asks for it; calling it again does nothing.

    Args:
        model: of a family with separate projections (`q_proj`, `k_proj`). Add adapters (PEFT) first.

    Raises:
        ValueError: if the model has no such projections, or norms of queries and keys that are not known.
    """
    for attention in attentions(model):
        if hasattr(attention, "moba_projections"):
            continue
        attention.moba_projections = Projections()
        provide_route_by(attention, "unrotated", unrotated_rows)
        attention.register_forward_pre_hook(_begin, with_kwargs=True)
        attention.register_forward_hook(_end)
        for name, (source, module) in _sources(attention).items():
            projection = getattr(attention, f"{name}_proj")
            projection.register_forward_hook(partial(_take_raw, attention.moba_projections, name))
            module.register_forward_hook(partial(_take, attention.moba_projections, name, source))


def apply_config(model: PreTrainedModel, config: MoBAConfig | None) -> None:
    """`moba.hf.set_moba_config`, after `watch_projections` where the config's router is "unrotated"."""
    if config is not None and config.router == "unrotated":
        watch_projections(model)
    set_moba_config(model, config)


def unrotated_rows(module: nn.Module, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [B, T, H, D] and keys [B, S, G, D] from before the rotary embedding, of the call that is running.

    Args:
        module: the attention module. q, k: the rotated ones; keys of places that a static cache has not filled yet
            are zeros in the result.

    Raises:
        ValueError: if they were not handed over.
    """
    projections: Any = module.moba_projections
    if projections.q is None or projections.k is None:
        raise ValueError(f'router="unrotated": the projections of {type(module).__name__} were not called as usual')
    by_q = _by_head(projections.q, q)
    by_k = _by_head(projections.k, k)
    return by_q, F.pad(by_k, (0, 0, 0, 0, 0, k.shape[1] - by_k.shape[1]))


def _sources(attention: Any) -> dict[str, tuple[str, nn.Module]]:
    """The names and modules whose results are the last before the rotary embedding.

    Raises:
        ValueError: if the module has other norms of queries or keys than NORMS.
    """
    children = dict(attention.named_children())
    unknown = [name for name in children if _IS_NORM.fullmatch(name) and name not in (*NORMS["q"], *NORMS["k"])]
    if unknown:
        raise ValueError(
            f'router="unrotated" does not know where {type(attention).__name__} applies its {", ".join(unknown)}'
        )
    names = {name: next((norm for norm in norms if norm in children), f"{name}_proj") for name, norms in NORMS.items()}
    return {name: (source, children[source]) for name, source in names.items()}


def _begin(attention: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    projections = attention.moba_projections
    for name, (source, module) in _sources(attention).items():
        require_hook(getattr(attention, f"{name}_proj"), projections, f"{name}_proj", "watch_projections")
        require_hook(module, projections, source, "watch_projections")
    projections.clear()
    projections.cache_layer = cache_layer(attention, options)
    projections.is_open = True


# Not `always_call`, which makes torch.compile compile every layer apart: after an error, the next call clears.
def _end(attention: Any, args: tuple[Any, ...], output: Any) -> None:
    attention.moba_projections.is_open = False
    attention.moba_projections.clear()


def _take_raw(projections: Projections, name: str, module: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
    if projections.is_open:
        projections.raw[name] = result.detach()


def _take(
    projections: Projections, name: str, source: str, module: nn.Module, args: tuple[Any, ...], result: Tensor
) -> None:
    if not projections.is_open:
        return
    given, raw, rows = args[0], projections.raw[name], result.detach()
    if rows.ndim == 4:
        if not torch.compiler.is_compiling() and given.untyped_storage().data_ptr() != raw.untyped_storage().data_ptr():
            raise ValueError(
                f'router="unrotated": {source} is not called with what {name}_proj gave, but behind rotation'
            )
        # Heads first, as attention wants them, or tokens first; where there are as many of both, the strides tell.
        by_head = rows.shape[1] != raw.shape[1] or (rows.shape[2] == raw.shape[1] and given.stride(1) < given.stride(2))
        rows = rows.transpose(1, 2) if by_head else rows
    if name == "q":
        projections.q = rows
        return
    keys = rows.flatten(2)
    if projections.cache_layer is not None:
        keys = remember(projections.cache_layer, ROWS, keys, need=None)
    projections.k = keys


def _by_head(x: Tensor, like: Tensor) -> Tensor:
    """Rows [B, any length, heads · D], or already by head, as [B, that length, heads, D] like q or k."""
    batch, _, num_heads, head_dim = like.shape
    if x.shape[0] != batch or x[0, 0].numel() != num_heads * head_dim:
        raise ValueError(
            f'router="unrotated" cannot read what this model\'s projections give, {tuple(x.shape)}, as heads like '
            f"{tuple(like.shape)}"
        )
    return x.reshape(batch, x.shape[1], num_heads, head_dim)
