"""MoBAttention: an attention layer with MoBA for models that are not transformers'.

Letters: B batch, T query tokens, S key tokens, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moba.attention import moba_attention
from moba.config import MoBAConfig, require_int

KeysAndValues = tuple[Tensor, Tensor]


class MoBAttention(nn.Module):
    """Projections, rotary embedding and Mixture of Block Attention.

    out = o_proj(MoBA(rotary(q_proj(x)), rotary(k_proj(x)), v_proj(x)))

    Args:
        hidden_size: width of the input and of the output.
        num_heads: query heads H.
        num_kv_heads: key/value heads G, which divide H; num_heads by default.
        head_dim: D; must be even with a rotary embedding. hidden_size / num_heads by default.
        config: block_size, topk and the rest. `full_layers` must be 0, because this is one layer; see `full`.
        rope_base: base of the rotary embedding (the two halves of a head are rotated against each other, as in Llama).
            None: no rotary embedding.
        bias: whether the projections have a bias.
        full: use full attention instead of MoBA. You may change this attribute at any time, also during training.

    Raises:
        ValueError: naming the argument, what it was, and what is valid.

    Example: read a prompt, then go on token by token.

        >>> import torch
        >>> from moba import MoBAConfig, MoBAttention
        >>> attention = MoBAttention(64, num_heads=4, num_kv_heads=2, config=MoBAConfig(16, topk=4, decode="moba"))
        >>> prompt = torch.randn(1, 200, 64)
        >>> out, past = attention(prompt, return_past=True)
        >>> step, past = attention(torch.randn(1, 1, 64), past=past, return_past=True)
        >>> out.shape, step.shape, past[0].shape
        (torch.Size([1, 200, 64]), torch.Size([1, 1, 64]), torch.Size([1, 201, 2, 16]))

    Source: MoBA (arXiv 2502.13189), sections 2 and 3.2 (hybrids of full attention and MoBA).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        config: MoBAConfig,
        rope_base: float | None = 10000.0,
        bias: bool = False,
        full: bool = False,
    ) -> None:
        super().__init__()
        require_int("hidden_size", hidden_size, 1)
        require_int("num_heads", num_heads, 1)
        num_kv_heads = num_heads if num_kv_heads is None else require_int("num_kv_heads", num_kv_heads, 1)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads={num_heads}, got {num_kv_heads}")
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(f"head_dim must be given where num_heads={num_heads} does not divide {hidden_size=}")
            head_dim = hidden_size // num_heads
        require_int("head_dim", head_dim, 1)
        if rope_base is not None and (head_dim % 2 or not rope_base > 0):
            raise ValueError(f"rope_base={rope_base!r} needs to be positive and head_dim to be even, got {head_dim=}")
        if not isinstance(config, MoBAConfig):
            raise ValueError(f"config must be a MoBAConfig, got {config!r}")
        if config.full_layers:
            raise ValueError(f"full_layers must be 0 for a single layer (see `full`), got {config.full_layers!r}")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.config = config
        self.rope_base = rope_base
        self.full = full
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)

    def forward(
        self,
        x: Tensor,
        *,
        past: KeysAndValues | None = None,
        key_start: Tensor | None = None,
        return_past: bool = False,
    ) -> Tensor | tuple[Tensor, KeysAndValues]:
        """Attend causally from the tokens x to the past and to themselves.

        Args:
            x: [B, T, hidden_size].
            past: keys (rotated) and values of the tokens before x, [B, S - T, G, D] each, as returned before.
                One token with a past is a decode step and follows `config.decode`.
            key_start: int32 [B], each row's first real token among the S (left padding).
            return_past: also return the keys and values of all S tokens.

        Returns:
            [B, T, hidden_size]; with return_past a tuple of it and the new past.

        Raises:
            ValueError: if x or past have a wrong shape, or what `moba_attention` raises.
        """
        if x.ndim != 3 or x.shape[-1] != self.q_proj.in_features:
            raise ValueError(f"x must be [B, T, {self.q_proj.in_features}], got {tuple(x.shape)}")
        batch, num_queries, _ = x.shape
        if key_start is not None and not (isinstance(key_start, Tensor) and key_start.shape == (batch,)):
            raise ValueError(f"key_start must be an int32 tensor [B] = [{batch}], got {key_start!r}")
        q = self.q_proj(x).view(batch, num_queries, self.num_heads, self.head_dim)
        k = self.k_proj(x).view(batch, num_queries, self.num_kv_heads, self.head_dim)
        v = self.v_proj(x).view(batch, num_queries, self.num_kv_heads, self.head_dim)
        num_past = 0 if past is None else self._check_past(past, batch)
        if self.rope_base is not None:
            q, k = self._rotate(q, k, num_past, key_start)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        out = self._attend(q, k, v, key_start, is_decode=num_queries == 1 and num_past > 0)
        out = self.o_proj(out.flatten(2))
        return (out, (k, v)) if return_past else out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_start: Tensor | None, is_decode: bool) -> Tensor:
        config = self.config
        if self.full or (is_decode and config.decode == "full"):
            # One block that holds every key is full attention.
            whole: Tensor = moba_attention(
                q, k, v, block_size=max(k.shape[1], 1), topk=1, key_start=key_start, backend=config.backend
            )
            return whole
        out: Tensor = moba_attention(
            q,
            k,
            v,
            key_start=key_start,
            backend=config.backend,
            **config.selection,
        )
        return out

    def _check_past(self, past: KeysAndValues, batch: int) -> int:
        """The number of tokens in a past of the right shape."""
        for name, x in zip(("keys", "values"), past, strict=True):
            if x.ndim != 4 or x.shape[0] != batch or x.shape[2:] != (self.num_kv_heads, self.head_dim):
                raise ValueError(
                    f"past {name} must be [{batch}, S - T, {self.num_kv_heads}, {self.head_dim}], got {tuple(x.shape)}"
                )
        return past[0].shape[1]

    def _rotate(self, q: Tensor, k: Tensor, num_past: int, key_start: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rotate q [B, T, H, D] and k [B, T, G, D] by their positions, counted from each row's first real token."""
        assert self.rope_base is not None
        half = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=q.device)
        frequency = self.rope_base ** (-half / self.head_dim)
        position = torch.arange(num_past, num_past + q.shape[1], dtype=torch.float32, device=q.device)[None]
        if key_start is not None:
            position = position - key_start[:, None]
        angle = position[..., None] * frequency
        cos, sin = (f(angle)[:, :, None].to(q.dtype) for f in (torch.cos, torch.sin))

        def rotate(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        return rotate(q), rotate(k)

    def extra_repr(self) -> str:
        """Settings that are shown when the module is printed."""
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"block_size={self.config.block_size}, topk={self.config.topk}, full={self.full}"
        )
