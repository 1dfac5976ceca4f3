"""Where each row's sequences lie, told by transformers' mask interface once per forward pass.

transformers asks the mask function registered under an attention's name for a mask, and hands the result to every
layer. Ours answers with a few integers a row instead of a T × S mask. They travel as one int32 tensor of four
dimensions, which transformers passes on untouched, also between devices and through `generate`.

transformers asks for masks that no layer uses, so what cannot be honoured is refused by the layer that is given it.
An attention that is not MoBA's must fail on a mask, not run without causality: whoever adds one of these shapes to
scores [B, H, T, S], T <= S, gets an error there, or at the latest when multiplying with values and weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

# How a layer attends that is not MoBA's: within a sliding window, or within chunks of a sequence. None: to everything.
Local = Literal["sliding", "chunked"]
# Columns of an encoded layout. Its rows are always more, so that it fits no scores [B, H, T, S] with T <= S.
_COLUMNS: dict[Local | None, int] = {None: 2, "sliding": 3, "chunked": 4}
_LOCAL_ROWS = 2


@dataclass(frozen=True)
class PaddedRows:
    """Each row holds one sequence: int32 [B] each, counted from the first key that the layer is given.

    Attributes:
        key_start: the row's first real key; left padding lies before it. Negative where a sliding layer's cache has
            dropped it.
        real_end: one past its last real key; right padding lies behind it.
        query_end: one past the key of the last query. Keys behind it are a static cache's empty places.
        local: how the layer attends.
    """

    key_start: Tensor
    real_end: Tensor
    query_end: Tensor
    local: Local | None = None

    def encode(self) -> Tensor:
        """As the mask that transformers passes on: [B, 1, 3, 2], the second column equal to the first."""
        return _in_columns(torch.stack([self.key_start, self.real_end, self.query_end], dim=1), self.local)


@dataclass(frozen=True)
class PackedRows:
    """Each row holds several sequences, one after another.

    Attributes:
        cu_seqlens: int32 [B, num_sequences + 1], at least two; rows with fewer sequences repeat their length.
        local: how the layer attends.
    """

    cu_seqlens: Tensor
    local: Local | None = None

    def encode(self) -> Tensor:
        """As the mask that transformers passes on: [B, 1, num_sequences + 2, 2]; the last row says nothing."""
        return _in_columns(pad(self.cu_seqlens, (0, 1)), self.local)


def _in_columns(rows: Tensor, local: Local | None) -> Tensor:
    if local is not None:
        rows = pad(rows, (0, _LOCAL_ROWS))
    return rows[:, None, :, None].repeat(1, 1, 1, _COLUMNS[local])


# What layers refuse to honour.
SWITCH_PART = 'of a model of several modalities, switch the language model alone: {"text_config": "moba"}'
WINDOW = (
    "sliding_window: this model makes a mask for a window or chunk that its config does not name (sliding_window, "
    "attention_chunk_size), so MoBA cannot tell which keys its layers read"
)
ROOM = (
    "cache: a static cache gives this model's sliding or chunked layers more keys than they read; take one that knows "
    "the layers: StaticCache or MoBACache(model.config, max_cache_len=...)"
)
EXTRA = "attention_mask: MoBA cannot honour the extra mask functions that this model applies"
BIDIRECTIONAL = (
    "is_causal: MoBA is causal and cannot honour the bidirectional or partial attention that this model asks for; "
    + SWITCH_PART
)
OTHER = "attention_mask: MoBA cannot honour the mask that this model adds to causality and padding"
# The place of each is the last extent of the mask [B, 1, 0, place]; at 0 all tokens are real.
REASONS = (None, WINDOW, EXTRA, BIDIRECTIONAL, OTHER, ROOM)


def decode_layout(mask: Any) -> PaddedRows | PackedRows | None:
    """Read what `layout_mask` wrote; None where every row is one whole sequence.

    Raises:
        ValueError: for a mask that did not come from `layout_mask`, such as a 4-D mask given by the user, or one that
            MoBA cannot honour.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.int32 or mask.ndim != 4 or mask.shape[1] != 1:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be a padding mask [B, S] with 1 for real tokens; MoBA cannot honour other masks or "
            f"attention biases, got {got}"
        )
    if mask.shape[2] == 0:
        if (reason := REASONS[mask.shape[3]]) is not None:
            raise ValueError(reason)
        return None
    rows = mask[:, 0, :, 0]
    local = next(kind for kind, columns in _COLUMNS.items() if columns == mask.shape[3])
    if local is not None:
        rows = rows[:, :-_LOCAL_ROWS]
    if rows.shape[1] == 3:
        key_start, real_end, query_end = (x.contiguous() for x in rows.unbind(dim=1))
        return PaddedRows(key_start, real_end, query_end, local)
    return PackedRows(rows[:, :-1].contiguous(), local)


def layout_mask(*, batch_size: int, device: torch.device | str | None = None, **asked: Any) -> Tensor:
    """The mask function of MoBA's attention names: the layout of the rows, encoded.

    Args:
        batch_size: B. asked: what `_find_layout` takes.

    Returns:
        What `decode_layout` reads, never None, which elsewhere than in MoBA means that nothing is masked. For masks of
        the user's own making and bidirectional attention it is refused when it is read.

    Raises:
        ValueError: for padding between real tokens, or a static cache with too little room.
    """
    layout = _find_layout(batch_size=batch_size, device=device, **asked)
    if isinstance(layout, (PaddedRows, PackedRows)):
        return layout.encode()
    return torch.empty(batch_size, 1, 0, REASONS.index(layout), dtype=torch.int32, device=device)


def _find_layout(
    batch_size: int,
    kv_length: int,
    q_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = False,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> PaddedRows | PackedRows | str | None:
    """The layout; None where all tokens are real and every key may be read, or one of REASONS.

    Args:
        batch_size, kv_length, q_length: B, S and T.
        q_offset: tokens before the first query; a tensor with a static cache.
        kv_offset: tokens before the first key, which the cache of a sliding layer has dropped.
        mask_function: causal or local, or what transformers builds for packed sequences.
        attention_mask: bool [B, at most S], padding mask.
        local_size: width of a sliding window or chunk.
        allow_is_causal_skip: transformers' word that nothing was added to the mask function.
        config: the model's, which names its windows and chunks.
        kwargs: what other mask functions need (dtype, …).
    """
    if use_vmap:
        return EXTRA
    if mask_function is bidirectional_mask_function:
        return BIDIRECTIONAL
    local = None if local_size is None else _local_kind(config, local_size)
    is_plain = mask_function is causal_mask_function
    is_filled = isinstance(q_offset, int) and q_offset + q_length == kv_length + kv_offset
    if local_size is not None and local is not None:
        # One query of a compiled step, for which no mask may be skipped, stands in one sequence.
        is_plain = allow_is_causal_skip or q_length == 1
        if kv_length > local_size and not is_filled:
            return ROOM
    elif local_size is not None or kv_offset:
        return WINDOW
    else:
        _check_room(kv_length, q_length, q_offset, attention_mask)
    layout: PaddedRows | PackedRows | str | None = None
    if not is_plain:
        if attention_mask is not None or q_length != kv_length:
            return OTHER
        layout = _packed(mask_function, batch_size, q_length, device)
    elif attention_mask is not None:
        layout = _padded(attention_mask, batch_size, q_length, q_offset, kv_length + kv_offset)
    elif not is_filled:
        layout = _static_cache(batch_size, q_length, q_offset, device)
    if local is None or isinstance(layout, str):
        return layout
    if isinstance(layout, PackedRows):
        return PackedRows(layout.cu_seqlens, local)
    layout = layout or _static_cache(batch_size, q_length, q_offset, device)
    return PaddedRows(layout.key_start - kv_offset, layout.real_end - kv_offset, layout.query_end - kv_offset, local)


def row_spans(layout: Any, batch: int, length: int) -> list[tuple[int, int, int]]:
    """Row, first and one past the last token of each sequence in a batch."""
    if layout is None:
        return [(row, 0, length) for row in range(batch)]
    if isinstance(layout, PaddedRows):
        ends = zip(layout.key_start.tolist(), layout.real_end.tolist(), strict=True)
        return [(row, start, stop) for row, (start, stop) in enumerate(ends)]
    bounds = layout.cu_seqlens.tolist() if isinstance(layout, PackedRows) else [layout[0].tolist()]
    return [(row, start, stop) for row, cu in enumerate(bounds) for start, stop in pairwise(cu) if start < stop]


def is_local(layout: Any) -> TypeGuard[PaddedRows | PackedRows]:
    """Whether a layer with this layout reads a window or a chunk, and is not MoBA's."""
    return isinstance(layout, (PaddedRows, PackedRows)) and layout.local is not None


def local_width(config: Any, local: Local) -> int:
    """The width of a model's windows, or of its chunks."""
    size: int = config.sliding_window if local == "sliding" else config.attention_chunk_size
    return size


def _local_kind(config: Any, size: int) -> Local | None:
    """Which of the two the model's config calls this size; None where it is neither, or both."""
    kinds: list[Local] = []
    if getattr(config, "sliding_window", None) == size:
        kinds.append("sliding")
    if getattr(config, "attention_chunk_size", None) == size:
        kinds.append("chunked")
    return kinds[0] if len(kinds) == 1 else None


def require(condition: Tensor, message: str) -> None:
    """Raise a ValueError with `message` unless the one-element `condition` holds.

    Under torch.compile, which cannot branch on data, the check becomes an assertion inside the graph.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def _check_room(kv_length: int, q_length: int, q_offset: int | Tensor, mask: Tensor | None) -> None:
    """Raise a ValueError if the queries' own keys would lie behind the last of `kv_length` places, a static cache's.

    A GPU, which may hold `q_offset`, is not waited for: there a padding mask tells, with its column for each token.
    """
    if torch.compiler.is_compiling():
        return
    if isinstance(q_offset, int) or q_offset.device.type == "cpu":
        num_before = int(q_offset)
    elif mask is not None:
        num_before = mask.shape[-1] - q_length
    else:
        return
    if num_before + q_length > kv_length:
        raise ValueError(
            f"the cache has room for max_cache_len={kv_length} tokens, so {q_length} cannot follow the {num_before} it "
            "holds: make it with a larger max_cache_len, or take a MoBACache without one, which grows"
        )


def _static_cache(batch_size: int, q_length: int, q_offset: int | Tensor, device: Any) -> PaddedRows:
    end = torch.as_tensor(q_offset + q_length, dtype=torch.int32, device=device).expand(batch_size)
    return PaddedRows(torch.zeros_like(end), end, end)


def _padded(mask: Tensor, batch_size: int, q_length: int, q_offset: int | Tensor, kv_length: int) -> PaddedRows | None:
    if mask.ndim != 2 or mask.shape[0] != batch_size:
        raise ValueError(f"attention_mask must be [B, S] with B = {batch_size}, got {tuple(mask.shape)}")
    num_seen = mask.shape[1]
    if isinstance(q_offset, int) and num_seen < q_offset + q_length:
        raise ValueError(
            f"attention_mask must cover the {q_offset} cached and the {q_length} new tokens, got {num_seen} columns"
        )
    mask = mask.bool()
    is_static = not isinstance(q_offset, int) or kv_length > q_offset + q_length
    if not is_static and not torch.compiler.is_compiling() and mask.all():
        return None
    end = _static_cache(batch_size, q_length, q_offset, mask.device).query_end
    column = torch.arange(num_seen, dtype=torch.int32, device=mask.device)
    mask = mask & (column < end[:, None])
    count = mask.sum(dim=1, dtype=torch.int32)
    key_start = torch.where(mask, column, num_seen).amin(dim=1)
    key_start = torch.where(count > 0, key_start, end).to(torch.int32)
    real_end = torch.where(mask, column + 1, 0).amax(dim=1)
    real_end = torch.where(count > 0, real_end, end).to(torch.int32)
    require(
        (real_end - key_start == count).all(),
        "attention_mask must mark each row's real tokens in one run; MoBA cannot honour padding between them "
        "(for generation, pad on the left)",
    )
    return PaddedRows(key_start, real_end, end)


def _packed(mask_function: Callable, batch_size: int, q_length: int, device: Any) -> PackedRows | str | None:
    """Find the sequences that a mask function keeps apart by asking, for every token, about its neighbours only."""
    batch = torch.arange(batch_size, device=device)[:, None]
    token = torch.arange(q_length, device=device)[None]
    head = torch.zeros_like(token[:, :1])

    def sees(query: Tensor, key: Tensor) -> Tensor:
        return mask_function(batch, head, query, key).expand(batch_size, query.shape[1])

    before, after = token[:, :-1], token[:, 1:]
    is_causal = sees(token, token).all() & ~sees(before, after).any()
    if torch.compiler.is_compiling():
        torch._assert_async(is_causal, BIDIRECTIONAL)
        # How many sequences there are is data, so a graph cannot depend on it; the layers assert that there is one.
        return None
    if not is_causal:
        return BIDIRECTIONAL
    is_start = pad(~sees(after, before), (1, 0), value=True)
    most = int(is_start.sum(dim=1).max())
    if most == 1:
        return None
    starts = torch.where(is_start, token, q_length).sort(dim=1).values[:, :most]
    return PackedRows(pad(starts, (0, 1), value=q_length).to(torch.int32))
