"""Generating text in the open: prefill in chunks, then one token after another, each handed on as it comes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moba.config import MoBAConfig, require_int
from moba_lab.checks import require_seed

if TYPE_CHECKING:
    from moba.hf.cache import MoBACache

logger = logging.getLogger("moba")


@torch.inference_mode()
def prefill(
    model: Any,
    prompt: Tensor,
    *,
    cache: MoBACache | None = None,
    chunk_tokens: int = 1024,
    on_progress: Callable[[int], None] = lambda num_read: None,
) -> tuple[Tensor, MoBACache]:
    """Read a prompt in chunks against a cache: the same computation as reading it at once, in less memory.

    Args:
        model: a causal language model of transformers.
        prompt: int64 [T] token ids, T >= 1.
        cache: what the model has read before, to go on from; it is changed. None: a new cache.
        chunk_tokens: tokens read in one forward pass, >= 1.
        on_progress: called with the number of prompt tokens read so far, after each chunk.

    Returns:
        fp32 logits [vocabulary] that follow the prompt, and the cache.

    Raises:
        ValueError: if there is no token or chunks are shorter than one.
    """
    from moba.hf.cache import MoBACache

    bounds = chunk_bounds(prompt.numel(), chunk_tokens)
    cache = MoBACache(model.config) if cache is None else cache
    prompt = prompt.to(model.device)
    logits = torch.empty(0)
    with cache.reading():
        for start, stop in bounds:
            logits = _step(model, prompt[start:stop], cache)
            on_progress(stop)
    return logits, cache


@torch.inference_mode()
def generate_tokens(
    model: Any,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    cache: MoBACache | None = None,
    chunk_tokens: int = 1024,
    on_progress: Callable[[int], None] = lambda num_read: None,
    use_graph: bool = True,
) -> Iterator[int]:
    """Read a prompt and yield new tokens until the model ends its text or `max_new_tokens` are made.

    Args:
        model, prompt, cache, chunk_tokens, on_progress: as for `prefill`. On a GPU, a cache that grows is emptied.
        use_graph: on a GPU, record the steps as a CUDA graph: several times as fast, and not seen by hooks in Python.
        max_new_tokens: at most this many tokens; the token that ends the text is yielded too.
        temperature: 0 takes the likeliest token, otherwise tokens are drawn at this temperature.
        seed: of the draws, 0 to 2**32 - 1.
    """
    require_seed("seed", seed)
    logits, cache = prefill(model, prompt, cache=cache, chunk_tokens=chunk_tokens, on_progress=on_progress)
    generator = torch.Generator(device=logits.device).manual_seed(seed)
    ends = end_tokens(model)
    step = _recorded(model, cache, max_new_tokens) if use_graph and model.device.type == "cuda" else None
    for num_made in range(1, max_new_tokens + 1):
        if temperature:
            # The largest logit is 0, so that however low the temperature, no quotient overflows upwards.
            weights = torch.softmax((logits - logits.max()) / temperature, dim=-1)
            token = torch.multinomial(weights, 1, generator=generator)
        else:
            token = logits.argmax(dim=-1, keepdim=True)
        made = int(token.item())
        yield made
        if made in ends or num_made == max_new_tokens:
            return
        logits = _step(model, token, cache) if step is None else step(token)


def _recorded(model: Any, cache: MoBACache, max_new_tokens: int) -> Callable[[Tensor], Tensor] | None:
    """A token [1] -> the fp32 logits [vocabulary] that follow it, by a CUDA graph; None if the model has no such."""
    from moba.hf.graph import DecodeGraph

    try:
        graph = DecodeGraph(model, cache, max_new_tokens)
    except ValueError as error:
        logger.warning("steps of decoding run one by one: %s", error)
        return None
    return lambda token: graph(token[None])[0].float()


def end_tokens(model: Any) -> set[int]:
    """The tokens that end a text."""
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, (list, tuple)) else {ends}


def _step(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    """Read tokens against the cache; the fp32 logits [vocabulary] that follow the last of them."""
    from moba.hf.graph import cache_name

    output = model(input_ids=tokens[None], use_cache=True, logits_to_keep=1, **{cache_name(model): cache})
    return output.logits[0, -1].float()


def chunk_bounds(num_tokens: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """Start and stop of each chunk.

    Raises:
        ValueError: if there is no token or chunks are shorter than one.
    """
    if num_tokens < 1:
        raise ValueError("the prompt must have at least one token, got none")
    require_int("chunk_tokens", chunk_tokens, 1)
    return [(start, min(start + chunk_tokens, num_tokens)) for start in range(0, num_tokens, chunk_tokens)]


def num_keys_read(config: MoBAConfig | None, num_layers: int, num_prompt: int, num_new: int = 0) -> tuple[int, int]:
    """How many keys one head reads over all layers, for a prompt and the tokens made after it.

    A query at position t reads (min(topk, b + 1) - 1) · block_size + t mod block_size + 1 keys, with b its own block,
    and t + 1 with full attention; a router with a budget ("top_p=…") at most as many.

    Args:
        config: None counts full attention.
        num_layers: layers of the model.
        num_prompt: prompt tokens.
        num_new: forward passes of one token after it.

    Returns:
        keys read, and keys that full attention reads.
    """
    position = torch.arange(num_prompt + num_new)
    dense = position + 1
    total = num_layers * int(dense.sum())
    if config is None:
        return total, total
    own = position // config.block_size
    sparse = (own + 1).clamp(max=config.topk).sub(1) * config.block_size + position % config.block_size + 1
    if config.decode == "full":
        sparse[num_prompt:] = dense[num_prompt:]
    num_full = sum(config.is_full_layer(layer, num_layers) for layer in range(num_layers))
    return num_full * int(dense.sum()) + (num_layers - num_full) * int(sparse.sum()), total
