"""How what a cache keeps beside a layer's keys reaches the attention function: on the keys that it hands to the layer.

Block means hold for exactly these keys. A layer that changes them behind its cache, as with latent keys that it
projects, attends with other keys, and the means must not follow them there. `take` notices, so that nobody loses the
means without knowing. Index keys are made of the layer's input and hold in either case.
"""

from __future__ import annotations

import logging
import threading
from typing import Protocol

import torch
from torch import Tensor, nn

from moba.block_means import CachedMeans
from moba.hf.index_keys import IndexKeys

logger = logging.getLogger("moba")
_warned: set[str] = set()


class CacheLayer(Protocol):
    """One layer of a `MoBACache`: its number, and what it keeps beside its keys."""

    number: int
    block_means: CachedMeans
    index_keys: IndexKeys


class _Given(threading.local):
    """The cache layer that gave keys last in this thread, unless an attention function has taken them."""

    def __init__(self) -> None:
        # An attribute of each thread from the start: torch.compile fails on one that a call makes only then.
        self.last: CacheLayer | None = None


_given = _Given()


def give(keys: Tensor, layer: CacheLayer) -> Tensor:
    """The keys [B, G, S, D] of a cache layer, as the attention function takes them."""
    keys.moba_cache_layer = layer  # type: ignore[attr-defined]
    _given.last = layer
    return keys


def take(module: nn.Module, key: Tensor) -> tuple[CacheLayer | None, bool]:
    """The cache layer that gave an attention module its keys.

    Args:
        module: the attention layer. key: as its attention function is given it.

    Returns:
        the cache layer, None if there is none; and whether its block means hold for `key`: not for other keys that the
        attention module made of those that it was given.
    """
    given, _given.last = _given.last, None
    layer: CacheLayer | None = getattr(key, "moba_cache_layer", None)
    if layer is not None:
        return layer, True
    # Another layer's were left by an attention that is not MoBA's.
    is_own = given is not None and given.number == getattr(module, "layer_idx", None)
    return given if is_own else None, False


def warn_of_loss(module: nn.Module) -> None:
    """Say once for each class of layers that a cache's means do not serve them."""
    name = type(module).__name__
    if name not in _warned and not torch.compiler.is_compiling():
        _warned.add(name)
        logger.warning(
            "%s attends with other keys than its MoBACache holds, so the cache's block means do not serve it: the "
            "means of all blocks are computed at every step",
            name,
        )
