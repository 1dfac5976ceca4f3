"""What the loss of a learned router reads of each block: its log mass and its largest product, in chunks of blocks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from moba.numerics import accumulation_dtype, full_fp32_matmul
from moba.routers import max_token_scores

# Most logits that exist at once, by the device's type.
MAX_LOGITS = {"cpu": 1 << 20}
MAX_LOGITS_OTHERWISE = 1 << 26


def log_masses(q: Tensor, k: Tensor, block_size: int, scale: float, softcap: float | None) -> Tensor:
    """log Σ exp(logit) over each block's keys up to the query. See `moba.backends` for the contract."""
    (num_queries, num_heads, _), num_keys = q.shape, len(k)
    wide = accumulation_dtype(q.dtype)
    by_kv_head = q.to(wide).unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3).flatten(1, 2)
    position = torch.arange(num_keys - num_queries, num_keys, device=q.device)[:, None]
    result = by_kv_head.new_empty(num_heads, num_queries, -(-num_keys // block_size))
    max_logits = MAX_LOGITS.get(q.device.type, MAX_LOGITS_OTHERWISE)
    step = max(1, max_logits // max(1, num_queries * num_heads * block_size)) * block_size
    for start in range(0, num_keys, step):
        keys = k[start : start + step].to(wide).permute(1, 2, 0)
        with full_fp32_matmul():
            logits = (by_kv_head @ keys).unflatten(1, (-1, num_queries)).flatten(0, 1) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        key = torch.arange(start, start + keys.shape[-1], device=q.device)
        logits = logits.masked_fill(key > position, -torch.inf)
        logits = pad(logits, (0, -keys.shape[-1] % block_size), value=-torch.inf)
        blocks = logits.unflatten(-1, (-1, block_size)).logsumexp(-1)
        result[..., start // block_size : start // block_size + blocks.shape[-1]] = blocks
    return result


def largest_products(q: Tensor, k: Tensor, block_size: int) -> Tensor:
    """The largest product with each past block's keys. See `moba.backends` for the contract."""
    num_finished = len(k) // block_size
    blocks = k[: num_finished * block_size].unflatten(0, (num_finished, block_size))
    # An unfinished block is nobody's past.
    return pad(max_token_scores(q, blocks).transpose(0, 1), (0, -(-len(k) // block_size) - num_finished))
