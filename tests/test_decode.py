"""Decoding with block means, over every backend: the same function as attention that computes the means itself."""

from __future__ import annotations

import pytest
import torch
from helpers import LSE_TOLERANCE, TOLERANCE, assert_close, assert_is_rounded, make_qkv, needs_dtype
from hypothesis import given
from hypothesis import strategies as st
from oracle import attend_batch

from moba import append_block_means, moba_attention, moba_attention_paged, moba_route

BOTH = {"return_lse": True, "return_routing": True}
BLOCK, TOPK = 8, 3


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def empty_means(k, block_size=BLOCK):
    """Room for the means of keys [B, S, G, D], poisoned."""
    return k.new_full((k.shape[0], k.shape[1] // block_size, *k.shape[2:]), torch.nan)


def means_of(k, backend, block_size=BLOCK, **bounds):
    means = empty_means(k, block_size)
    append_block_means(means, k, num_new=k.shape[1], block_size=block_size, backend=backend, **bounds)
    return means


def same_bits(a, b):
    return torch.equal(a.nan_to_num(nan=1e30), b.nan_to_num(nan=1e30)) and torch.equal(a.isnan(), b.isnan())


CASES = {
    "one query": (1, 1, 37, 2, 2, 16, 8, 3),
    "batch of two": (2, 1, 40, 2, 1, 16, 16, 2),
    "groups of three": (2, 1, 50, 6, 2, 32, 16, 2),
    "several queries": (2, 5, 45, 4, 2, 16, 8, 3),
    "sixteen queries": (1, 16, 45, 2, 1, 16, 8, 3),
    "head dim 80": (1, 2, 48, 2, 1, 80, 16, 2),
    "head dim 1": (1, 3, 20, 1, 1, 1, 4, 2),
    "own block only": (1, 3, 40, 2, 1, 16, 16, 1),
    "block of one": (1, 3, 20, 2, 1, 16, 1, 4),
    "block of seven": (1, 3, 45, 2, 1, 16, 7, 3),
    "block longer than the sequence": (1, 3, 20, 2, 1, 16, 64, 3),
    "topk above the number of blocks": (1, 3, 40, 2, 1, 16, 16, 9),
    "first token": (1, 1, 1, 2, 1, 16, 8, 3),
    "many blocks": (1, 2, 130, 2, 1, 16, 4, 5),
    "no query": (1, 0, 9, 2, 1, 16, 8, 3),
    "one query, narrower values": (2, 1, 45, 4, 2, 24, 16, 8, 3),
    "thirteen queries, narrower values": (1, 13, 45, 4, 2, 24, 16, 8, 3),
}


OTHER_DTYPES = (torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in CASES]
    + [(case, dtype) for case in ("groups of three", "head dim 80", *tuple(CASES)[-2:]) for dtype in OTHER_DTYPES],
    ids=str,
)
def test_matches_the_definition(backend, device, case, dtype):
    needs_dtype(backend, dtype)
    *shape, block_size, topk = CASES[case]
    q, k, v = make_qkv(*shape, dtype=dtype, device=device, exact_for=block_size)
    options = {"block_size": block_size, "topk": topk}
    expected_out, expected_lse, expected_indices = attend_batch(q.cpu(), k.cpu(), v.cpu(), **options)
    means = means_of(k, backend, block_size)
    out, lse, routing = moba_attention(q, k, v, **options, block_means=means, backend=backend, **BOTH)
    assert torch.equal(routing.indices.cpu(), expected_indices)
    assert routing.indices.dtype == torch.int32
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(out, expected_out, TOLERANCE[dtype])
    assert_close(lse, expected_lse, LSE_TOLERANCE[dtype])


def test_token_by_token_is_prefill(backend, device):
    """Every block boundary is crossed; keys and means that are not there yet are NaN."""
    q, k, v = make_qkv(1, 26, 26, 2, 1, 16, device=device, exact_for=BLOCK)
    options = {"block_size": BLOCK, "topk": 2, **BOTH}
    whole = moba_attention(q, k, v, **options, backend="reference")
    cached_k, cached_v, means = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan), empty_means(k)
    for end in range(1, 27):
        cached_k[:, end - 1], cached_v[:, end - 1] = k[:, end - 1], v[:, end - 1]
        key_end = int32([end], device)
        append_block_means(means, cached_k, num_new=1, block_size=BLOCK, key_end=key_end, backend=backend)
        for bounds, keys, values in (({}, k[:, :end], v[:, :end]), ({"key_end": key_end}, cached_k, cached_v)):
            if end not in (1, 8, 9, 24, 26):
                continue
            step = moba_attention(
                q[:, end - 1 : end], keys, values, block_means=means, backend=backend, **options, **bounds
            )
            assert_close(step[0], whole[0][:, end - 1 : end], 2e-5)
            assert_close(step[1], whole[1][:, end - 1 : end], 2e-5)
            assert torch.equal(step[2].indices, whole[2].indices[:, end - 1 : end])
    assert torch.equal(means, means_of(k, backend))


def test_only_means_of_newly_finished_blocks_are_written(backend, device):
    k = torch.randn(1, 64, 1, 16, device=device)
    for end, num_new, written in (
        (64, 1, [7]),
        (63, 7, []),
        (63, 8, [6]),
        (40, 16, [3, 4]),
        (0, 5, []),
        (64, 9, [6, 7]),
    ):
        means = empty_means(k)
        bounds = {} if end == 64 else {"key_end": int32([end], device)}
        append_block_means(means, k, num_new=num_new, block_size=BLOCK, backend=backend, **bounds)
        assert (~means[0, :, 0, 0].isnan()).nonzero()[:, 0].tolist() == written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("block_size", "head_dim"), [(8, 16), (7, 5), (1, 3), (12, 1)])
def test_means_are_the_same_bits_however_keys_arrive(backend, device, dtype, block_size, head_dim):
    k = torch.randn(2, 50, 2, head_dim, device=device).to(dtype)
    expected = means_of(k, backend, block_size)
    assert_is_rounded(expected, k.double()[:, : 50 // block_size * block_size].unflatten(1, (-1, block_size)).mean(2))
    heads_first = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert same_bits(means_of(heads_first, backend, block_size), expected)
    for steps in ([50], [20, 1, 1, 28], [3, 4, 8, 16, 19]):
        means, end = empty_means(k, block_size), 0
        for num_new in steps:
            end += num_new
            append_block_means(means, heads_first[:, :end], num_new=num_new, block_size=block_size, backend=backend)
        assert same_bits(means, expected)


def test_means_are_those_that_routing_scores(backend, device):
    """Given means and computed ones choose the same blocks on real numbers, too: scores closer than rounding apart."""
    q, k, v = make_qkv(1, 4, 44, 2, 1, 16, device=device)
    options = {"block_size": 4, "topk": 4, "backend": backend, "return_routing": True}
    expected = moba_attention(q, k, v, **options)
    actual = moba_attention(q, k, v, **options, block_means=means_of(k, backend, 4))
    assert torch.equal(actual[1].indices, expected[1].indices)
    assert_close(actual[0], expected[0], 2e-6)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    starts=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    steps=st.lists(st.integers(1, 16), min_size=1, max_size=4),
    block_size=st.integers(1, 12),
    topk=st.integers(1, 5),
    kept=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    group=st.integers(1, 3),
)
def test_ragged_batches(backend, device, lengths, starts, steps, block_size, topk, kept, group):
    """Rows with padding before, poison around, and fewer keys than queries."""
    rows, starts = len(lengths), starts[: len(lengths)]
    first = min(kept[0], topk - 1)
    keep = {"keep_first": first, "keep_recent": min(kept[1], topk - 1 - first)}
    num_keys = max(s + n for s, n in zip(starts, lengths, strict=True)) + 3
    num_queries = min(steps[-1], num_keys)
    q, k, v = make_qkv(rows, num_queries, num_keys, group, 1, 16, device=device, exact_for=block_size)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        for x in (k, v):
            x[row, :start], x[row, start + length :] = torch.nan, torch.nan
    bounds = {"key_start": int32(starts, device), "key_end": None}
    means = empty_means(k, block_size)
    # The last keys of each row, in steps; a longer row's first keys come before all of them.
    steps = [num_keys, *steps]
    for i, num_new in enumerate(steps):
        ends = [s + max(0, n - sum(steps[i + 1 :])) for s, n in zip(starts, lengths, strict=True)]
        bounds["key_end"] = int32(ends, device)
        append_block_means(means, k, num_new=num_new, block_size=block_size, backend=backend, **bounds)
    options = {"block_size": block_size, "topk": topk, **keep}
    out, lse, routing = moba_attention(q, k, v, **options, **bounds, block_means=means, backend=backend, **BOTH)
    k, v = k.nan_to_num(), v.nan_to_num()
    expected = attend_batch(q.cpu(), k.cpu(), v.cpu(), **options, **{n: b.cpu() for n, b in bounds.items()})
    assert torch.equal(routing.indices.cpu(), expected[2])
    assert_close(out, expected[0], 2e-5)
    assert_close(lse, expected[1], 2e-5)


@pytest.mark.parametrize("padding", [1, 11])
def test_padded_query_rows(backend, device, padding):
    q, k, v = make_qkv(2, 12, 30, 2, 1, 16, device=device)
    bounds = {"key_start": int32([3, 30 - 12 + padding], device)}
    out, lse, routing = moba_attention(
        q, k, v, block_size=2, topk=TOPK, block_means=means_of(k, backend, 2, **bounds), backend=backend, **bounds,
        **BOTH,
    )  # fmt: skip
    assert (out[1, :padding] == 0).all()
    assert (lse[1, :padding] == -torch.inf).all()
    assert (routing.indices[1, :padding] == -1).all()
    assert torch.isfinite(lse[1, padding:]).all()
    by_function = moba_attention(
        q, k, v, block_size=2, topk=TOPK, block_means=means_of(k, backend, 2, **bounds), backend=backend, **bounds,
        router=moba_scores, return_routing=True,
    )  # fmt: skip
    assert torch.equal(by_function[1].indices, routing.indices)


def test_autocast(backend, device):
    """Attention runs in the autocast dtype; scores by given means stay in full precision."""
    q, k, v = make_qkv(1, 3, 200, 2, 1, 64, device=device)
    options = {"block_size": BLOCK, "topk": TOPK, "backend": backend}
    narrow = [x.bfloat16() for x in (q, k, v)]
    pages = Pages(*narrow[1:], [200], BLOCK, BLOCK).filled(backend)
    wide_pages = {**pages, "k_pages": pages["k_pages"].float(), "v_pages": pages["v_pages"].float()}
    means = means_of(k, backend)
    many = torch.randn(1, 100, 2, 64, device=device)
    expected = moba_route(many, means, num_keys=200, **options).indices
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = moba_attention_paged(q, **wide_pages, **options)
        assert torch.equal(moba_route(many, means, num_keys=200, **options).indices, expected)
    assert torch.equal(out, moba_attention_paged(narrow[0], **pages, **options))


def moba_scores(q, means):
    """The default rule, written as a user would write it; unfinished blocks would make it NaN everywhere."""
    means = means.repeat_interleave(q.shape[1] // means.shape[1], dim=1)
    scores = torch.einsum("thd,nhd->thn", q, means)
    return scores + 0 * scores.sum()


def worst_scores(q, means):
    return -moba_scores(q, means)


@pytest.mark.parametrize("router", ["mean", "recent", "sink", moba_scores, worst_scores])
@pytest.mark.parametrize("paged", [False, True], ids=["unpaged", "paged"])
def test_routers(backend, device, router, paged):
    q, k, v = make_qkv(2, 3, 48, 4, 2, 16, device=device, exact_for=6)
    options = {"block_size": 6, "topk": 4, "router": router, "backend": backend, **BOTH}
    key_end = int32([48, 41], device)
    expected = moba_attention(q, k, v, key_end=key_end, **{**options, "backend": "reference"})
    if paged:
        pages = Pages(k, v, [48, 41], page_size=12, block_size=6)
        actual = moba_attention_paged(q, **pages.filled(backend), **options)
    else:
        means = means_of(k, backend, 6, key_end=key_end)
        actual = moba_attention(q, k, v, key_end=key_end, block_means=means, **options)
    assert torch.equal(actual[2].indices, expected[2].indices)
    assert_close(actual[0], expected[0], 2e-5)
    assert_close(actual[1], expected[1], 2e-5)


class Pages:
    """Rows of k and v [B, S, G, D] laid into shuffled pages among unused ones; all that is not theirs is poisoned."""

    def __init__(self, k, v, lengths, page_size, block_size):
        self.k, self.v, self.lengths, self.page_size, self.block_size = k, v, lengths, page_size, block_size
        counts = [-(-length // page_size) for length in lengths]
        num_pages = sum(counts) + 3
        free = torch.randperm(num_pages).tolist()
        # Entries behind a row's last page name no page.
        table = torch.full((len(lengths), -(-k.shape[1] // page_size) + 1), 1 << 30, dtype=torch.int32)
        self.k_pages, self.v_pages = (x.new_full((num_pages, page_size, *x.shape[2:]), torch.nan) for x in (k, v))
        for row, length in enumerate(lengths):
            for i in range(counts[row]):
                page = free.pop()
                table[row, i] = page
                keys = slice(i * page_size, min(length, (i + 1) * page_size))
                count = keys.stop - keys.start
                self.k_pages[page, :count], self.v_pages[page, :count] = k[row, keys], v[row, keys]
        self.table, self.key_end = table.to(k.device), int32(lengths, k.device)
        self.means = k.new_full((num_pages, max(1, page_size // block_size), *k.shape[2:]), torch.nan)

    def append(self, num_new, backend, ends=None):
        key_end = self.key_end if ends is None else int32(ends, self.k.device)
        append_block_means(self.means, self.k_pages, num_new=num_new, block_size=self.block_size, key_end=key_end,
                           page_table=self.table, backend=backend)  # fmt: skip

    def filled(self, backend):
        self.append(10**6, backend)
        return self.arguments()

    def arguments(self):
        return {"k_pages": self.k_pages, "v_pages": self.v_pages, "page_table": self.table, "key_end": self.key_end,
                "block_means": self.means}  # fmt: skip

    def expected_means(self, backend):
        """What the pages' means must be, from the rows' own."""
        means = torch.full_like(self.means, torch.nan)
        for row, length in enumerate(self.lengths):
            of_row = means_of(self.k[row : row + 1, :length], backend, self.block_size)[0]
            for block, mean in enumerate(of_row):
                token = block * self.block_size
                page = self.table[row, token // self.page_size]
                means[page, token % self.page_size // self.block_size] = mean
        return means


@pytest.mark.parametrize(
    ("page_size", "block_size", "queries", "value_dim"),
    [(8, 8, 1, 16), (16, 4, 4, 16), (4, 8, 1, 16), (2, 8, 16, 16), (6, 6, 20, 16), (3, 6, 1, 16), (32, 8, 1, 16),
     (16, 8, 3, 8), (16, 8, 3, 40), (16, 8, 20, 8), (16, 8, 20, 40)],
)  # fmt: skip
def test_pages(backend, device, page_size, block_size, queries, value_dim):
    q, k, v = make_qkv(3, queries, 45, 2, 1, 16, value_dim, device=device, exact_for=block_size)
    lengths = [45, 32, 7]
    pages = Pages(k, v, lengths, page_size, block_size)
    options = {"block_size": block_size, "topk": 3, **BOTH}
    out, lse, routing = moba_attention_paged(q, **pages.filled(backend), **options, backend=backend)
    assert same_bits(pages.means, pages.expected_means(backend))
    expected = moba_attention(q, k, v, key_end=pages.key_end, **options, backend="reference")
    assert torch.equal(routing.indices, expected[2].indices)
    assert_close(out, expected[0], 2e-5)
    assert_close(lse, expected[1], 2e-5)


@pytest.mark.parametrize(("page_size", "block_size"), [(8, 4), (2, 4)])
def test_pages_token_by_token(backend, device, page_size, block_size):
    """Rows of different lengths grow together; one of them is empty at first."""
    _, k, v = make_qkv(3, 1, 20, 2, 1, 16, device=device)
    pages = Pages(k, v, [20, 15, 11], page_size, block_size)
    for left in range(11, -1, -1):
        pages.append(1 if left < 11 else 10**6, backend, [length - left for length in pages.lengths])
    assert same_bits(pages.means, pages.expected_means(backend))


def test_unselected_keys_and_means_of_later_blocks_are_not_read(backend, device):
    if backend == "reference":
        pytest.skip("the reference masks what is not selected, so it reads every key")
    q, k, v = make_qkv(1, 1, 60, 2, 1, 16, device=device)
    options = {"block_size": BLOCK, "topk": TOPK, "backend": backend, **BOTH}
    means = torch.cat([means_of(k, backend), torch.full_like(k[:, :3], torch.nan)], dim=1)
    expected = moba_attention(q, k, v, block_means=means, **options)
    unchosen = ~expected[2].block_mask(8).any(dim=2).any(dim=1)[0]
    assert unchosen.sum() >= 3
    poison = unchosen.repeat_interleave(BLOCK)[:60]
    k, v = (x.masked_fill(poison[None, :, None, None], torch.nan) for x in (k, v))
    actual = moba_attention(q, k, v, block_means=means, **options)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_the_given_means_decide(backend, device):
    q, k, v = make_qkv(1, 2, 60, 2, 1, 16, device=device)
    means = means_of(k, backend)
    options = {"block_size": BLOCK, "topk": 2, "backend": backend, "return_routing": True}
    _, routing = moba_attention(q, k, v, block_means=-means, **options)
    _, opposite = moba_attention(-q, k, v, block_means=means, **options)
    assert torch.equal(routing.indices, opposite.indices)
    _, computed = moba_attention(q, k, v, **options)
    assert not torch.equal(routing.indices, computed.indices)


def test_strides(backend, device):
    q, k, v = make_qkv(2, 2, 40, 4, 2, 16, device=device)
    k, v = (x[:1].repeat(2, 1, 1, 1) for x in (k, v))
    means = means_of(k, backend)
    options = {"block_size": BLOCK, "topk": TOPK, "backend": backend}
    expected = moba_attention(q, k, v, block_means=means, **options)
    for views in (
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v, means)],
        [torch.cat([x, x[..., :5]], dim=3)[..., :16] for x in (k, v, means)],
        [*torch.stack([k, v], dim=3).unbind(3), means],
        [x[:1].expand(2, -1, -1, -1) for x in (k, v, means)],
    ):
        actual = moba_attention(q, *views[:2], block_means=views[2], **options)
        assert_close(actual, expected, 2e-6)


def test_more_queries_and_gradients_take_the_prefills_way(backend, device):
    q, k, v = make_qkv(1, 17, 30, 2, 1, 16, device=device)
    options = {"block_size": BLOCK, "topk": TOPK, "backend": backend}
    means = means_of(k, backend)
    assert torch.equal(moba_attention(q, k, v, block_means=means, **options), moba_attention(q, k, v, **options))
    q = q[:, :2].clone().requires_grad_()
    grads = [torch.autograd.grad(moba_attention(q, k, v, **options, **given).sum(), q)[0]
             for given in ({}, {"block_means": means})]  # fmt: skip
    assert torch.equal(*grads)


def test_bitwise_repeatable(backend, device):
    q, k, v = make_qkv(1, 3, 60, 2, 1, 16, dtype=torch.bfloat16, device=device)
    options = {"block_size": BLOCK, "topk": TOPK, "backend": backend, "return_lse": True}
    means = means_of(k, backend)
    first, again = (moba_attention(q, k, v, block_means=means, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_prefill_by_given_means_is_a_prefill(backend, device):
    q, k, v = make_qkv(1, 33, 40, 2, 1, 16, device=device)
    options = {"block_size": 7, "topk": 4, "keep_first": 1, "backend": backend}
    expected = moba_attention(q, k, v, **options, **BOTH)
    means = means_of(k, backend, 7)
    actual = moba_attention(q, k, v, block_means=means, **options, **BOTH)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(moba_route(q, means, num_keys=40, **options).indices, expected[2].indices)
