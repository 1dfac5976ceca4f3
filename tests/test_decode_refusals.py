"""Decoding with block means: what does not fit is refused; what nothing asks for is not done."""

from __future__ import annotations

import pytest
import torch
from helpers import LargestNewTensor, make_qkv
from test_decode import BLOCK, TOPK, Pages, int32, means_of

from moba import append_block_means, moba_attention, moba_attention_paged, moba_route
from moba.backends import load
from moba.backends.pytorch import decoding as cached
from moba.sequences import Sequences
from moba.top_blocks import top_blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "padded", "paged"])
def test_nothing_grows_with_the_context(kind, dtype, monkeypatch):
    """Of the pytorch backend, whose every allocation is an operator's result."""
    monkeypatch.setattr(cached, "WORKSPACE_BYTES", 8192)
    largest = []
    for num_keys in (2048, 16384):
        q, k, v = make_qkv(1, 1, num_keys, 2, 1, 32, dtype=dtype)
        means, options = means_of(k, "pytorch", 64), {"block_size": 64, "topk": 3, "backend": "pytorch"}
        pages = Pages(k, v, [num_keys], 64, 64)
        pages.append(num_keys, "pytorch")
        bounds = {"key_start": int32([64], "cpu")} if kind == "padded" else {}
        with LargestNewTensor() as made:
            if kind == "paged":
                pages.append(1, "pytorch")
                moba_attention_paged(q, **pages.arguments(), **options)
            else:
                append_block_means(means, k, num_new=1, block_size=64, backend="pytorch", **bounds)
                moba_attention(q, k, v, block_means=means, **options, **bounds)
        largest.append(made.num_elements)
    # A query row reads 192 keys; the scores of 256 blocks are fewer numbers than those keys.
    assert largest[0] == largest[1]


@pytest.mark.parametrize(
    ("num_blocks", "count"), [(7, 1), (7, 3), (7, 7), (109, 8), (130, 2), (130, 8), (511, 8), (640, 8)]
)
def test_the_best_blocks_are_the_same_whether_the_host_may_wait_or_not(num_blocks, count):
    shape = (50, num_blocks)
    scores = torch.randint(0, 4 * num_blocks // 7, shape).float().masked_fill(torch.rand(shape) < 0.3, -torch.inf)
    ranked = [sorted(range(num_blocks), key=lambda j: (-row[j], j))[:count] for row in scores.tolist()]
    expected = torch.tensor([sorted(row) for row in ranked])
    # Of entries that no query may choose, -inf, any may come.
    for may_wait in (True, False):
        chosen = top_blocks(scores, count, may_wait=may_wait).sort(dim=-1).values
        finite = torch.isfinite(scores.gather(1, expected)).all(dim=1)
        assert finite.any()
        assert torch.equal(chosen[finite], expected[finite])
        assert torch.equal(scores.gather(1, chosen).sort(dim=1).values, scores.gather(1, expected).sort(dim=1).values)


def test_refusals():
    q, k, v = make_qkv(2, 1, 40, 4, 2, 16)
    means = means_of(k, "pytorch")
    options = {"block_size": BLOCK, "topk": TOPK}

    def refuses(match, **changes):
        with pytest.raises(ValueError, match=match):
            moba_attention(q, k, v, **{**options, "block_means": means, **changes})

    refuses(r"block_means must be torch.float32 \[2, at least 5, 2, 16\].*got torch.float32 \(2, 4, 2, 16\)",
            block_means=means[:, :4])  # fmt: skip
    refuses("block_means must be torch.float32", block_means=means.double())
    refuses("block_means must be", block_means=3)
    refuses("last dimension of block_means", block_means=means.transpose(2, 3).contiguous().transpose(2, 3))
    routing = moba_attention(q, k, v, **options, return_routing=True)[1]
    refuses("cannot be combined with `routing`", routing=routing)
    for match, changes in {
        "num_new must be an integer >= 0, got -1": {"num_new": -1},
        "block_size must be an integer >= 1": {"block_size": 0},
        "means must be": {"means": means[:1]},
        "key_start must be an int32": {"key_start": torch.zeros(2)},
        "0 <= key_start <= key_end <= S = 40": {"key_end": int32([41, 3], "cpu")},
        "backend must be": {"backend": "none"},
        "key_start cannot be combined with page_table": {
            "key_start": int32([0, 0], "cpu"), "page_table": int32([[0], [1]], "cpu")},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=match):
            append_block_means(**{"means": means, "k": k, "num_new": 1, "block_size": BLOCK, **changes})


def test_refusals_of_pages():
    q, k, v = make_qkv(2, 1, 40, 4, 2, 16)
    pages = Pages(k, v, [40, 30], 8, 8).filled("pytorch")
    for match, changes in {
        "block_size must divide the page size 8 or be a multiple of it, got 3": {"block_size": 3},
        r"block_means must be torch.float32 \(12, 2, 2, 16\)": {"block_size": 4},
        r"page_table must be an int32 tensor \[B, pages\], got torch.int64": {"page_table": pages["page_table"].long()},
        "page_table must have a row for each of q's 2, got 1": {"page_table": pages["page_table"][:1]},
        "page_table must have at least one column": {"page_table": pages["page_table"][:, :0]},
        "key_end must be given": {"key_end": None},
        "key_end must be an int32 tensor": {"key_end": pages["key_end"].long()},
        "0 <= key_start <= key_end <= S = 48": {"key_end": int32([49, 1], "cpu")},
        "at least one page": {"k_pages": k[:0], "v_pages": v[:0]},
        "k_pages must be a tensor, got None": {"k_pages": None},
        "q, k_pages and v_pages must share one dtype": {"k_pages": pages["k_pages"].double()},
        "page_table must hold numbers from 0 to 11 .* got 12": {"page_table": pages["page_table"] * 0 + 12},
        "page_table must hold numbers from 0 to 11 .* got -1": {"page_table": pages["page_table"] * 0 - 1},
        "inference only": {"q": q.clone().requires_grad_()},
        "topk must be": {"topk": 0},
    }.items():
        with pytest.raises(ValueError, match=match):
            moba_attention_paged(**{"q": q, "block_size": 8, "topk": 3, **pages, **changes})


@pytest.mark.parametrize(("rows", "keys"), [(2, 4), (0, 40)])
def test_nothing_to_append_waits_for_nothing(rows, keys):
    """On a device whose values cannot be read, as a GPU's are not."""
    k = torch.empty(rows, keys, 2, 16, device="meta")
    sequences = Sequences(rows, 1, keys, key_start=torch.empty(rows, dtype=torch.int32, device="meta"))
    load("pytorch").append_means(k[:, : keys // 8], k, sequences, 8)


def test_routing_alone_refuses_what_does_not_fit(device):
    q, means = torch.zeros(1, 4, 2, 8, device=device), torch.zeros(1, 3, 1, 8, device=device)
    with pytest.raises(ValueError, match="num_keys"):
        moba_route(q, means, num_keys=3, block_size=4, topk=2)
    with pytest.raises(ValueError, match="block_means"):
        moba_route(q, means, num_keys=16, block_size=4, topk=2)
    with pytest.raises(ValueError, match="batch"):
        moba_route(q.expand(2, -1, -1, -1), means, num_keys=8, block_size=4, topk=2)
