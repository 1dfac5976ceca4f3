"""Key convolution: a short causal convolution of the keys, so that what belongs together stands out in a block's mean.

In a transformers model it is hooked behind the key projections, before the rotary embedding:

add_key_convolution(model, width=3)       # then train; save_pretrained saves the weights
load_key_convolution(model, path)         # after from_pretrained, which does not know of them

Letters: B batch, T tokens, C channels (kv heads × head dim), W width.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from moba.hf.attention_modules import attentions, require_hook
from moba.hf.extensions import read_weights
from moba.hf.layout import PackedRows, PaddedRows, decode_layout
from moba.numerics import accumulation_dtype
from moba_lab.models.cached_rows import cache_layer, remember

# The attention implementations whose masks tell where sequences begin, or are absent where each row is one sequence.
ATTENTIONS = ("moba", "moba_naive", "sdpa")
ROWS = "unconvolved keys"
WIDTHS = (3, 5)


class _Call(NamedTuple):
    """What a call of an attention module knows, and its key projection does not."""

    cache_layer: Any
    options: dict[str, Any]


class KeyConvolution(nn.Module):
    """k'_t = k_t + SiLU(Σ_{i < W} w_i ⊙ k_{t−i}), for each channel by itself, over the tokens of t's own sequence.

    The weights begin at zero, where it changes nothing, so a trained model can take it up.

    Args:
        channels: C. width: W, 3 or 5. dtype, device: of the weights [C, W].

    Raises:
        ValueError: if the width is neither.

    Numerics: products and sums in fp32 (fp64 for fp64 keys), rounded once to the keys' dtype. A token's result is the
        same bits in a prompt and in a step of decoding.
    Source: Optimizing Mixture of Block Attention (arXiv 2511.11571); to be applied before the rotary embedding.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if width not in WIDTHS:
            raise ValueError(f"width must be one of {', '.join(map(str, WIDTHS))}, got {width!r}")
        self.weight = nn.Parameter(torch.zeros(channels, width, dtype=dtype, device=device))
        self.call: _Call | None = None  # while the layer that it belongs to runs

    @property
    def width(self) -> int:
        """Tokens that enter a key, its own included."""
        return self.weight.shape[1]

    def forward(self, keys: Tensor, before: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Convolve keys.

        Args:
            keys: [B, T, C].
            before: [B, any number, C], the unconvolved keys of the tokens before; only the last W - 1 matter. None:
                the keys begin their sequences.
            positions: int [B or 1, T], each token's position in its own sequence, which hides what lies before its
                position 0 (padding, another document). None: all that `before` and `keys` hold is one sequence a row.

        Returns:
            [B, T, C] in the keys' dtype.
        """
        wide = accumulation_dtype(keys.dtype)
        num_tokens, reach = keys.shape[1], self.width - 1
        rows = keys if before is None else torch.cat([before[:, -reach:], keys], dim=1)
        rows = F.pad(rows.to(wide), (0, 0, reach + num_tokens - rows.shape[1], 0))
        weight = self.weight.to(wide)
        total = weight[:, 0] * rows[:, reach:]
        for distance in range(1, self.width):
            earlier = rows[:, reach - distance : reach - distance + num_tokens]
            if positions is not None:
                earlier = torch.where((positions >= distance)[..., None], earlier, 0.0)
            total = total + weight[:, distance] * earlier
        return (keys.to(wide) + F.silu(total)).to(keys.dtype)


def add_key_convolution(model: PreTrainedModel, width: int = 3) -> None:
    """Put a `KeyConvolution` behind every layer's key projection, with weights of zero, which change nothing yet.

    The modules are named `key_convolution`, so their weights are trained, counted and saved with the model's; the width
    is written to `model.config.moba_key_convolution`. Prefill, chunks, decoding with any of transformers' dynamic and
    static caches or a `MoBACache`, beam search, left padding and packed documents are honoured: no key sees another
    sequence. Refused by name, when they occur: attention implementations other than "moba", "moba_naive" and "sdpa",
    padding under "sdpa", continuous batching, compiled steps with a cache.

    Args:
        model: of a family with separate key projections (`k_proj`). Add adapters (PEFT) first.
        width: tokens that enter a key, 3 or 5.

    Raises:
        ValueError: if the model has no such projections, or convolutions already.
    """
    layers = attentions(model)
    if any(hasattr(attention, "key_convolution") for attention in layers):
        raise ValueError("the model has key convolutions already")
    for attention in layers:
        projection = attention.k_proj
        attention.key_convolution = KeyConvolution(
            projection.out_features, width, dtype=model.dtype, device=projection.weight.device
        )
        attention.register_forward_pre_hook(_begin, with_kwargs=True)
        attention.register_forward_hook(_end)
        # Before other hooks on the projection, which see the keys as the rotary embedding does.
        projection.register_forward_hook(partial(_convolve, attention.key_convolution), prepend=True)
    model.config.get_text_config(decoder=True).moba_key_convolution = width


def load_key_convolution(model: PreTrainedModel, path: str | Path) -> None:
    """Add the key convolutions with which a model was saved, and their weights.

    Args:
        model: as `from_pretrained(path)` gives it.
        path: the folder, or the name that `from_pretrained` took.

    Raises:
        ValueError: if nothing was saved there, or it is not of this model.
    """
    width = getattr(model.config.get_text_config(decoder=True), "moba_key_convolution", None)
    if width is None:
        raise ValueError("the model was saved without key convolutions: its config has no moba_key_convolution")
    add_key_convolution(model, width)
    model.load_state_dict(read_weights(path, model, "key_convolution"), strict=False)


def _begin(attention: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Before an attention module runs: note what its key projection will need."""
    convolution = attention.key_convolution
    require_hook(attention.k_proj, convolution, "k_proj", "add_key_convolution")
    name = attention.config._attn_implementation
    if name not in ATTENTIONS:
        raise ValueError(f"attn_implementation must be one of {ATTENTIONS} for key convolutions, got {name!r}")
    convolution.call = _Call(cache_layer(attention, options), options)


def _end(attention: Any, args: tuple[Any, ...], output: Any) -> None:
    """After it: let go of the cache and the masks. (After an error the next call does: a hook that is always called
    makes torch.compile compile every layer apart.)
    """
    attention.key_convolution.call = None


def _convolve(convolution: KeyConvolution, projection: nn.Module, args: tuple[Any, ...], keys: Tensor) -> Tensor:
    """The output [B, T, C] of a key projection, convolved."""
    call = convolution.call
    if call is None:
        raise ValueError("k_proj was called outside its attention module, so its keys' neighbours are not known")
    positions = _positions(call.options, keys)
    if call.cache_layer is None:
        return convolution(keys, None, positions)
    rows = remember(call.cache_layer, ROWS, keys, need=convolution.width - 1)
    num_before = rows.shape[1] - keys.shape[1]
    if num_before and call.options.get("cu_seq_lens_q") is not None:
        raise ValueError("cu_seq_lens_q: packed sequences cannot go on from a cache with key convolutions")
    return convolution(keys, rows[:, :num_before], positions)


def _positions(options: dict[str, Any], keys: Tensor) -> Tensor | None:
    """Each token's position in its own sequence, int [B or 1, T]; None where a row is one sequence from its start."""
    num_tokens = keys.shape[1]
    token = torch.arange(num_tokens, dtype=torch.int32, device=keys.device)
    cu = options.get("cu_seq_lens_q")
    if cu is not None:
        return _in_packed(cu[None].int(), token)
    try:
        layout = decode_layout(options.get("attention_mask"))
    except ValueError as error:
        raise ValueError(
            'attention_mask: key convolutions understand padding and packing under attn_implementation="moba" only '
            "(where MoBAConfig's full_layers can make every layer full)"
        ) from error
    if isinstance(layout, PaddedRows):
        return token + (layout.query_end - num_tokens - layout.key_start)[:, None]
    if isinstance(layout, PackedRows):
        return _in_packed(layout.cu_seqlens, token)
    return None


def _in_packed(cu_seqlens: Tensor, token: Tensor) -> Tensor:
    """The positions [B, T] in their own sequences of tokens in packed rows, by cu_seqlens [B, num_sequences + 1]."""
    tokens = token.expand(cu_seqlens.shape[0], -1).contiguous()
    sequence = torch.searchsorted(cu_seqlens.contiguous(), tokens, right=True) - 1
    return tokens - cu_seqlens.gather(1, sequence)
