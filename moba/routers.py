"""Rules that score blocks: functions (query rows [rows, H, D], block means [N, G, D]) -> scores [rows, H, N].

Pass one as `router=...`, or its name where it has one. In `moba.MoBAConfig`, names are saved with a model.

    "mean"          mean_key_scores: the paper's
    "shared"        shared_scores: the query heads of a kv head choose together
    "top_p=0.9"     TopP(0.9): as few blocks as hold 0.9 of the mass, at most topk
    "unrotated"     transformers models only: "mean", from before the rotary embedding
    "indexer"       transformers models only: a small learned module chooses for each kv head (moba.hf.indexer)

A rule is given rows and means of one sequence, in chunks, and more blocks than a row may attend to; a row's scores must
depend on that row and those means only. "recent" and "sink" score nothing: kept blocks fill every place.

Letters: H query heads, G key/value heads, D head dim, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from moba.config import Router, check_top_p, named_top_p
from moba.numerics import accumulation_dtype, full_fp32_matmul

ScoreFunction = Callable[[Tensor, Tensor], Tensor]

# Inner products that `max_token_scores` holds at once.
_PRODUCTS_PER_CHUNK = 1 << 20


def mean_key_scores(q: Tensor, means: Tensor) -> Tensor:
    """Score(t, j) = ⟨q_t, mean(K_j)⟩ for every query head against the means of its kv head.

    Args:
        q: [rows, H, D].
        means: [N, G, D].

    Returns:
        [rows, H, N].

    Numerics: fp32 products and sums (fp64 for fp64 inputs), never TF32.
    Source: MoBA, eq. 6.
    """
    rows, num_heads, head_dim = q.shape
    num_blocks, num_kv_heads, _ = means.shape
    wide = accumulation_dtype(q.dtype)
    group = num_heads // num_kv_heads
    q_by_kv_head = q.to(wide).view(rows, num_kv_heads, group, head_dim).permute(1, 0, 2, 3)
    with full_fp32_matmul():
        scores = q_by_kv_head.reshape(num_kv_heads, rows * group, head_dim) @ means.to(wide).permute(1, 2, 0)
    return scores.view(num_kv_heads, rows, group, num_blocks).transpose(0, 1).reshape(rows, num_heads, num_blocks)


def shared_scores(q: Tensor, means: Tensor) -> Tensor:
    """The mean of `mean_key_scores` over the query heads of a kv head, so that all of them choose the same blocks.

    Args, Returns, Numerics: as `mean_key_scores`.
    """
    scores = mean_key_scores(q, means).unflatten(1, (means.shape[1], -1))
    return scores.mean(dim=2, keepdim=True).expand_as(scores).flatten(1, 2)


def max_token_scores(q: Tensor, blocks: Tensor) -> Tensor:
    """Score(t, j) = max over tokens i of block j of ⟨q_t, k_i⟩ for every query head against the keys of its kv head.

    It scores keys, not means, so it serves where all keys are at hand: router="indexer" routes by it.

    Args:
        q: [rows, H, D].
        blocks: [N, tokens of a block, G, D].

    Returns:
        [rows, H, N].

    Raises:
        ValueError: if given block means.

    Numerics: fp32 products and sums (fp64 for fp64 inputs), never TF32. Products of a few blocks exist at once.
    """
    if blocks.ndim != 4:
        raise ValueError(f"router=max_token_scores scores keys, and here are only block means {tuple(blocks.shape)}")
    (num_rows, num_heads, _), (num_blocks, size, num_kv_heads, _) = q.shape, blocks.shape
    wide = accumulation_dtype(q.dtype)
    by_kv_head = q.to(wide).unflatten(1, (num_kv_heads, num_heads // num_kv_heads)).transpose(0, 1).flatten(1, 2)
    scores = by_kv_head.new_empty(*by_kv_head.shape[:2], num_blocks)
    step = max(1, _PRODUCTS_PER_CHUNK // max(1, num_rows * num_heads * size))
    for start in range(0, num_blocks, step):
        keys = blocks[start : start + step].to(wide).permute(2, 3, 0, 1)
        with full_fp32_matmul():
            products = by_kv_head @ keys.flatten(2)
        scores[..., start : start + step] = products.unflatten(-1, keys.shape[2:]).amax(-1)
    return scores.unflatten(1, (num_rows, -1)).transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True)
class TopP:
    """A budget for each query: the fewest blocks, at most topk, that hold the share p of the mass.

    The mass of past block j is softmax_j(score · D^−0.5) over all past blocks of the query. Blocks are taken in the
    order of selection, kept blocks first, until they hold p or no place is left. Kept blocks and the own block are
    always taken.

    Args:
        p: between 0 and 1, both excluded.
        score: the rule that scores the blocks.

    Raises:
        ValueError: if p is not between 0 and 1.
    """

    p: float
    score: ScoreFunction = mean_key_scores

    def __post_init__(self) -> None:
        check_top_p(self.p)

    def __call__(self, q: Tensor, means: Tensor) -> Tensor:
        """Scores times D^−0.5, [rows, H, N]."""
        return self.score(q, means) * q.shape[-1] ** -0.5


def ranks_by_means(rule: ScoreFunction | None) -> bool:
    """Whether a rule scores a block by its mean for a kv head and the queries of that head alone, as all of these do;
    of a user's function that is not known.
    """
    return (rule.score if isinstance(rule, TopP) else rule) in (mean_key_scores, shared_scores)


def score_function(router: Router) -> ScoreFunction:
    """The function for a router's name, or the function itself."""
    if callable(router):
        return router
    p = named_top_p(router)
    if p is not None:
        return TopP(p)
    return shared_scores if router == "shared" else mean_key_scores
