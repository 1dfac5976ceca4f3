"""What `from_scratch.py` measures of a run: operations, losses on held-out rows, and the attention that is covered."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from moba.hf import get_moba_config, set_moba_config
from moba.validate import first_line
from moba_lab.data import open_shards
from moba_lab.evals.language import append_copy, summarise_copy
from moba_lab.evals.routing import averages, routing_quality
from moba_lab.train.model import num_parameters
from moba_lab.train.packing import PackedDataset, by_source
from moba_lab.train.recipe import Recipe

COPY_DISTANCES, COPIED = (1024, 3072), 256
LAST = 1024
_ROWS_AT_ONCE, _LOGITS = 8, 1 << 14
_DENSE = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
# Of a gradient, relative: bf16 makes 0.005.
MAX_ERROR = 0.03
_QUERIES = 2048


def fastest_dense(recipe: Recipe, device: torch.device) -> list[SDPBackend]:
    """torch's backends of dense attention on a GPU, the one first that is fastest of those with right gradients."""
    shape = recipe.model.shape
    heads, kv_heads, rows = shape["num_attention_heads"], shape["num_key_value_heads"], recipe.training.rows_at_once
    size = (rows, recipe.data.context, shape["hidden_size"] // heads)
    q, k, v = (
        torch.randn(size[0], size[1], h, size[2], device=device, dtype=torch.bfloat16, requires_grad=True).transpose(
            1, 2
        )
        for h in (heads, kv_heads, kv_heads)
    )
    grad = torch.randn_like(q)
    right = last_row_gradients(q, k, v, grad)
    times: dict[SDPBackend, float] = {}
    for backend in _DENSE:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Compiled, as in training: the choice among backends is made when a graph is, and each may fail there.
        torch.compiler.reset()
        attend = torch.compile(partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True))
        try:
            with sdpa_kernel(backend):
                for turn in range(8):
                    if turn == 3:
                        begin.record()
                    grads = torch.autograd.grad(attend(q, k, v), (q, k, v), grad)
            end.record()
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            print(f"{backend.name}: {first_line(error)}", flush=True)
            continue
        took = begin.elapsed_time(end) / 5
        error = max(
            ((mine[-1].float() - exact).norm() / exact.norm()).item() for mine, exact in zip(grads, right, strict=True)
        )
        print(f"dense attention, {backend.name}: {took:.2f} ms a layer, gradients' error {error:.4f}", flush=True)
        if error < MAX_ERROR:
            times[backend] = took
    torch.compiler.reset()
    return [*sorted(times, key=lambda backend: times[backend]), SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def last_row_gradients(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """Gradients of q [B, H, T, D], k and v [B, G, T, D] in fp32, of the last row: [H, T, D] and twice [G, T, D]."""
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    parts: list[list[Tensor]] = [[], [], []]
    for head in range(k.shape[1]):
        mine = slice(head * group, (head + 1) * group)
        inputs = [x.detach()[-1:, h].float().requires_grad_() for x, h in ((q, mine), (k, [head]), (v, [head]))]
        sums = [torch.zeros_like(x) for x in inputs]
        # In strips: the weights of all queries at once are 16 GiB a head at 64K tokens.
        for start in range(0, length, _QUERIES):
            stop = min(length, start + _QUERIES)
            queries, keys, values = (x[:, :, :stop] for x in inputs)
            mask = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).tril(start)
            with sdpa_kernel(SDPBackend.MATH):
                out = F.scaled_dot_product_attention(queries[:, :, start:], keys, values, mask, enable_gqa=True)
            for total, x in zip(
                sums, torch.autograd.grad(out, inputs, grad[-1:, mine, start:stop].float()), strict=True
            ):
                total += x
        for part, total in zip(parts, sums, strict=True):
            part.append(total[0])
    return [torch.cat(part) for part in parts]


def flops(recipe: Recipe, model: nn.Module) -> float:
    """Floating-point operations of a token, forward and backward, that the model's definition needs."""
    shape, length = recipe.model.shape, recipe.data.context
    width = shape["hidden_size"]
    at = torch.arange(length, dtype=torch.float64)
    starts = [*(start for start, _ in recipe.schedule.stages), 1.0]
    keys = 0.0
    for (start, stop), (_, config) in zip(pairwise(starts), recipe.schedule.stages, strict=True):
        read = at + 1
        if config is not None:
            past = (at // config.block_size).clamp_max(config.topk - 1)
            read = at % config.block_size + 1 + past * config.block_size
        if (window := shape.get("sliding_window")) is not None:
            read = (read + (at + 1).clamp_max(window)) / 2
        keys += (stop - start) * read.mean().item()
    return 6 * num_parameters(model)[0] + 12 * shape["num_hidden_layers"] * width * keys


class HeldOut:
    """Rows of each held-out source, and a model read on them."""

    def __init__(self, folder: Path, context: int, count: int) -> None:
        self.rows: dict[str, Tensor] = {}
        made = by_source(
            lambda shards, sources: PackedDataset(shards, context, seed=None, sources=sources, whole_rows=True),
            open_shards(folder, "held_out"),
        )
        for source, data in made.items():
            # The first rows of every document come first.
            order = sorted(range(len(data.rows)), key=lambda i: (data.rows[i][0].start, data.rows[i][0].document))
            self.rows[source] = torch.stack([data[i]["input_ids"] for i in order[:count]])

    def measure(self, training: Any) -> dict[str, Any]:
        """Loss by source, over the ends of rows, of copies, by position, and the attention mass that is covered."""
        result: dict[str, Any] = {"loss": {}, "last": {}, "positions": {}, "copy": {}}
        for source, rows in self.rows.items():
            losses = self._read(training, rows)
            result["loss"][source] = losses.double().mean().item()
            result["last"][source] = losses[:, -LAST:].double().mean().item()
            result["positions"][source] = [part.double().mean().item() for part in losses.tensor_split(8, dim=1)]
            context = rows.shape[1]
            copied = min(COPIED, context // 32)
            for distance in COPY_DISTANCES:
                where = {"num_copied": copied, "distance": distance * context // 8192}
                texts = torch.stack([append_copy(row[: context - copied], **where) for row in rows])
                records = [summarise_copy(losses, **where) for losses in self._read(training, texts)]
                result["copy"].setdefault(str(distance), {})[source] = {
                    which: sum(math.log(record[f"perplexity_{which}"]) for record in records) / len(records)
                    for which in ("first", "second")
                }
        return {**result, **self._routing(training)}

    def _routing(self, training: Any) -> dict[str, Any]:
        model, own = training.model, get_moba_config(training.model)
        if training.recipe.attention.schedule == "full":
            set_moba_config(model, training.recipe.attention.config())
        rows = [row for some in self.rows.values() for row in some[:2]]
        try:
            with training.precision(), torch.inference_mode():
                heads = [routing_quality(model, row, num_queries=64, chunk_tokens=row.numel()) for row in rows]
        except ValueError as error:
            return {"routing_error": str(error)}
        finally:
            set_moba_config(model, own)
        records = [record for row in heads for record in row]
        layers = sorted({record["layer"] for record in records})
        by_layer = {layer: averages([r for r in records if r["layer"] == layer]) for layer in layers}
        return {**averages(records), "layers": by_layer}

    @torch.inference_mode()
    def _read(self, training: Any, rows: Tensor) -> Tensor:
        """The negative log-likelihood of every token after the first: [R, T] to fp32 [R, T - 1]."""
        head, losses = training.model.get_output_embeddings(), []
        for part in rows.split(_ROWS_AT_ONCE):
            tokens = part.to(training.device)
            with training.precision():
                hidden = training.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
                states, words = hidden[:, :-1].flatten(0, 1).split(_LOGITS), tokens[:, 1:].flatten().split(_LOGITS)
                losses += [
                    F.cross_entropy(head(x).float(), y, reduction="none") for x, y in zip(states, words, strict=True)
                ]
        return torch.cat(losses).view(len(rows), -1).cpu()
