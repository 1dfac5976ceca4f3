"""Key convolution: a short causal convolution of the keys, so that what belongs together stands out in a block's mean.

Letters: B batch, T tokens, C channels (kv heads × head dim), W width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moba.numerics import accumulation_dtype

WIDTHS = (3, 5)


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
        self.call: Any = None  # what `moba_lab.models.key_convolution` notes while a model's layer runs

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

    def extra_repr(self) -> str:
        """What printing a model says of it."""
        return f"channels={self.weight.shape[0]}, width={self.width}"
