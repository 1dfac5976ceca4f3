"""The q, k and v of a benchmark: what blocks they choose decides how even the work is."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moba.config import MoBAConfig, require_one_of
from moba_lab.bench.cases import Case

ROUTINGS = ("random", "clustered", "model")
# Blocks of a topic, as a multiple of top-k, and how far the topics' keys lie apart, in standard deviations.
TOPIC_BLOCKS, TOPIC_DISTANCE = 2, 0.5
# How the model was trained to read; a case then chooses from its queries and keys by settings of its own.
TRAINED = MoBAConfig(128, 8)


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of out, [1, T, H or G, D], v and the gradient standard normal.

    Of "random" q and k, every block is chosen about equally often: the hardest case for sparsity. Of "clustered" ones
    each block of the text has one of several topics, and queries look for their own. "model" takes them from layers of
    SmolLM2 as trained with MoBA, which reads State of the Union addresses: key/value heads from all over its depth,
    each with its three query heads, repeated where the case has more. Wider heads repeat their channels, scaled so that
    no logit changes.

    Raises:
        ValueError: if the case's heads cannot be made of the model's, or it cannot be loaded.
    """
    require_one_of("routing", case.routing, ROUTINGS)
    q, k, v, d_out = (
        torch.randn(1, case.tokens, heads, case.head_dim, device=device, dtype=case.dtype)
        for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    )
    if case.routing == "clustered":
        num_blocks = -(-case.tokens // case.block_size)
        topic = torch.randint(-(-num_blocks // (TOPIC_BLOCKS * case.topk)), (num_blocks,), device=device)
        centres = TOPIC_DISTANCE * torch.randn(int(topic.max()) + 1, case.kv_heads, case.head_dim, device=device)
        shift = centres[topic].to(case.dtype).repeat_interleave(case.block_size, dim=0)[: case.tokens]
        k += shift
        q += shift.repeat_interleave(case.heads // case.kv_heads, dim=1)
    if case.routing == "model":
        q, k = _of_model(case, device)
    return q, k, v, d_out


def _of_model(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    all_q, all_k = model_heads(case.tokens, device)  # [G, T, 3, d], [G, T, d], on the CPU
    dim = all_k.shape[-1]
    if case.head_dim % dim:
        raise ValueError(f"--routing model: --head-dim must be a multiple of the model's {dim}, got {case.head_dim}")
    repeats, group = case.head_dim // dim, case.heads // case.kv_heads
    chosen = torch.linspace(0, len(all_k) - 1, case.kv_heads).round().long()
    q, k = all_q[chosen].to(device, case.dtype), all_k[chosen].to(device, case.dtype)
    member = torch.arange(group, device=device) % q.shape[2]
    q = q[:, :, member].transpose(0, 1).flatten(1, 2).repeat(1, 1, repeats) * repeats**-0.5
    return q[None], k.transpose(0, 1).repeat(1, 1, repeats)[None]


def trained_model(tokens: int, config: MoBAConfig, device: torch.device) -> tuple[Any, Tensor]:
    """SmolLM2 as trained with MoBA, in bf16, to read with `config`; and so many tokens of addresses, int64 [T].

    Raises:
        ValueError: if it cannot be loaded, or the addresses are shorter.
    """
    from moba import register_moba
    from moba_lab.evals.texts import haystack_text
    from moba_lab.models.load import load_model

    register_moba(config)
    model, tokenizer = load_model("activated", dtype=torch.bfloat16, attn_implementation="moba")
    ids = torch.tensor(tokenizer(haystack_text(), verbose=False)["input_ids"])
    if ids.numel() < tokens:
        raise ValueError(f"--tokens must be at most the {ids.numel():,} of the text, got {tokens:,}")
    return model.to(device), ids[:tokens].to(device)


@lru_cache(maxsize=1)
def model_heads(tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of every key/value head of the model's MoBA layers, its query heads [G, T, 3, d] and keys [G, T, d], on the CPU.

    Raises:
        ValueError: if the model cannot be loaded, or the addresses are shorter.
    """
    from moba_lab.evals.reader import chunk_tokens_for
    from moba_lab.evals.routing import observe_layers
    from moba_lab.models.generation import prefill

    model, ids = trained_model(tokens, TRAINED, device)
    queries: dict[int, list[Tensor]] = {}
    keys: dict[int, Tensor] = {}

    def observe(layer: int, q: Tensor, k: Tensor, *rest: object) -> None:
        queries.setdefault(layer, []).append(q.cpu())
        keys[layer] = k.cpu()

    with torch.no_grad(), observe_layers(model, observe):
        prefill(model, ids, chunk_tokens=chunk_tokens_for(device))
    k = torch.cat([keys[layer].transpose(0, 1) for layer in keys])
    q = torch.cat([torch.cat(parts).unflatten(1, (k.shape[0] // len(keys), -1)).transpose(0, 1)
                   for parts in queries.values()])  # fmt: skip
    return q, k
