"""What a recipe will take, before it runs: tokens, memory and time, as estimates with their assumptions stated.

Letters: P parameters, T tokens that a device computes at once, C hidden size, I intermediate size, L layers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from moba_lab.train.loss import CHUNK_TOKENS
from moba_lab.train.packing import PackedDataset
from moba_lab.train.recipe import Recipe

# Of a large matrix product's rate, how much a whole training step keeps: about what SmolLM2-135M's keeps at 32K tokens
# on an H200 (benchmarks/results/train-step-h200.md), and with compiled layers (activation-last3-h200.md there), if a
# product runs at 790 TFLOP/s there, which no result holds. Larger models keep more.
EFFICIENCY = 0.17
COMPILED_EFFICIENCY = 0.3


@dataclass(frozen=True)
class Estimate:
    """Tokens, bytes and seconds of a training on one device.

    Attributes:
        num_tokens: read in all. unique_tokens: of the data, without repetition.
        padding: share of the rows that is padding.
        weights_bytes: weights, gradients and the optimizer's two moments.
        activations_bytes: kept for backward, and the largest passing ones.
        flops: of all steps, recomputation included. flops_per_s: measured for a matrix product on the device.
        efficiency: share of that which a step is expected to keep.
    """

    num_tokens: int
    unique_tokens: int
    padding: float
    weights_bytes: int
    activations_bytes: int
    flops: float
    flops_per_s: float
    efficiency: float

    @property
    def seconds(self) -> float:
        """Of all steps on one such device."""
        return self.flops / (self.flops_per_s * self.efficiency)


def estimate(recipe: Recipe, model: Any, trained: int, rows: PackedDataset, device: torch.device) -> Estimate:
    """Estimate a training.

    Args:
        recipe: of the training.
        model: the model; it may lie on the device "meta".
        trained: parameters that are trained.
        rows: what is read.
        device: it will run on; a matrix product is timed there.
    """
    config = model.config.get_text_config(decoder=True)
    total = sum(p.numel() for p in model.parameters())
    num_tokens = recipe.num_steps * recipe.training.rows_per_step * recipe.data.context
    return Estimate(
        num_tokens=num_tokens,
        unique_tokens=rows.num_tokens,
        padding=1 - rows.num_tokens / (len(rows.rows) * recipe.data.context),
        # fp32 weights, a bf16 copy of them under autocast, fp32 gradients and two moments.
        weights_bytes=total * (6 if recipe.training.precision == "bf16" else 4) + 12 * trained,
        activations_bytes=_activation_bytes(recipe, config),
        flops=num_tokens * _flops_per_token(recipe, config, total, trained),
        flops_per_s=matmul_rate(device, torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32),
        efficiency=COMPILED_EFFICIENCY if recipe.training.compile else EFFICIENCY,
    )


def keys_read(recipe: Recipe, num_layers: int) -> float:
    """Keys that a query attends to, averaged over the positions of a whole row, layers, and stages of the schedule."""
    context = recipe.data.context
    stages = recipe.schedule.stages
    ends = [*(start for start, _ in stages[1:]), 1.0]
    total = 0.0
    for (start, _), end in zip(stages, ends, strict=True):
        config = recipe.schedule.at(start, num_layers)
        most = config.block_size * config.topk
        sparse = context / 2 if most >= context else most - most * most / (2 * context)
        full = sum(config.is_full_layer(layer, num_layers) for layer in range(num_layers)) / num_layers
        total += (end - start) * (full * context / 2 + (1 - full) * sparse)
    return total


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a matrix product on `device`."""
    size = 8192 if device.type == "cuda" else 1024
    x = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        _wait(device)
        start = time.perf_counter()
        x @ x
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _flops_per_token(recipe: Recipe, config: Any, total: int, trained: int) -> float:
    """Forward and backward, and the forward again where activations are recomputed."""
    attention = 4 * config.num_attention_heads * _head_dim(config) * config.num_hidden_layers
    attention *= keys_read(recipe, config.num_hidden_layers)
    # The embedding is looked up; the output layer, which may share its matrix, multiplies.
    matrices = total - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
    forward = 2 * matrices + attention
    again = forward if recipe.training.recomputes else 0
    # All tokens are read; of those that are learned, backward takes more.
    learned = (recipe.training.tail or recipe.data.context) / recipe.data.context
    return forward + learned * (forward + attention + 2 * min(trained, matrices) + again)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _activation_bytes(recipe: Recipe, config: Any) -> int:
    rows, tail = recipe.training.rows_at_once, recipe.training.tail
    tokens = rows * (tail or recipe.data.context) // recipe.training.context_parallel
    is_half = recipe.training.precision == "bf16"
    narrow = 2 if is_half else 4
    # What a layer keeps for its backward pass: fp32 inputs of norms, q, k, v, out, and the gated MLP's parts.
    layer = tokens * (4 * 4 * config.hidden_size + narrow * (6 * config.hidden_size + 4 * config.intermediate_size))
    kept = 4 * tokens * config.hidden_size if recipe.training.recomputes else layer
    if tail is not None:
        # The cache, of which a layer whose backward pass is to come holds a copy in the attention's dtype.
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        kept += 2 * rows * recipe.data.context * kv_heads * _head_dim(config) * (4 + narrow)
    loss = min(tokens, CHUNK_TOKENS) * config.vocab_size * (2 * 4 + narrow)
    return int(config.num_hidden_layers * kept + max(2 * layer, loss))
