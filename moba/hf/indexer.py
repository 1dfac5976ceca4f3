"""A learned router: a small module in each attention layer chooses the blocks of each key/value head.

add_indexer(model, head_dim=64, pool="max")                      # begins as a copy of the layers' projections
set_moba_config(model, MoBAConfig(128, 16, router="indexer"))
loss = model(**batch).loss + indexer_loss(model)                 # moba.hf.indexer_training
load_indexer(model, path)                                        # after from_pretrained(path)

An index query and index keys come from the layer's own input and have the rotary frequencies of the layer. A query's
score of a block is the largest (pool="max") or the mean (pool="mean") inner product with the block's index keys. The
query heads of a key/value head read the same blocks.

Letters: R tensor rows, T query tokens, S key tokens, G key/value heads, C hidden size, d index head dim, N blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moba import backends
from moba.config import MoBAConfig, require_int, require_one_of
from moba.hf.extensions import read_weights
from moba.hf.layout import PackedRows, PaddedRows
from moba.routers import max_token_scores
from moba.routing import Selection
from moba.sequences import Sequences

POOLS = ("max", "mean")

Layout = PaddedRows | PackedRows | tuple[Tensor, Tensor] | None


class Indexer(nn.Module):
    """Index queries and keys of one attention layer.

    Args:
        hidden_size: C. num_heads: G. head_dim: d, even. pool: "max" or "mean". bias: whether projections have one.
        rotates: whether the layer has a rotary embedding.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, head_dim: int, pool: str, *, bias: bool = False, rotates: bool = True
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.pool, self.rotates = num_heads, head_dim, pool, rotates
        self.index_q = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.index_k = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.call: tuple[Tensor, Any] | None = None  # the layer's input while it runs
        self.loss: Tensor | None = None  # of the last forward pass, see `indexer_loss`

    def forward(self, hidden: Tensor, rotary: Any = None) -> tuple[Tensor, Tensor]:
        """Index queries and keys [B, T, G, d] of a layer's input [B, T, C].

        Args:
            hidden: detached, so that the indexer's loss does not reach the model.
            rotary: cos and sin [B or 1, T, rotary dim] as the layer is given them; None where it has none.
        """
        q, k = (x(hidden).unflatten(-1, (self.num_heads, self.head_dim)) for x in (self.index_q, self.index_k))
        if rotary is None or not self.rotates:
            return q, k
        is_pair = isinstance(rotary, (tuple, list)) and len(rotary) == 2
        if not is_pair or rotary[0].ndim != 3 or rotary[0].is_complex():
            raise ValueError(
                'position_embeddings: router="indexer" needs a rotary embedding cos, sin [B, T, rotary dim]'
            )
        pairs = rotary_pairs(self.head_dim, rotary[0].shape[-1] // 2, hidden.device)
        # Models write cos as (f_0, f_1, …, f_0, f_1, …) or as (f_0, f_0, f_1, f_1, …). These columns hold each pair's
        # own frequency in the first case, and as many different ones in the second.
        column = pairs + rotary[0].shape[-1] // 2 * (pairs % 2)
        cos, sin = (x[..., column].unsqueeze(2) for x in rotary)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)


def rotary_pairs(head_dim: int, num_frequencies: int, device: torch.device | str = "cpu") -> Tensor:
    """Which of a layer's frequencies the pairs (p, p + n) of n index dims get: all that fit, spread evenly."""
    count = min(head_dim // 2, num_frequencies)
    return torch.arange(count, device=device) * num_frequencies // max(count, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    count = cos.shape[-1]
    first, second, rest = x.split([count, count, x.shape[-1] - 2 * count], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)


def add_indexer(model: PreTrainedModel, head_dim: int = 64, pool: str = "max") -> None:
    """Add an `Indexer` to every attention layer without a window, for router="indexer".

    The modules are named `moba_indexer`; their weights are trained, counted and saved with the model's, and
    `model.config.moba_indexer` records the arguments. They begin as the layer's key projection and the mean of its
    query projections in each group, at evenly spread rotary frequencies; without norms, and with as many index dims as
    head dims, an untrained indexer with pool="mean" chooses what router="shared" does. Layers without separate
    projections (q_proj, k_proj) begin with random weights.

    Args:
        model: of a family that MoBA serves. Add adapters (PEFT) first.
        head_dim: index dims of each key/value head; even.
        pool: a block's score, the "max" or "mean" of its tokens'.

    Raises:
        ValueError: if an argument is invalid, or the model has no such layers, or indexers already.
    """
    if require_int("head_dim", head_dim, 2) % 2:
        raise ValueError(f"head_dim must be even, got {head_dim}")
    require_one_of("pool", pool, POOLS)
    layers = [module for module in model.modules() if _is_attention(module)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no attention layers that read all keys")
    if any(hasattr(layer, "moba_indexer") for layer in layers):
        raise ValueError("the model has indexers already")
    for layer in layers:
        layer.moba_indexer = _make(layer, head_dim, pool)
        layer.register_forward_pre_hook(_begin, with_kwargs=True)
        layer.register_forward_hook(_end)
    model.config.get_text_config(decoder=True).moba_indexer = {"head_dim": head_dim, "pool": pool}


def load_indexer(model: PreTrainedModel, path: str | Path) -> None:
    """Add the indexers that a model was saved with, and their weights.

    Args:
        model: as `from_pretrained(path)` gives it. path: the folder, or the name that `from_pretrained` took.

    Raises:
        ValueError: if nothing was saved there, or it is not of this model.
    """
    said = getattr(model.config.get_text_config(decoder=True), "moba_indexer", None)
    if said is None:
        raise ValueError("the model was saved without indexers: its config has no moba_indexer")
    add_indexer(model, **said)
    model.load_state_dict(read_weights(path, model, "moba_indexer"), strict=False)


def require_indexer(model: nn.Module) -> None:
    """Raise a ValueError unless some layer of the model has an indexer."""
    if not any(hasattr(module, "moba_indexer") for module in model.modules()):
        raise ValueError(_no_indexer(model))


def index_vectors(module: Any, q: Tensor, k: Tensor, index_keys: Any, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """Index queries [B, T, G, d] of the layer's running call, and index keys [B, S, G, d] of all its keys.

    Args:
        module: the attention layer. q: [B, T, H, D]. k: [B, S, G, D].
        index_keys: the `IndexKeys` beside k in a `MoBACache`, which get those of this call's tokens; else None.

    Returns:
        index keys of None where those of earlier tokens are not known.

    Raises:
        ValueError: if the layer has no indexer, or another number of key/value heads.
    """
    indexer = getattr(module, "moba_indexer", None)
    if indexer is None or indexer.call is None:
        raise ValueError(_no_indexer(module))
    if indexer.num_heads != k.shape[2]:
        raise ValueError(
            f'router="indexer": the indexer of {type(module).__name__} has {indexer.num_heads} heads, and the layer '
            f"{k.shape[2]} key/value heads"
        )
    by_q, by_k = indexer(*indexer.call)
    if index_keys is not None:
        end = layout.query_end[:1] if isinstance(layout, PaddedRows) else k.shape[1]
        return by_q, index_keys.append(by_k.detach(), end, k.shape[1])
    return by_q, by_k if q.shape[1] == k.shape[1] else None


def choose_by_index(
    module: Any, by_q: Tensor, by_k: Tensor | None, layout: Layout, config: MoBAConfig, backend: str
) -> Tensor:
    """The blocks of each key/value head: int32 [B, T, G, K], as `moba_attention` takes `block_indices`.

    Raises:
        ValueError: if index keys are not known.
    """
    if by_k is None:
        raise ValueError(
            'past_key_values: router="indexer" needs the index keys of all tokens before, which only a MoBACache that '
            "this model filled under this router holds: pass past_key_values=moba.hf.cache.MoBACache(model.config)"
        )
    if isinstance(layout, PackedRows):
        rows = [
            _choose(module.moba_indexer.pool, by_q[row, None], by_k[row, None], (cu, cu), config, backend)
            for row, cu in enumerate(layout.cu_seqlens)
        ]
        return torch.cat(rows)
    return _choose(module.moba_indexer.pool, by_q, by_k, layout, config, backend)


@torch.no_grad()
def _choose(pool: str, by_q: Tensor, by_k: Tensor, layout: Layout, config: MoBAConfig, backend: str) -> Tensor:
    where: dict[str, Any] = {}
    if isinstance(layout, PaddedRows):
        where = {"key_start": layout.key_start, "key_end": layout.query_end}
    elif isinstance(layout, tuple):
        where = {"cu_q": layout[0], "cu_k": layout[1]}
    sequences = Sequences(by_q.shape[0], by_q.shape[1], by_k.shape[1], **where)
    block_size = sequences.fitting_block_size(config.block_size)
    router = max_token_scores if pool == "max" else "mean"
    selection = Selection.of(block_size, config.topk, config.keep_first, config.keep_recent, router)
    with torch.autocast(by_q.device.type, enabled=False):
        indices: Tensor = backends.resolve(backend, by_q, by_k).route(by_q, by_k, sequences, selection)
    return indices


def _no_indexer(what: nn.Module) -> str:
    return (
        f'router="indexer": {type(what).__name__} has no indexer: call moba.hf.indexer.add_indexer(model), or after '
        "from_pretrained(path) moba.hf.indexer.load_indexer(model, path)"
    )


def _is_attention(module: Any) -> bool:
    """Whether a module is a causal attention layer whose config does not give it a window or chunk."""
    if not ("Attention" in type(module).__name__ and hasattr(module, "layer_idx") and hasattr(module, "config")):
        return False
    kinds = getattr(module.config, "layer_types", None)
    kind = kinds[module.layer_idx] if kinds and module.layer_idx is not None else "full_attention"
    return getattr(module, "is_causal", True) and kind not in ("sliding_attention", "chunked_attention")


def _make(layer: Any, head_dim: int, pool: str) -> Indexer:
    """The indexer of a layer, in the dtype and on the device of its weights."""
    config, weight = layer.config, next(layer.parameters())
    q_proj: Any = getattr(layer, "q_proj", None)
    k_proj: Any = getattr(layer, "k_proj", None)
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width: Any = getattr(layer, "head_dim", None)
    dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    is_known = (
        isinstance(q_proj, nn.Linear)
        and isinstance(k_proj, nn.Linear)
        and width is not None
        and k_proj.weight.is_floating_point()
        and k_proj.out_features % width == 0
        and q_proj.out_features == config.num_attention_heads * width
        and q_proj.out_features % k_proj.out_features == 0
    )
    if is_known:
        num_heads = k_proj.out_features // width
    bias = is_known and k_proj.bias is not None and q_proj.bias is not None
    rotates = bool(getattr(layer, "use_rope", True))
    indexer = Indexer(config.hidden_size, num_heads, head_dim, pool, bias=bias, rotates=rotates)
    indexer.to(device=weight.device, dtype=dtype)
    nn.init.normal_(indexer.index_q.weight, std=config.hidden_size**-0.5)
    nn.init.normal_(indexer.index_k.weight, std=config.hidden_size**-0.5)
    if is_known:
        rope = getattr(config, "rope_parameters", None) or {}
        _copy_projections(indexer, q_proj, k_proj, width, int(width * rope.get("partial_rotary_factor", 1.0)))
    return indexer


@torch.no_grad()
def _copy_projections(indexer: Indexer, q_proj: nn.Linear, k_proj: nn.Linear, width: int, rotary_dim: int) -> None:
    """Give an indexer those rows of a layer's projections that have its rotary frequencies, then those without any."""
    pairs = rotary_pairs(indexer.head_dim, rotary_dim // 2)
    rest = torch.arange(rotary_dim, width)[: indexer.head_dim - 2 * len(pairs)]
    rows = torch.cat([pairs, pairs + rotary_dim // 2, rest]).to(k_proj.weight.device)
    for mine, theirs in ((indexer.index_k, k_proj), (indexer.index_q, q_proj)):
        for name, target in mine.named_parameters():
            source = getattr(theirs, name).unflatten(0, (indexer.num_heads, -1, width)).mean(1)
            # Dims that nothing fills begin near zero.
            by_head = target.unflatten(0, (indexer.num_heads, -1)).mul_(0.02)
            by_head[:, : len(rows)] = source[:, rows]
            target.copy_(by_head.flatten(0, 1))


def _begin(layer: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Before an attention layer runs: keep its input for the attention function."""
    hidden = options["hidden_states"] if "hidden_states" in options else args[0]
    rotary = options.get("position_embeddings")
    if rotary is None and len(args) > 1 and isinstance(args[1], tuple):
        rotary = args[1]
    layer.moba_indexer.call = hidden.detach(), rotary


# Not `always_call`, which makes torch.compile compile every layer apart: after an error, the next call replaces it.
def _end(layer: Any, args: tuple[Any, ...], output: Any) -> None:
    layer.moba_indexer.call = None
