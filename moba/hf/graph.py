"""DecodeGraph: a model's steps of decoding as a CUDA graph, without compiling the model.

A step of a whole model is a thousand launches, which Python makes more slowly than a GPU carries them out. Recorded
once, which takes as long as three steps, they are one launch.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from moba.config import require_int
from moba.hf.cache import MoBACache, MoBADynamicLayer, MoBAStaticLayer

# Steps before the recording, in which kernels are compiled and libraries find their workspace.
WARM_UPS = 2


class DecodeGraph:
    """Steps of one token a row, recorded at the first and replayed.

        logits, cache = ...                     # the prompt was read into a MoBACache
        step = DecodeGraph(model, cache, max_new_tokens=256)
        logits = step(logits.argmax(-1)[:, None])

    `model.generate` with a `MoBACache` of a given `max_cache_len` compiles the model instead: half a minute once, and
    faster steps.

    Args:
        model: a causal language model of transformers on a GPU, in eval mode.
        cache: that has read the prompt, whose rows have no padding. One that grows is moved, layer by layer, into
            `cache` of this object, and is empty then.
        max_new_tokens: steps to make room for; a cache made with max_cache_len keeps its own.

    Attributes:
        cache: what the steps append to.

    Raises:
        ValueError: if the model is not on a GPU, or a layer keeps something else than all its keys and values.
    """

    def __init__(self, model: nn.Module, cache: MoBACache, max_new_tokens: int) -> None:
        require_int("max_new_tokens", max_new_tokens, 1)
        device = next(model.parameters()).device
        if device.type != "cuda":
            raise ValueError(f"a CUDA graph needs a model on a GPU, got one on {device}")
        self._model, self._name = model, cache_name(model)
        self.cache = with_room(cache, model, max_new_tokens)
        layers: list[Any] = self.cache.layers
        self._lengths: list[Tensor] = [layer.cumulative_length for layer in layers]
        self._num_left = layers[0].max_cache_len - int(self._lengths[0])
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tokens = self._logits = torch.empty(0)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Read one token a row.

        Args:
            tokens: int64 [B, 1].

        Returns:
            [B, V], the logits that follow. The next step writes its own to the same place.

        Raises:
            ValueError: if the cache has no room left.
        """
        if self._num_left < 1:
            raise ValueError("the cache has no room for another token: give DecodeGraph a larger max_new_tokens")
        if self._graph is None:
            self._record(tokens)
        assert self._graph is not None
        self._tokens.copy_(tokens)
        self._graph.replay()
        self._num_left -= 1
        return self._logits

    def _step(self) -> Tensor:
        logits: Tensor = self._model(self._tokens, use_cache=True, **{self._name: self.cache}).logits
        return logits[:, -1]

    def _record(self, tokens: Tensor) -> None:
        self._tokens = tokens.clone()
        before = [length.clone() for length in self._lengths]
        stream = torch.cuda.Stream(tokens.device)
        stream.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._step()
                # What the step appended is written again by the next one.
                for length, then in zip(self._lengths, before, strict=True):
                    length.copy_(then)
        torch.cuda.current_stream(tokens.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._step()
        self._graph = graph


def cache_name(model: nn.Module) -> str:
    """What a model's forward pass calls its cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def with_room(cache: MoBACache, model: Any, num_new: int) -> MoBACache:
    """A cache whose keys stay where they are: this one, or one with its keys and room for num_new tokens a row.

    Raises:
        ValueError: if a layer keeps something else than all its keys and values.
    """
    layers: list[Any] = cache.layers
    for layer in layers:
        if not isinstance(layer, (MoBADynamicLayer, MoBAStaticLayer)) or not layer.is_initialized:
            raise ValueError(
                f"a {type(layer).__name__} cannot be recorded: it does not keep all keys and values of a prompt"
            )
    if all(isinstance(layer, MoBAStaticLayer) for layer in layers):
        return cache
    room = MoBACache(model.config, max_cache_len=int(cache.get_seq_length()) + num_new)
    rooms: list[Any] = room.layers
    for layer, moved in zip(layers, rooms, strict=True):
        moved.update(layer.keys, layer.values)
        layer.index_keys.move_to(moved.index_keys)
        layer.reset()
    return room
