"""What a MoBACache keeps beside a layer's keys for router="indexer" (see `moba.hf.indexer`).

Letters: B batch, T new tokens, S cached tokens, G key/value heads, d index head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class IndexKeys:
    """The index keys of one layer's tokens; the attention function appends them. Empty under other routers."""

    def __init__(self, *, is_static: bool = False) -> None:
        self._is_static = is_static
        self._rows: Tensor | None = None  # [B, room, G, d]
        self._room = 0
        self._is_complete = True
        self._was_complete = True  # but for the noted keys

    def note(self, room: int) -> None:
        """Note that keys were appended to a layer with room for `room`."""
        # Written before it is read, so that under other routers a compiled second step meets what the first one met.
        self._was_complete, self._is_complete = self._is_complete, False
        self._room = room

    def append(self, new: Tensor, end: Tensor | int, num_keys: int) -> Tensor | None:
        """Append the index keys of the noted keys.

        Args:
            new: [B, T, G, d]. end: one past the place of the last, an int or int32 [1].
            num_keys: S.

        Returns:
            [B, S, G, d]; None if those of earlier keys are not known.
        """
        rows, shape = self._rows, (new.shape[0], self._room, *new.shape[2:])
        if rows is None or rows.shape != shape:
            with torch.inference_mode(False):
                # Zeros, because a product with what a static cache has not filled yet must be finite.
                self._rows = torch.zeros(shape, dtype=new.dtype, device=new.device)
            if self._is_static and not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self._rows)
            if rows is not None and rows.shape[0] == shape[0]:
                self._rows[:, : rows.shape[1]] = rows[:, : self._room]
        assert self._rows is not None
        place = torch.arange(new.shape[1], device=new.device) + (end - new.shape[1])
        self._rows.index_copy_(1, place, new)
        self._is_complete = self._was_complete
        return self._rows[:, :num_keys] if self._is_complete else None

    def reset(self) -> None:
        """Start anew: the layer's keys are gone."""
        self._rows = self._rows if self._is_static else None
        self._is_complete = True

    def take_rows(self, take: Callable[[Tensor], Tensor]) -> None:
        """Reorder, repeat or select rows as `take` did with the layer's keys."""
        self._rows = None if self._rows is None else take(self._rows)

    def move_to(self, other: IndexKeys) -> None:
        """Give these index keys to a layer that has just taken the keys that they belong to."""
        other._rows, other._is_complete = self._rows, self._is_complete
