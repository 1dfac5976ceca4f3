"""How well a model predicts long text, and a passage that it has read before.

Perplexity of ordinary text hardly sees which blocks are chosen, as the nearest text explains most of the next word.
The perplexity of a passage that stood in the text thousands of tokens earlier does: it is low only for a model that
finds the passage. Report both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moba_lab.evals.reader import Reader


def perplexity(reader: Reader, tokens: Tensor, *, last: int = 1024) -> dict[str, Any]:
    """Perplexity of a text: over all of it, over its end, and along the positions.

    Args:
        reader: of a causal language model of transformers.
        tokens: int64 [T], T >= 2.
        last: how many tokens count as the end, and how many lie in each range of positions.

    Returns:
        the record of `summarise`.
    """
    return summarise(reader.losses(tokens), last=last)


def summarise(losses: Tensor, *, last: int = 1024) -> dict[str, Any]:
    """A record of token losses [T - 1]: perplexity is exp of the mean loss.

    Returns:
        num_tokens: predicted tokens. loss: their mean loss. perplexity: of all. perplexity_last: of the last `last`.
        positions: for each range of `last` tokens, where it starts and its perplexity.
    """
    parts = losses.double().split(last)
    return {
        "num_tokens": losses.numel(),
        "loss": losses.double().mean().item(),
        "perplexity": _perplexity(losses),
        "perplexity_last": _perplexity(losses[-last:]),
        "positions": [{"start": i * last, "perplexity": _perplexity(part)} for i, part in enumerate(parts)],
    }


def append_copy(tokens: Tensor, *, num_copied: int = 512, distance: int = 3072) -> Tensor:
    """A text that ends in a repetition: its `num_copied` tokens that stand `distance` before its end come once more.

    Args:
        tokens: int64 [T].
        num_copied: tokens of the passage.
        distance: how far each copied token stands behind its original.

    Returns:
        int64 [T + num_copied].

    Raises:
        ValueError: if the passage does not lie inside the text.
    """
    start = tokens.numel() - distance
    if num_copied < 2 or num_copied > distance or start < 0:
        raise ValueError(
            f"2 <= num_copied <= distance <= {tokens.numel()} tokens must hold, "
            f"got num_copied={num_copied}, distance={distance}"
        )
    return torch.cat([tokens, tokens[start : start + num_copied]])


def copy_recall(reader: Reader, tokens: Tensor, *, num_copied: int = 512, distance: int = 3072) -> dict[str, Any]:
    """Perplexity of a passage's second copy, `distance` tokens after the first.

    Args:
        reader: of a causal language model of transformers. It reads one text only once for several distances.
        tokens: int64 [T], the text before the copy.
        num_copied, distance: as for `append_copy`.

    Returns:
        a record with the perplexity of the first and of the second copy, without its first token, which nothing
        announces.
    """
    text = append_copy(tokens, num_copied=num_copied, distance=distance)
    return summarise_copy(reader.losses(text), num_copied=num_copied, distance=distance)


def summarise_copy(losses: Tensor, *, num_copied: int, distance: int) -> dict[str, Any]:
    """The record of `copy_recall` from the losses of a text that `append_copy` made."""
    second = losses[-(num_copied - 1) :]
    end = losses.numel() - distance
    return {
        "num_copied": num_copied,
        "distance": distance,
        "perplexity_first": _perplexity(losses[end - (num_copied - 1) : end]),
        "perplexity_second": _perplexity(second),
    }


def _perplexity(losses: Tensor) -> float:
    return losses.double().mean().exp().item()
