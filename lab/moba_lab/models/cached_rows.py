"""Rows that a layer's cache keeps beside its keys and values: one for each of the last tokens.

transformers' cache layers do not know of them, so a layer that is given rows takes on a class of its own, made from its
old one, that lets the rows follow whatever is done to the keys: beam search, repeating and selecting rows, cropping,
resetting, copying.

Letters: B batch, T new tokens, C channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin
from transformers.generation.continuous_batching.cache import PagedAttentionCache

# Tokens that a cache can lose from its end, as where proposed tokens are taken back, and rows still be there.
SPARE = 16


class _Rows:
    """The last tokens' rows [B, at most num_seen, C], and how many tokens there were."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.num_seen = 0

    def lose(self, count: int) -> None:
        """The last `count` tokens are gone."""
        self.rows = self.rows[:, : max(self.rows.shape[1] - count, 0)]
        self.num_seen -= count


@functools.cache
def _with_rows(cls: type[CacheLayerMixin]) -> type[CacheLayerMixin]:
    """A class of layers whose `cached_rows` follow their keys. Of one base, so that a layer can change to it."""

    class WithRows(cls):  # type: ignore[valid-type, misc]
        _layer_type = None  # transformers would register it in the place of its parent
        cached_rows: dict[str, _Rows]

        def reset(self) -> None:
            super().reset()
            self.cached_rows = {}

        def crop(self, tokens_to_remove: int) -> None:
            before = int(self.get_seq_length())
            super().crop(tokens_to_remove)
            num_lost = before - int(self.get_seq_length())
            for kept in self.cached_rows.values():
                kept.lose(num_lost)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._take_cached_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._take_cached_rows(lambda x: x.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._take_cached_rows(lambda x: x[indices.to(x.device)])

        def _take_cached_rows(self, take: Callable[[Tensor], Tensor]) -> None:
            for kept in self.cached_rows.values():
                kept.rows = take(kept.rows)

    return WithRows


def cache_layer(module: Any, options: dict[str, Any]) -> Any:
    """The layer's part of the cache that transformers gave an attention module; None without a cache.

    Args:
        module: the attention module. options: the keyword arguments of its call.

    Raises:
        ValueError: for caches that rows cannot be kept beside.
    """
    # A layer's cache is called `cache` from transformers 5.24 on; before, that was continuous batching's.
    cache = options.get("cache")
    if isinstance(cache, PagedAttentionCache) or options.get("block_table") is not None:
        raise ValueError(f"{type(module).__name__}: a paged cache cannot keep what this model's keys need beside them")
    cache = options.get("past_key_values") if cache is None else cache
    if cache is None:
        return None
    if torch.compiler.is_compiling():
        raise ValueError("past_key_values: steps with a cache cannot be compiled for a model that keeps rows beside it")
    replicate: Any = getattr(cache, "layer_class_to_replicate", None)
    if not hasattr(cache, "layers") or (replicate is None and len(cache.layers) <= module.layer_idx):
        raise ValueError(f"past_key_values: {type(cache).__name__} has no layer {module.layer_idx} to keep rows in")
    while len(cache.layers) <= module.layer_idx:
        cache.layers.append(replicate())
    return cache.layers[module.layer_idx]


def keep_all_rows(cache: Any) -> None:
    """Keep the rows of all tokens beside a new cache's keys, so that it can be cropped as far as one likes."""
    for layer in cache.layers:
        layer.keeps_all_rows = True


def remember(layer: Any, name: str, new: Tensor, *, need: int | None) -> Tensor:
    """Add rows, one for each token whose keys the layer is about to take; give them with the last ones of before.

    Args:
        layer: of a cache.
        name: of these rows, as a layer can keep several kinds.
        new: [B, T, C].
        need: how many rows of before are wanted; None: all, as after `keep_all_rows`.

    Returns:
        [B, need of before or more, as far as there are any, then T, C].

    Raises:
        ValueError: if the cache holds keys whose rows are not known.
    """
    if not hasattr(layer, "cached_rows"):
        layer.cached_rows = {}
        cls: Any = type(layer)
        layer.__class__ = _with_rows(cls)
    if getattr(layer, "keeps_all_rows", False):
        need = None
    kept = layer.cached_rows.get(name) or _Rows(new[:, :0])
    length = layer.get_seq_length()
    # The length is a tensor where the room is made beforehand; a GPU is not waited for.
    is_known = not isinstance(length, Tensor) or length.device.type == "cpu"
    num_needed = kept.num_seen if need is None else min(need, kept.num_seen)
    if (is_known and int(length) != kept.num_seen) or kept.rows.shape[1] < num_needed:
        raise ValueError(
            f"past_key_values holds keys of {int(length)} tokens, but {name} of the last {kept.rows.shape[1]} only: it "
            f"was filled otherwise (from a file, by a model without them) or cropped by more than {SPARE} tokens"
        )
    rows = torch.cat([kept.rows, new], dim=1)
    most = rows.shape[1] if need is None else min(rows.shape[1], need + SPARE)
    # A copy where some are dropped: a view would keep all of a prompt's rows in memory.
    kept.rows = rows if most == rows.shape[1] else rows[:, -most:].clone()
    kept.num_seen += new.shape[1]
    layer.cached_rows[name] = kept
    return rows
