"""How well a mean key finds the block that holds what a query looks for: to choose a block size before any training.

The model: a query compares itself with blocks of block_size keys through their means. In one block a key, or a few,
agree with the query more than the rest of the text does; products with all other keys are noise. Vectors have length
one, so the noise of a product has variance 1 / head_dim. The smaller the block, the less noise hides the signal.

Source: the statistical model of Optimizing Mixture of Block Attention (arXiv 2511.11571).
"""

from __future__ import annotations

import math
from statistics import NormalDist

from moba.config import require_int


def snr(
    head_dim: int, block_size: int, *, gap: float = 1.0, num_related: int = 1, related_gap: float | None = None
) -> float:
    """Signal-to-noise ratio of mean-key routing, between the right block and any other.

    SNR = (gap + (num_related − 1) · related_gap) · √(head_dim / (2 · block_size))

    Of two blocks, the wrong one wins with probability Φ(−SNR). Halving the block size raises the ratio by √2, as does
    doubling the head dim; so do related keys that stand together, which is what a key convolution is for
    (`moba_lab.models.key_convolution.add_key_convolution`). To compare settings the gaps need not be known: they cancel
    out.

    Args:
        head_dim: D.
        block_size: tokens in a block.
        gap: how much larger the query's mean product with the key it looks for is than with other keys, vectors being
            of length one: 1 where it is that key's direction itself.
        num_related: keys of that block which the query agrees with, the one it looks for included.
        related_gap: the gap of each of the others; `gap` by default.

    Raises:
        ValueError: naming the argument, what it was, and what is valid.

    Source: arXiv 2511.11571: the difference of two scores has mean Δμ_eff / B and variance 2 / (d · B), so
        SNR = Δμ_eff · √(d / 2B).
    """
    require_int("head_dim", head_dim, 1)
    require_int("block_size", block_size, 1)
    if require_int("num_related", num_related, 1) > block_size:
        raise ValueError(f"num_related must be at most block_size = {block_size}, got {num_related}")
    related_gap = gap if related_gap is None else related_gap
    for name, value in (("gap", gap), ("related_gap", related_gap)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")
    return (gap + (num_related - 1) * related_gap) * math.sqrt(head_dim / (2 * block_size))


def retrieval_rate(ratio: float, num_blocks: int, topk: int) -> float:
    """How often the right block is among those chosen: the probability that fewer than topk − 1 others score higher.

    The right block's score carries noise of its own, which all comparisons share:
    ∫ φ(z) · P(Binomial(num_blocks − 1, Φ(−√2 · SNR − z)) ≤ topk − 2) dz

    Args:
        ratio: as `snr` gives it.
        num_blocks: past blocks to choose from, the right one included.
        topk: blocks a query attends to, its own, which is not chosen by score, included.

    Raises:
        ValueError: naming the argument, what it was, and what is valid.

    Numerics: the trapezoid rule on 401 points from −8 to 8, exact to about 1e-9.
    """
    require_int("num_blocks", num_blocks, 1)
    require_int("topk", topk, 1)
    if not math.isfinite(ratio):
        raise ValueError(f"ratio must be a finite number, got {ratio!r}")
    places = topk - 1
    if places >= num_blocks:
        return 1.0
    normal, step = NormalDist(), 0.04
    points = [(i - 200) * step for i in range(401)]
    return step * sum(
        normal.pdf(z) * _at_most(places - 1, num_blocks - 1, normal.cdf(-math.sqrt(2) * ratio - z)) for z in points
    )


def _at_most(most: int, trials: int, p: float) -> float:
    """P(Binomial(trials, p) ≤ most)."""
    if most < 0 or not 0.0 < p < 1.0:
        return float(most >= (0 if p <= 0.0 else trials))
    log_p, log_q = math.log(p), math.log1p(-p)

    def log_term(i: int) -> float:
        ways = math.lgamma(trials + 1) - math.lgamma(i + 1) - math.lgamma(trials - i + 1)
        return ways + i * log_p + (trials - i) * log_q

    return min(sum(math.exp(log_term(i)) for i in range(min(most, trials) + 1)), 1.0)
