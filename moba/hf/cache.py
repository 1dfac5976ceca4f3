"""MoBACache: transformers' key-value cache with the mean of every finished block beside the keys.

cache = MoBACache(model.config)
model.generate(**inputs, past_key_values=cache)

A layer's keys reach the attention function with the layer itself (hand_over.py). That function knows where each row
begins (left padding) and which settings hold, so it brings the means up to date: once for each block, when the block is
finished, by the function that a prefill computes them with.

Letters: B batch, S cached tokens, G key/value heads, D head dim, N blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any, BinaryIO

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from moba.block_means import CachedMeans, Phase
from moba.config import require_int
from moba.files import replacing
from moba.hf.hand_over import give
from moba.hf.index_keys import IndexKeys
from moba.validate import first_line

# Room for keys grows by this part of what is there, so appending a token copies a fixed number of keys on average.
GROWTH = 1 / 4
LEAST_GROWTH = 256

# A saved cache begins with this line and the SHA-256 of all that follows, which torch.save wrote.
_MAGIC = b"MoBACache 2\n"
# What of a model's config decides the shapes and values of its keys.
_DESCRIPTION = ("model_type", "dtype", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
                "rope_parameters")  # fmt: skip


class _MoBALayer:
    """What both kinds of layers have beside their keys and values."""

    block_means: CachedMeans
    index_keys: IndexKeys
    number: int

    def with_means(self, keys: Tensor, num_new: int, room: int) -> Tensor:
        """The keys as they go to the attention function."""
        self.block_means.note(num_new, room)
        self.index_keys.note(room)
        return give(keys, self)


class MoBADynamicLayer(_MoBALayer, DynamicLayer):
    """Keys and values that grow in place, in room made for a quarter more at a time, and their block means."""

    keys: Any
    values: Any

    def __init__(self, number: int, phase: Phase) -> None:
        super().__init__()
        self.number, self.block_means, self.index_keys = number, CachedMeans(phase), IndexKeys()
        self._rooms: tuple[Tensor, Tensor] | None = None  # of keys and values, which are views of their fronts

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and shape from the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._use((key_states[:, :, :0], value_states[:, :, :0]), 0)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, G, T, D]; all of them [B, G, S, D], views.

        Raises:
            ValueError: if a gradient is asked for, which an append in place cannot give, or what is appended has other
                rows, heads or head dims than what is there.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError("a MoBACache serves inference only: call the model under torch.no_grad()")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._rooms is not None
        for before, states in ((self.keys, key_states), (self.values, value_states)):
            if (*before.shape[:2], before.shape[3]) != (*states.shape[:2], states.shape[3]):
                raise ValueError(
                    f"the cache holds {tuple(before.shape)} [B, G, S, D], so {tuple(states.shape)} cannot be appended: "
                    "take a new cache for another batch size or model"
                )
        start = self.keys.shape[2]
        stop = start + key_states.shape[2]
        if stop > self._rooms[0].shape[2]:
            self._grow(key_states, value_states, stop)
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, start:stop] = states
        self._use(self._rooms, stop)
        return self.with_means(self.keys, stop - start, self._rooms[0].shape[2]), self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens, as transformers' layers do; a finished block that stays keeps its mean."""
        if self.is_initialized:
            super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Drop all tokens and their memory."""
        self.keys = self.values = self._rooms = None
        self.is_initialized = False
        self.block_means.reset()
        self.index_keys.reset()

    def offload(self) -> None:
        """Move keys and values to the CPU. The means stay: they are needed at once, and small."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Move keys and values back."""
        self._move(getattr(self, "device", "cpu"))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        self._take_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._take_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows only."""
        self._take_rows(lambda x: x[indices.to(x.device)])

    def _use(self, rooms: tuple[Tensor, Tensor], length: int) -> None:
        self._rooms = rooms
        self.keys, self.values = (room[:, :, :length] for room in rooms)

    def _grow(self, key_states: Tensor, value_states: Tensor, least: int) -> None:
        """Make room for `least` tokens and some more."""
        length = self.keys.shape[2]
        room = least + max(LEAST_GROWTH, int(least * GROWTH))
        grown = []
        for before, states in ((self.keys, key_states), (self.values, value_states)):
            batch, num_heads, _, head_dim = states.shape
            # A tensor made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                grown.append(torch.empty(batch, num_heads, room, head_dim, dtype=states.dtype, device=states.device))
            grown[-1][:, :, :length] = before
        self._use((grown[0], grown[1]), length)

    def _take_rows(self, take: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self._replace(take)
            self.block_means.take_rows(take)
            self.index_keys.take_rows(take)

    def _move(self, device: torch.device | str) -> None:
        if self.is_initialized and self.keys.device != torch.device(device):
            self._replace(lambda x: x.to(device, non_blocking=True))

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        assert self._rooms is not None
        length = self.keys.shape[2]
        with torch.inference_mode(False):
            keys, values = (change(room) for room in self._rooms)
        self._use((keys, values), length)


class MoBAStaticLayer(_MoBALayer, StaticLayer):
    """Keys and values in room made beforehand, and their block means."""

    is_croppable = True

    def __init__(self, number: int, phase: Phase, max_cache_len: int) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.number = number
        self.block_means, self.index_keys = CachedMeans(phase, is_static=True), IndexKeys(is_static=True)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the room."""
        with torch.inference_mode(False):
            super().lazy_initialization(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, G, T, D]; the whole room [B, G, max_cache_len, D].

        Raises:
            ValueError: if there is too little room. A single token on a GPU, which is not waited for, fails there.
        """
        self._check_room(key_states)
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return self.with_means(keys, key_states.shape[2], self.max_cache_len), values

    def _check_room(self, key_states: Tensor) -> None:
        num_new, is_on_gpu = key_states.shape[2], key_states.device.type == "cuda"
        if torch.compiler.is_compiling() or (is_on_gpu and (num_new == 1 or torch.cuda.is_current_stream_capturing())):
            return
        num_before = int(self.cumulative_length)
        if num_before + num_new > self.max_cache_len:
            raise ValueError(
                f"the cache has room for max_cache_len={self.max_cache_len} tokens, so {num_new} cannot follow the "
                f"{num_before} it holds: make it with a larger max_cache_len, or without one to let it grow"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -tokens_to_remove tokens.

        Raises:
            ValueError: for a positive number.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be negative or 0, got {tokens_to_remove}")
        self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)

    def reset(self) -> None:
        """Drop all tokens, keep the memory."""
        super().reset()
        self.block_means.reset()
        self.index_keys.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        if self.is_initialized:
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]
            for beside in (self.block_means, self.index_keys):
                beside.take_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))


class MoBACache(Cache):
    """A cache for `generate` and for a model's forward pass: `past_key_values=MoBACache(model.config)`.

    What it holds is what transformers' DynamicCache or StaticCache holds, and for layers that MoBA runs in, the mean of
    every finished block: 1/block_size of the keys' memory. With `decode="moba"` a step then reads these means and the
    selected blocks only. The block size is that of the attention that uses the cache. Cropping, beam search, copying
    (copy.deepcopy) and continuing with new text keep the means right.

    Args:
        config: the model's config.
        max_cache_len: tokens to make room for beforehand, which allows compiled steps; None: the room grows, by a
            quarter at a time, so appending a token copies five keys on average and not all of them.
        offloading: keep the keys and values of all but the running layer on the CPU, as transformers' caches do.

    Raises:
        ValueError: if max_cache_len is not a number of tokens, or there is no GPU to offload from.
    """

    def __init__(self, config: PreTrainedConfig, *, max_cache_len: int | None = None, offloading: bool = False) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(f"config must be a transformers model's config, got {type(config).__name__}")
        if offloading and not torch.accelerator.is_available():
            raise ValueError(
                f"offloading={offloading!r} moves keys and values out of a GPU's memory, and there is no GPU here: "
                "leave it out"
            )
        self.phase = Phase()
        self._description = _describe(config)
        if max_cache_len is None:
            layers = [
                MoBADynamicLayer(i, self.phase) if type(layer) is DynamicLayer else layer
                for i, layer in enumerate(DynamicCache(config=config).layers)
            ]
        else:
            require_int("max_cache_len", max_cache_len, 1)
            layers = [
                MoBAStaticLayer(i, self.phase, max_cache_len) if type(layer) is StaticLayer else layer
                for i, layer in enumerate(StaticCache(config=config, max_cache_len=max_cache_len).layers)
            ]
        super().__init__(layers=layers, offloading=offloading)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, a forward pass of one token is a chunk of a prompt, and no step of decoding."""
        self.phase.is_prefill = True
        try:
            yield
        finally:
            self.phase.is_prefill = False

    def save(self, path: str | PathLike[str]) -> None:
        """Write keys and values to a file, from which `load` restores a cache that gives the same results.

        Raises:
            ValueError: if a layer keeps something else than all its keys and values, such as a sliding window.
            OSError: if it cannot be written; a file that was there is left as it was.
        """
        if others := [layer for layer in self.layers if not isinstance(layer, _MoBALayer)]:
            raise ValueError(f"a cache with a {type(others[0]).__name__} cannot be saved: it does not keep all keys")
        layers = []
        layer: Any
        for layer in self.layers:
            length = int(layer.get_seq_length()) if layer.is_initialized else 0
            layers.append([x[:, :, :length].clone() for x in (layer.keys, layer.values)] if length else None)
        with replacing(path) as file:
            file.write(_MAGIC + bytes(hashlib.sha256().digest_size))
            try:
                torch.save({"config": self._description, "layers": layers}, file)
            except RuntimeError as error:  # as torch has it where the disk is full
                raise OSError(f"{path} cannot be written: {first_line(error)}") from error
            digest = _digest(file)
            file.seek(len(_MAGIC))
            file.write(digest)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        config: PreTrainedConfig,
        *,
        max_cache_len: int | None = None,
        device: torch.device | str = "cpu",
    ) -> MoBACache:
        """A cache with the tokens that `save` wrote.

        Args:
            path: the file. device: where the model is.
            config, max_cache_len: as for a new cache.

        Raises:
            ValueError: if the file is no saved cache, or damaged, or of another model, or of more tokens than
                max_cache_len.
            OSError: if it cannot be read.
        """
        cache = cls(config, max_cache_len=max_cache_len)
        with open(path, "rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ValueError(f"{path} is not a saved MoBACache")
            checksum = file.read(hashlib.sha256().digest_size)
            if _digest(file) != checksum:
                raise ValueError(f"{path} is corrupt: it does not have the checksum that it was saved with")
            file.seek(len(_MAGIC) + len(checksum))
            saved = torch.load(file, map_location=device, weights_only=True)
        differences = [
            f"{name} {then!r} instead of {cache._description[name]!r}"
            for name, then in saved["config"].items()
            if then != cache._description[name]
        ]
        if differences:
            raise ValueError(f"{path} holds a cache of another model: {', '.join(differences)}")
        layers = saved["layers"]
        if len(layers) != len(cache.layers):
            raise ValueError(f"{path} holds a cache of {len(layers)} layers, the model has {len(cache.layers)}")
        layer: Any
        for layer, tensors in zip(cache.layers, layers, strict=True):
            if tensors is not None:
                length = tensors[0].shape[2]
                if max_cache_len is not None and length > max_cache_len:
                    raise ValueError(
                        f"max_cache_len must be at least the {length} tokens in {path}, got {max_cache_len}"
                    )
                layer.update(*tensors)
        return cache


def _describe(config: PreTrainedConfig) -> dict[str, Any]:
    """What must be equal in the models that save and load a cache."""
    text = config.get_text_config(decoder=True)
    return {name: getattr(text, name, None) for name in _DESCRIPTION}


def _digest(file: BinaryIO) -> bytes:
    """The SHA-256 of what follows a saved cache's checksum."""
    digest = hashlib.sha256()
    file.seek(len(_MAGIC) + digest.digest_size)
    while part := file.read(1 << 20):
        digest.update(part)
    return digest.digest()
