"""The decode kernels against the definition, and against the prefill's kernels. On a GPU, or in the interpreter."""

from __future__ import annotations

import oracle
import pytest
import torch
from helpers import LSE_TOLERANCE, TOLERANCE, assert_close, make_qkv, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from moba.backends import reference
from moba.routing import Selection
from moba.sequences import Sequences, page_means_shape

triton = pytest.importorskip("triton", reason="the triton backend needs Triton")
if not (triton.knobs.runtime.interpret or torch.cuda.is_available()):
    pytest.skip("Triton kernels need a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from moba.backends import triton as backend  # noqa: E402
from moba.backends.triton import decode_select, launch  # noqa: E402
from moba.backends.triton.decoding import _decode  # noqa: E402
from moba.backends.triton.means import mean_keys  # noqa: E402

DEVICE = torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")
SCALE = 0.2


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that kernels should write begins as NaN, or as -1 for integers."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poison(x):
        if x.device.type == "meta":
            return x
        return x.view(torch.uint8).fill_(255) if x.dtype == torch.uint8 else x.fill_(torch.nan if _floats(x) else -7)

    monkeypatch.setattr(torch, "empty", lambda *size, **options: poison(empty(*size, **options)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size, **o: poison(new_empty(self, *size, **o)))


def _floats(x):
    return x.is_floating_point()


def tensor(values):
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=DEVICE)


def inputs(batch, queries, keys, heads, kv_heads, head_dim, block_size, dtype=torch.float32):
    """q and k of integers, so that every backend scores alike, and real v."""
    q, k, _ = make_qkv(
        batch, queries, keys, heads, kv_heads, head_dim, dtype=dtype, device=DEVICE, exact_for=block_size
    )
    return q, k, torch.randn_like(k)


def means_of(k, block_size, starts=None, ends=None):
    """Block means of every row as the cache holds them, NaN where no block is finished."""
    means = torch.full((k.shape[0], k.shape[1] // block_size, *k.shape[2:]), torch.nan, dtype=k.dtype, device=DEVICE)
    sequences = Sequences(k.shape[0], k.shape[1], k.shape[1], key_start=tensor(starts), key_end=tensor(ends))
    backend.append_means(means, k, sequences, block_size)
    return means


def assert_matches_the_definition(
    q, k, v, block_size, topk, keep_first=0, keep_recent=0, starts=None, ends=None, tolerance=None
):
    selection = Selection.of(block_size, topk, keep_first, keep_recent, "mean")
    sequences = Sequences(q.shape[0], q.shape[1], k.shape[1], key_start=tensor(starts), key_end=tensor(ends))
    means = means_of(k, block_size, starts, ends)
    out, lse, indices = backend.decode(q, k, v, means, sequences, selection, scale=SCALE)
    assert (out.dtype, lse.dtype, indices.dtype) == (q.dtype, torch.float32, torch.int32)
    expected_out, expected_lse, expected_indices = oracle.attend_batch(
        q.cpu(), k.cpu(), v.cpu(), key_start=starts, key_end=ends, block_size=block_size, topk=topk, scale=SCALE,
        keep_first=keep_first, keep_recent=keep_recent,
    )  # fmt: skip
    wrong = (indices.cpu() != expected_indices).any(-1)
    if wrong.any():
        first = wrong.nonzero()[0].tolist()
        got, wanted = indices.cpu()[wrong][0].tolist(), expected_indices[wrong][0].tolist()
        raise AssertionError(f"first at {first}: got {got}, not {wanted}")
    assert_close(out, expected_out, TOLERANCE[q.dtype] if tolerance is None else tolerance)
    assert_close(lse, expected_lse, LSE_TOLERANCE[q.dtype])
    return out, lse, indices


# Batch, queries, keys, heads, kv heads, head dim, block size, topk.
CASES = {
    "one query": (1, 1, 90, 2, 2, 16, 8, 4),
    "groups of three, batch": (2, 1, 70, 6, 2, 16, 8, 4),
    "four queries over a boundary": (1, 4, 42, 2, 1, 16, 8, 3),
    "more query rows than a tile": (1, 9, 30, 8, 1, 16, 16, 2),
    "one query head": (1, 1, 80, 1, 1, 16, 8, 3),
    "head dim 80": (1, 1, 80, 2, 1, 80, 16, 3),
    "head dim 96": (1, 2, 80, 1, 1, 96, 16, 3),
    "head dim 256": (1, 1, 70, 1, 1, 256, 16, 2),
    "head dim 1": (1, 1, 20, 1, 1, 1, 4, 2),
    "block of one": (1, 1, 120, 1, 1, 16, 1, 6),
    "block of seven": (1, 2, 100, 2, 1, 16, 7, 5),
    "block longer than the keys": (1, 2, 20, 2, 1, 16, 64, 3),
    "block of several parts": (1, 3, 1300, 1, 1, 16, 600, 2),
    "topk above the number of blocks": (1, 2, 40, 2, 1, 16, 16, 9),
    "own block only": (1, 1, 45, 2, 1, 16, 16, 1),
    "families of blocks": (1, 1, 1200, 2, 1, 16, 1, 4),
    "every key is a query": (1, 5, 5, 2, 1, 16, 2, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_the_definition(case):
    *shape, topk = CASES[case]
    assert_matches_the_definition(*inputs(*shape), shape[-1], topk)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    assert_matches_the_definition(*inputs(1, 2, 90, 4, 2, 32, 8, dtype), 8, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_within_twice_that_of_plain_torch(dtype):
    q, k, v = make_qkv(1, 1, 300, 1, 1, 64, dtype=dtype, device=DEVICE)
    sequences, selection = Sequences(1, 1, 300), Selection.of(32, 4, 0, 0, "mean")
    out, lse, indices = backend.decode(q, k, v, means_of(k, 32), sequences, selection, scale=SCALE)
    options = {"block_size": 32, "scale": SCALE}
    exact, exact_lse = reference.attend(q.double(), k.double(), v.double(), indices, sequences, **options)
    blocks = indices[0, 0, 0].long()
    keys = (blocks[:, None] * 32 + torch.arange(32, device=DEVICE)).flatten()
    keys = keys[keys < 300]
    plain = torch.softmax(q[0, 0] @ k[0, keys, 0].T * SCALE, dim=-1) @ v[0, keys, 0]
    assert relative_error(out, exact) <= 2 * relative_error(plain, exact[0, 0])
    assert_close(lse, exact_lse, 2e-6)


@pytest.mark.parametrize("kept", [(1, 0), (0, 2), (2, 3), (20, 0), (0, 20)])
def test_kept_blocks_take_places(kept):
    q, k, v = inputs(1, 2, 70, 1, 1, 16, 4)
    for topk in {sum(kept) + 1, sum(kept) + 4}:
        assert_matches_the_definition(q, k, v, 4, topk, *kept)


@pytest.fixture(params=["families", "at once", "streamed"])
def way(request, monkeypatch):
    """Each way to select: by families, among all blocks at once, and streamed in chunks; a number of places for it."""
    monkeypatch.setattr(launch, "_plans", {})
    if request.param == "families":
        monkeypatch.setattr(decode_select, "MAX_AT_ONCE", 0)
    elif request.param == "streamed":
        monkeypatch.setattr(decode_select, "MAX_HELD", 0)
    return {"families": 2, "at once": 30, "streamed": 9}[request.param]


def test_every_way_selects_alike(way):
    q, k, v = inputs(1, 1, 230, 2, 1, 16, 2)
    assert_matches_the_definition(q, k, v, 2, way + 1)
    assert_matches_the_definition(q, k, v, 2, way + 3, 1, 1)


@pytest.mark.parametrize("keys", ["constant", "two values", "zeros of both signs"])
def test_ties_go_to_the_lower_block(keys, way):
    q, k, v = inputs(1, 1, 260, 2, 1, 16, 2)
    block = torch.arange(260, device=DEVICE)[None, :, None, None] // 2
    if keys == "constant":
        k = torch.ones_like(k)
    elif keys == "two values":
        k = torch.ones_like(k) * (block % 23 == 3)
    else:
        k = torch.zeros_like(k) * torch.where(block % 3 == 1, -1.0, 1.0)
    assert_matches_the_definition(q, k, v, 2, way + 1)


def test_scores_that_are_not_finite(way):
    """NaN and -inf rank below every number and tie; +inf ranks above."""
    q, k, v = inputs(1, 1, 260, 1, 1, 16, 2)
    q[..., 1:] = 0
    q[..., 0] = q[..., 0].abs() + 1
    sequences, selection = Sequences(1, 1, 260), Selection.of(2, way + 1, 0, 0, "mean")
    for value, block in ((torch.nan, 3), (-torch.inf, 1), (torch.inf, 5), (torch.nan, 9), (torch.inf, 120)):
        k[:, 2 * block : 2 * block + 2] = value
    for values in (k, torch.full_like(k, torch.nan)):
        means = means_of(values, 2)
        _, _, indices = backend.decode(q, values, v, means, sequences, selection, scale=SCALE)
        assert torch.equal(indices, reference.decode(q, values, v, means, sequences, selection, scale=SCALE)[2])


BOUNDS = {
    "starts": ([0, 11, 59], None),
    "ends": (None, [60, 41, 7]),
    "both, an empty row": ([3, 0, 30], [60, 50, 30]),
    "fewer keys than queries": ([0, 30, 0], [60, 32, 1]),
}


@pytest.mark.parametrize("bounds", BOUNDS)
def test_padded_rows_hold_nothing_and_give_nothing(bounds):
    starts, ends = BOUNDS[bounds]
    q, k, v = inputs(3, 4, 60, 1, 1, 16, 4)
    for row in range(3):
        for x in (k, v):
            x[row, : 0 if starts is None else starts[row]] = torch.nan
            x[row, 60 if ends is None else ends[row] :] = torch.nan
        length = (60 if ends is None else ends[row]) - (0 if starts is None else starts[row])
        q[row, : max(0, 4 - length)] = torch.nan
    out, lse, indices = assert_matches_the_definition(q, k, v, 4, 4, starts=starts, ends=ends)
    padding = lse == -torch.inf
    assert (out[padding] == 0).all()
    assert (indices[padding] == -1).all()


def test_a_cache_larger_than_its_contents():
    """A graph recorded for a cache of this size serves every length; what lies behind the end is never read."""
    q, k, v = inputs(1, 1, 200, 2, 1, 16, 4)
    means = means_of(k, 4)
    selection = Selection.of(4, 5, 0, 0, "mean")
    for end in (1, 4, 133):
        whole = backend.decode(q, k, v, means, Sequences(1, 1, 200, key_end=tensor([end])), selection, scale=SCALE)
        nan_k, nan_v, nan_means = k.clone(), v.clone(), means.clone()
        nan_k[:, end:], nan_v[:, end:], nan_means[:, end // 4 :] = torch.nan, torch.nan, torch.nan
        short = Sequences(1, 1, 200, key_end=tensor([end]))
        for a, b in zip(whole, backend.decode(q, nan_k, nan_v, nan_means, short, selection, scale=SCALE), strict=True):
            assert torch.equal(a, b)


def into_pages(x, table, page_size, num_pages):
    """Rows [R, S, G, D] spread over pages; pages that no row uses are NaN."""
    pages = torch.full((num_pages, page_size, *x.shape[2:]), torch.nan, dtype=x.dtype, device=DEVICE)
    pages[table.long()] = x.unflatten(1, (-1, page_size))
    return pages


@pytest.mark.parametrize(("page_size", "block_size"), [(16, 4), (16, 16), (4, 16), (7, 7)])
def test_pages_give_the_bits_of_rows(page_size, block_size):
    num_keys = 16 * page_size if page_size == 4 else 6 * page_size
    ends = [num_keys - 1, num_keys // 2 + 3]
    q, k, v = inputs(2, 2, num_keys, 2, 1, 16, block_size)
    num_pages = 2 * num_keys // page_size + 3
    table = torch.randperm(num_pages, device=DEVICE)[: num_pages - 3].view(2, -1).int()
    k_pages, v_pages = (into_pages(x, table, page_size, num_pages) for x in (k, v))
    means = torch.full(page_means_shape(k_pages, block_size), torch.nan, device=DEVICE)
    for row, end in enumerate(ends):
        table[row, -(-end // page_size) :] = 1 << 30
    paged = {"key_end": tensor(ends), "page_table": table}
    for num_new, end in ((num_keys, [end - 9 for end in ends]), (9, ends)):
        paged["key_end"] = tensor(end)
        backend.append_means(means, k_pages, Sequences(2, num_new, num_keys, **paged), block_size)
    selection = Selection.of(block_size, 4, 0, 1, "mean")
    actual = backend.decode(
        q, k_pages, v_pages, means, Sequences(2, 2, num_keys, **paged), selection, scale=SCALE
    )  # fmt: skip
    rows = Sequences(2, 2, num_keys, key_end=tensor(ends))
    expected = backend.decode(q, k, v, means_of(k, block_size, ends=ends), rows, selection, scale=SCALE)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("block_size", [1, 7, 16, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_means_are_the_bits_of_the_prefill_however_keys_arrive(block_size, dtype):
    k = torch.randn(2, 450, 2, 48, device=DEVICE).to(dtype)
    starts, ends = tensor([0, 13]), tensor([450, 420])
    whole = mean_keys(k, Sequences(2, 450, 450, starts, ends), block_size).unflatten(0, (2, -1))
    means = torch.full((2, 450 // block_size, 2, 48), torch.nan, dtype=dtype, device=DEVICE)
    for stop in (300, 301, 302, 420, 450):
        ends = torch.clamp(tensor([450, 420]), max=stop)
        num_new = {300: 300, 301: 1, 302: 1, 420: 118, 450: 30}[stop]
        if stop == 450:  # row 1 has no new keys: its sequences are those of one row less
            backend.append_means(means[:1], k[:1], Sequences(1, num_new, 450, starts[:1], ends[:1]), block_size)
        else:
            backend.append_means(means, k, Sequences(2, num_new, 450, starts, ends), block_size)
    for row, length in enumerate((450, 407)):
        finished = length // block_size
        assert torch.equal(means[row, :finished], whole[row, :finished])
        assert means[row, finished:].isnan().all()


def test_only_means_of_newly_finished_blocks_are_written():
    k = torch.randn(1, 64, 1, 16, device=DEVICE)
    for end, num_new, written in ((64, 1, [7]), (63, 7, []), (63, 8, [6]), (40, 16, [3, 4]), (0, 5, [])):
        means = torch.full((1, 8, 1, 16), torch.nan, device=DEVICE)
        backend.append_means(means, k, Sequences(1, num_new, 64, key_end=tensor([end])), 8)
        assert (~means[0, :, 0, 0].isnan()).nonzero()[:, 0].tolist() == written


def test_strides():
    q, k, v = inputs(2, 1, 40, 4, 2, 16, 8)
    means, sequences, selection = means_of(k, 8), Sequences(2, 1, 40), Selection.of(8, 2, 0, 0, "mean")
    expected = backend.decode(q, k, v, means, sequences, selection, scale=SCALE)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, means)]
    views[1] = torch.cat([views[1], views[1]], dim=3)[..., 16:]
    wide = torch.full_like(torch.cat([means, means], dim=1), torch.nan)
    wide[:, : means.shape[1]] = means
    for other in (views, [q, k, v, wide]):
        for a, b in zip(backend.decode(*other, sequences, selection, scale=SCALE), expected, strict=True):
            assert torch.equal(a, b)


def test_a_block_that_several_heads_chose_gives_each_what_it_gives_alone():
    q, k, v = inputs(1, 4, 60, 4, 1, 16, 8)
    q[:, :, 1] = q[:, :, 0]
    out, lse, indices = assert_matches_the_definition(q, k, v, 8, 3)
    assert torch.equal(indices[:, :, 0], indices[:, :, 1])
    assert torch.equal(out[:, :, 0], out[:, :, 1])
    assert torch.equal(lse[:, :, 0], lse[:, :, 1])


@pytest.mark.parametrize("router", [lambda q, means: -q.sum(-1, keepdim=True) * means.sum((1, 2)), "recent", "sink"])
def test_other_routers(router):
    q, k, v = inputs(3, 2, 60, 2, 1, 16, 8)
    means, selection = means_of(k, 8, ends=[60, 30, 5]), Selection.of(8, 4, 0, 0, router)
    sequences = Sequences(3, 2, 60, key_end=tensor([60, 30, 5]))
    actual = backend.decode(q, k, v, means, sequences, selection, scale=SCALE)
    expected = reference.decode(q, k, v, means, sequences, selection, scale=SCALE)
    assert torch.equal(actual[2], expected[2])
    for a, b in zip(actual[:2], expected[:2], strict=True):
        assert_close(a, b, 2e-5)


def test_nothing_to_do():
    q, k, v = (torch.randn(2, n, 2, 16, device=DEVICE) for n in (0, 5, 5))
    selection = Selection.of(4, 3, 0, 0, "mean")
    out, lse, indices = backend.decode(q, k, v, k[:, :1], Sequences(2, 0, 5), selection, scale=SCALE)
    assert (out.shape, lse.shape, indices.shape) == ((2, 0, 2, 16), (2, 0, 2), (2, 0, 2, 3))


def test_more_rows_than_a_grid_takes_are_refused():
    rows = 33_000
    q, k = torch.zeros(rows, 1, 2, 16, device=DEVICE), torch.zeros(rows, 4, 2, 16, device=DEVICE)
    means = torch.zeros(page_means_shape(k, 4), device=DEVICE)
    with pytest.raises(ValueError, match=r"at most 65,535 rows x key/value heads in a call, got 66,000; split"):
        _decode(q, k, k, means, None, None, None, 4, 1, 0, 0, SCALE)


def test_repeats_bit_for_bit():
    q, k, v = make_qkv(1, 2, 100, 4, 2, 16, dtype=torch.bfloat16, device=DEVICE)
    arguments = (q, k, v, means_of(k, 8), Sequences(1, 2, 100), Selection.of(8, 4, 0, 0, "mean"))
    first, again = (backend.decode(*arguments, scale=SCALE) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


shapes = st.fixed_dictionaries(
    {
        "bounds": st.lists(st.tuples(st.integers(0, 20), st.integers(0, 30)), min_size=1, max_size=2),
        "queries": st.integers(1, 4),
        "group": st.integers(1, 3),
        "kv_heads": st.integers(1, 2),
        "block_size": st.integers(1, 20),
        "topk": st.integers(1, 5),
        "keep": st.tuples(st.integers(0, 2), st.integers(0, 2)),
        "seed": st.integers(0, 10_000),
    }
)


@settings(max_examples=10)
@given(shape=shapes)
def test_any_shape(shape):
    torch.manual_seed(shape["seed"])
    starts = [start for start, _ in shape["bounds"]]
    ends = [start + length for start, length in shape["bounds"]]
    topk = shape["topk"]
    first = min(shape["keep"][0], topk - 1)
    recent = min(shape["keep"][1], topk - 1 - first)
    num_keys = max(*ends, shape["queries"])
    heads = shape["group"] * shape["kv_heads"]
    q, k, v = inputs(len(starts), shape["queries"], num_keys, heads, shape["kv_heads"], 16, shape["block_size"])
    assert_matches_the_definition(q, k, v, shape["block_size"], topk, first, recent, starts, ends)
