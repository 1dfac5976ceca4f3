"""Reading several texts with one cache: what two texts begin with is read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moba.hf.graph import cache_name
from moba_lab.models.generation import chunk_bounds, prefill

if TYPE_CHECKING:
    from moba.hf.cache import MoBACache

# Logits of so many tokens exist in fp32 at once.
_LOSS_ROWS = 1024


def chunk_tokens_for(device: torch.device) -> int:
    """How many tokens to read at once: enough for a GPU to be busy, few enough for a CPU's memory."""
    return 1024 if device.type == "cpu" else 8192


class Reader:
    """Reads texts with a model, each from the longest beginning that it shares with the one before.

    What a model computes for a token depends on nothing behind it, so this gives what reading every text anew does, up
    to rounding, as chunks begin elsewhere. Texts in the order of `reading_order` are read with the fewest tokens. A
    model whose attention or weights change needs a new reader.

    Args:
        model: a causal language model of transformers.
        chunk_tokens: tokens read in one forward pass; None: 1,024 on a CPU, 8,192 on a GPU.

    Attributes:
        cache: the MoBACache of the text.
        num_read: tokens that went through the model.
    """

    def __init__(self, model: Any, *, chunk_tokens: int | None = None) -> None:
        self.model = model
        self.chunk_tokens = chunk_tokens_for(model.device) if chunk_tokens is None else chunk_tokens
        self.cache = self._new_cache()
        self.num_read = 0
        self._tokens = torch.empty(0, dtype=torch.long)
        self._losses = torch.empty(0)  # of the first tokens that have a successor in the text

    def read(self, tokens: Tensor) -> Tensor:
        """Read a text, int64 [T] with T >= 1; the fp32 logits [vocabulary] that follow it."""
        start = self._go_back(tokens, tokens.numel() - 1)
        logits, _ = prefill(self.model, tokens[start:], cache=self.cache, chunk_tokens=self.chunk_tokens)
        self._keep(tokens, start)
        return logits

    @torch.inference_mode()
    def losses(self, tokens: Tensor) -> Tensor:
        """Read a text; the negative log-likelihood of every token after the first, given all before it.

        loss_t = −log p(token_{t+1} | token_0 … token_t)

        Args:
            tokens: int64 [T], T >= 2.

        Returns:
            fp32 [T - 1] on the CPU, in nats.

        Raises:
            ValueError: if there are fewer than two tokens.
        """
        if tokens.ndim != 1 or tokens.numel() < 2:
            raise ValueError(f"tokens must be int64 [T] with T >= 2, got shape {tuple(tokens.shape)}")
        tokens = tokens.cpu()
        before = self._losses
        # The loss of a token needs the logits after the one before, which are not kept.
        start = self._go_back(tokens, min(_shared(self._tokens, tokens) - 1, before.numel()))
        on_device = tokens.to(self.model.device)
        losses = [before[:start]]
        with self.cache.reading():
            for first, stop in chunk_bounds(tokens.numel() - start, self.chunk_tokens):
                chunk, targets = (
                    on_device[start + first : start + stop],
                    on_device[start + first + 1 : start + stop + 1],
                )
                logits = self._logits(chunk[None])
                for rows, wanted in zip(logits.split(_LOSS_ROWS), targets.split(_LOSS_ROWS), strict=False):
                    losses.append(F.cross_entropy(rows[: wanted.numel()].float(), wanted, reduction="none").cpu())
        self._keep(tokens, start)
        self._losses = torch.cat(losses)
        return self._losses

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """One step of decoding behind what was read; the fp32 logits [vocabulary] that follow."""
        ids = torch.tensor([[token]], device=self.model.device)
        self.num_read += 1
        return self._logits(ids)[-1].float()

    def _logits(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=True, **{cache_name(self.model): self.cache}).logits[0]

    def _go_back(self, tokens: Tensor, most: int) -> int:
        """Drop from the cache all but what the text begins with, at most its first `most` tokens; how many are left."""
        from moba.hf.cache import MoBADynamicLayer

        length = max(min(_shared(self._tokens, tokens.cpu()), most), 0)
        num_lost = int(self.cache.get_seq_length()) - length
        # A layer of another kind, as of a sliding window, may not hold what a shorter text needs.
        if length == 0 or not all(isinstance(layer, MoBADynamicLayer) for layer in self.cache.layers):
            length = 0
            self.cache = self._new_cache()
        elif num_lost:
            self.cache.crop(-num_lost)
        self._tokens, self._losses = self._tokens[:length], self._losses[: max(length - 1, 0)]
        return length

    def _new_cache(self) -> MoBACache:
        from moba.hf.cache import MoBACache
        from moba_lab.models.cached_rows import keep_all_rows

        cache = MoBACache(self.model.config)
        keep_all_rows(cache)
        return cache

    def _keep(self, tokens: Tensor, start: int) -> None:
        self._tokens = tokens.cpu()
        self.num_read += tokens.numel() - start


def reading_order(texts: Sequence[Tensor]) -> list[int]:
    """The order of texts, int64 [T] each, in which a `Reader` reads the fewest tokens: texts that begin alike lie side
    by side, so that every beginning is read once.
    """
    big_endian = [text.cpu().numpy().astype(">u4").tobytes() for text in texts]
    return sorted(range(len(texts)), key=lambda i: big_endian[i])


def _shared(one: Tensor, other: Tensor) -> int:
    """How many tokens two texts begin with in common."""
    most = min(one.numel(), other.numel())
    differing = (one[:most] != other[:most]).nonzero()
    return int(differing[0]) if differing.numel() else most
