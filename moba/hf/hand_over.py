"""How a cache's block means reach the attention function: on the keys that the cache hands to the layer.

The means hold for exactly these keys. A layer that changes them behind its cache, as with latent keys that it projects,
attends with other keys, and the means must not follow them there. `take_means` notices, so that nobody loses the means
without knowing.
"""

from __future__ import annotations

import logging
import threading

import torch
from torch import Tensor, nn

from moba.block_means import CachedMeans

logger = logging.getLogger("moba")
_warned: set[str] = set()


class _Given(threading.local):
    """What a cache gave last in this thread and no attention function took: the means and the layer's number."""

    last: tuple[CachedMeans, int] | None = None


_given = _Given()


def give_means(keys: Tensor, means: CachedMeans, layer: int) -> Tensor:
    """The keys [B, G, S, D] of layer `layer`, with their block means."""
    keys.moba_block_means = means  # type: ignore[attr-defined]
    _given.last = (means, layer)
    return keys


def take_means(module: nn.Module, key: Tensor) -> tuple[CachedMeans | None, CachedMeans | None]:
    """What a cache gave an attention module with its keys.

    Args:
        module: the attention layer. key: as its attention function is given it.

    Returns:
        the means of these keys, None if there are none; and the means of the keys that the cache gave this layer in
        their place, None if it gave these.
    """
    given, _given.last = _given.last, None
    means: CachedMeans | None = getattr(key, "moba_block_means", None)
    # Another layer's were left by an attention that is not MoBA's.
    is_lost = means is None and given is not None and given[1] == getattr(module, "layer_idx", None)
    return means, given[0] if is_lost and given is not None else None


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
