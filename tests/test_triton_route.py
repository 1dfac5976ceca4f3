"""Routing kernels against the reference: exactly, on integers. On a GPU, or in Triton's interpreter."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import assert_is_rounded, make_qkv
from hypothesis import given, settings
from hypothesis import strategies as st

from moba import routing
from moba.backends import reference
from moba.routers import max_token_scores
from moba.routing import Routing, Selection, mean_keys
from moba.sequences import Sequences

triton = pytest.importorskip("triton", reason="the triton backend needs Triton")
if not (triton.knobs.runtime.interpret or torch.cuda.is_available()):
    pytest.skip("Triton kernels need a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from moba.backends import triton as backend  # noqa: E402
from moba.backends.triton import launch, means, tuning  # noqa: E402
from moba.backends.triton import routing as triton_routing  # noqa: E402

DEVICE = torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")


def inputs(batch, queries, keys, heads, kv_heads, head_dim, block_size, dtype=torch.float32):
    return make_qkv(batch, queries, keys, heads, kv_heads, head_dim, dtype=dtype, device=DEVICE, exact_for=block_size)[
        :2
    ]


def plain(q, k):
    return Sequences(q.shape[0], q.shape[1], k.shape[1])


def packed(q, k, q_lengths, k_lengths):
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE) for lengths in (q_lengths, k_lengths))
    return Sequences(1, q.shape[1], k.shape[1], cu_q=cu_q, cu_k=cu_k)


def padded(q, k, starts=None, ends=None):
    starts, ends = (None if x is None else torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (starts, ends))
    return Sequences(q.shape[0], q.shape[1], k.shape[1], key_start=starts, key_end=ends)


def assert_same_routing(q, k, sequences, block_size, topk, keep_first=0, keep_recent=0, router="mean"):
    selection = Selection.of(block_size, topk, keep_first, keep_recent, router)
    actual = backend.route(q, k, sequences, selection)
    expected = reference.route(q, k, sequences, selection)
    assert actual.dtype == torch.int32
    if router == "shared":
        assert actual.shape[2] == k.shape[2]
        expected = expected[:, :, :: q.shape[2] // k.shape[2]]
    assert actual.shape == expected.shape
    wrong = (actual != expected).any(-1)
    if wrong.any():
        first = wrong.nonzero()[0].tolist()
        raise AssertionError(f"first at {first}: got {actual[wrong][0].tolist()}, not {expected[wrong][0].tolist()}")
    return actual


def num_open_rows(q, k, block_size, topk, keep_first=0, keep_recent=0):
    """How many rows the one-pass kernel leaves open for the two-pass kernel: int32 [R, H]."""
    indices = q.new_empty(*q.shape[:3], topk, dtype=torch.int32)
    counts = q.new_empty(q.shape[0], q.shape[2], dtype=torch.int32)

    def build(plan, q, k, indices, counts, **options):
        """The plan of a selection, whose counts of open rows, a buffer, become an argument."""
        make_buffer, made = plan.buffer, []

        def buffer(*shape, dtype):
            made.append((shape, dtype))
            return counts if made[-1] == (counts.shape, counts.dtype) else make_buffer(*shape, dtype=dtype)

        plan.buffer = buffer
        triton_routing.plan_select(plan, q, k, None, indices, None, None, None, None, **options)
        assert made.count((counts.shape, counts.dtype)) == 1

    options = {"block_size": block_size, "topk": topk, "keep_first": keep_first, "keep_recent": keep_recent}
    options |= {"num_keys": k.shape[1], "arch": tuning.arch_of(DEVICE)}
    tensors = (q, k, indices, counts)
    launch.make_plan(build, *tensors, **options).run(*tensors, device=DEVICE)
    return counts


CASES = {
    "groups of three": (1, 50, 50, 6, 2, 32, 8, 3),
    "head dim 80": (1, 80, 80, 1, 1, 80, 16, 2),
    "head dim 256": (1, 70, 70, 1, 1, 256, 16, 2),
    "head dim 1": (1, 20, 20, 1, 1, 1, 4, 2),
    "block of one": (1, 150, 150, 1, 1, 16, 1, 8),
    "block of seven": (1, 150, 150, 1, 1, 16, 7, 5),
    "topk of all but one": (1, 80, 80, 1, 1, 16, 8, 9),
    "slots for a list of 16": (1, 150, 150, 1, 1, 16, 4, 14),
    "slots beyond every list": (1, 160, 160, 1, 1, 16, 4, 20),
    "one query": (2, 1, 145, 4, 2, 16, 8, 3),
    "several tiles of blocks": (1, 40, 700, 1, 1, 16, 2, 8),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in CASES]
    + [(case, dtype) for case in ("groups of three", "head dim 80") for dtype in (torch.bfloat16, torch.float16)],
    ids=str,
)
def test_plain_sequences(case, dtype):
    *shape, block_size, topk = CASES[case]
    q, k = inputs(*shape, block_size, dtype)
    assert_same_routing(q, k, plain(q, k), block_size, topk)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (16, 1)], ids=str)
def test_query_heads_that_choose_together(heads, dtype):
    q, k = inputs(2, 50, 50, *heads, 20, 8, dtype)
    # Sums that 16 bits do not hold, of which what they leave over decides.
    if heads[0] > heads[1]:
        q[:, :, 0] = 4096
    k[..., 1::2] = -k[..., ::2]
    bounds = padded(q, k, [3, 0], [50, 40])
    assert_same_routing(q, k, bounds, 8, 4, router="shared")
    assert_same_routing(q[:1], k[:1], packed(q, k, [20, 30], [20, 30]), 8, 3, keep_first=1, router="shared")


def test_a_sum_over_query_heads_beyond_fp16_and_a_query_that_is_not_finite():
    q, k = inputs(1, 50, 50, 4, 2, 16, 8, torch.float16)
    q[:, :20] = 60000
    q[:, 30, 1, 3], q[:, 31, 0, 2] = torch.nan, torch.inf
    assert_same_routing(q, k, plain(q, k), 8, 4, router="shared")


@pytest.mark.parametrize("kept", [(2, 3), (1, 5)])
@pytest.mark.parametrize("topk", [7, 20])
def test_kept_blocks_take_slots(kept, topk):
    q, k = inputs(1, 120, 120, 1, 1, 16, 4)
    assert_same_routing(q, k, plain(q, k), 4, topk, *kept)


def test_no_packed_sequence():
    q, k = inputs(1, 3, 3, 2, 1, 16, 8)
    assert (backend.route(q, k, packed(q, k, [], []), Selection.of(1, 2, 0, 0, "mean")) == -1).all()


@pytest.mark.parametrize("topk", [4, 8, 12, 20])
@pytest.mark.parametrize("keys", ["constant", "two values", "zeros of both signs"])
def test_ties_go_to_the_lower_block(keys, topk):
    q, k = inputs(1, 160, 160, 1, 1, 16, 4)
    if keys == "constant":
        k = torch.ones_like(k)
    elif keys == "two values":
        k = torch.ones_like(k) * (torch.arange(160, device=DEVICE) // 4 % 3 == 0)[None, :, None, None]
    else:
        k = torch.zeros_like(k) * torch.where(torch.rand(160, device=DEVICE) < 0.5, -1.0, 1.0)[None, :, None, None]
    assert_same_routing(q, k, plain(q, k), 4, topk)


@pytest.fixture
def one_pass(monkeypatch):
    """Selections of any length are made in one pass, by small tiles."""
    config = {"MIN_BLOCKS": 1, "TILE_M": 16, "num_warps": 4, "num_stages": 2}
    rows = (tuning.Row(config, element_bytes=2, is_packed=False), tuning.Row({}))
    monkeypatch.setitem(tuning.TABLE, "select_once", rows)
    monkeypatch.setattr(launch, "_plans", {})


ONE_PASS = {
    "several tiles of blocks": (1, 40, 700, 1, 1, 16, 2, 8),
    "a few slots": (1, 60, 600, 2, 1, 80, 3, 4),
    "kept blocks": (2, 50, 400, 2, 2, 16, 2, 8, 2, 1),
    "fewer blocks than slots": (1, 90, 90, 1, 1, 16, 8, 8),
    "slots beyond its lists": (1, 40, 400, 1, 1, 16, 4, 14),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ONE_PASS)
def test_selection_in_one_pass(one_pass, case, dtype):
    """On integers, of which many are equal, and on real numbers, whose scores are summed exactly here."""
    *shape, block_size, topk = ONE_PASS[case][:8]
    setting = (block_size, topk, *ONE_PASS[case][8:])
    q, k = inputs(*shape, block_size, dtype)
    assert_same_routing(q, k, plain(q, k), *setting)
    q = torch.randint(-999, 999, q.shape, device=DEVICE).to(dtype) * (torch.arange(q.shape[3], device=DEVICE) < 2)
    assert_same_routing(q, k, plain(q, k), *setting)


@pytest.mark.parametrize("case", ["several tiles of blocks", "a few slots", "kept blocks"])
def test_one_pass_decides_most_rows(one_pass, case):
    """Scores of random real numbers are hardly ever equal; those of equal keys always are."""
    *shape, block_size, topk = ONE_PASS[case][:8]
    q, k = (torch.randn_like(x) for x in inputs(*shape, block_size, torch.bfloat16))
    setting = (block_size, topk, *ONE_PASS[case][8:])
    assert (num_open_rows(q, k, *setting) <= q.shape[1] // 10).all()
    assert (num_open_rows(q, torch.ones_like(k), *setting) == q.shape[1]).all()


@pytest.mark.parametrize("keys", ["constant", "alternating", "one class", "not finite", "zeros", "lowest"])
def test_rows_that_one_pass_leaves_open(one_pass, keys):
    q, k = inputs(1, 60, 800, 1, 1, 16, 4, torch.bfloat16)
    q = q.abs() + 1
    block = (torch.arange(800, device=DEVICE) // 4)[None, :, None, None]
    if keys == "constant":
        k = torch.ones_like(k)
    elif keys == "alternating":
        k = (block % 2).expand_as(k).bfloat16()
    elif keys == "one class":
        k = torch.where(block % 16 == 3, block + 1, -block).expand_as(k).bfloat16()
    elif keys == "zeros":
        # Of both signs on a GPU, whose matrix products do not begin with a zero.
        k = torch.where(torch.rand(800, device=DEVICE) < 0.5, -0.0, 0.0)[None, :, None, None].expand_as(k).bfloat16()
    elif keys == "not finite":
        k = torch.where(block == 70, torch.nan, torch.where(block == 90, torch.inf, k))
        q[:, 20:40] = torch.where(torch.rand_like(q[:, 20:40]) < 0.1, -torch.inf, q[:, 20:40])
    else:
        # Finite, and as good as the least that fp32 holds.
        k = torch.zeros_like(k)
        k[..., :3] = torch.tensor([-(1 - 2.0**-8) * 2.0**n for n in (128, 120, 112)], device=DEVICE)
        q = torch.ones_like(q)
        assert_same_routing(q, k[:, :60], plain(q, q), 1, 8)
        lengths = [5, 5, 6, 4]
        assert_same_routing(q[:, :20], k[:, :20], packed(q[:, :20], k[:, :20], lengths, lengths), 1, 8)
    assert_same_routing(q, k, plain(q, k), 4, 8)


def test_one_pass_over_padded_and_packed_sequences(one_pass):
    q, k = inputs(3, 75, 600, 2, 2, 16, 2, torch.bfloat16)
    assert_same_routing(q, k, padded(q, k, [3, 0, 590], [600, 400, 590]), 2, 8)
    lengths = [0, 1, 3, 30, 41]
    q[:, 75:] = torch.nan
    assert_same_routing(q[:1], k[:1], packed(q, k, lengths, [0, 1, 9, 250, 321]), 2, 8)


@pytest.mark.parametrize("block_size", [1, 7, 16, 200])
def test_block_means(block_size):
    """Right, and the same bits whether a prefill computes them or steps of decoding append them."""
    k = torch.randn(2, 450, 1, 48, device=DEVICE).bfloat16()
    sequences = padded(k, k, [0, 13], [450, 420])
    actual = means.mean_keys(k, sequences, block_size).unflatten(0, (2, -1))
    appended = torch.full((2, 450 // block_size, 1, 48), torch.nan, dtype=k.dtype, device=DEVICE)
    for stop, num_new in ((300, 300), (301, 1), (420, 119), (450, 30)):
        rows = 2 if stop <= 420 else 1  # the second row has no key behind 420
        steps = padded(k[:rows], k[:rows], [0, 13][:rows], [stop, stop][:rows])
        backend.append_means(appended[:rows], k[:rows], replace(steps, num_queries=num_new), block_size)
    for row, (start, end) in enumerate(((0, 450), (13, 420))):
        expected = mean_keys(k[row, start:end].double(), block_size)
        assert_is_rounded(actual[row, : expected.shape[0]], expected)
        assert torch.equal(appended[row, : expected.shape[0]], actual[row, : expected.shape[0]])
        assert appended[row, expected.shape[0] :].isnan().all()


def test_a_block_mean_is_the_same_wherever_the_block_lies():
    k = torch.randn(1, 333, 2, 40, device=DEVICE)
    alone = means.mean_keys(k[:, 37:237], plain(k, k[:, 37:237]), 40)
    both = means.mean_keys(k, packed(k, k, [37, 200, 96], [37, 200, 96]), 40)
    begin = 37 // 40 + 1
    assert torch.equal(both[begin : begin + 5], alone)


def by_tokens(q, k, sequences, block_size, topk, first=0, recent=0):
    """The routing by max_token_scores in plain torch and by kernels."""
    selection = Selection.of(block_size, topk, first, recent, max_token_scores)
    return [module.route(q, k, sequences, selection) for module in (routing, backend)]


BY_TOKENS = {
    "groups of three": (1, 50, 50, 6, 2, 32, 8, 3),
    "head dim 80": (1, 80, 80, 1, 1, 80, 16, 2),
    "block of one": (1, 100, 100, 1, 1, 16, 1, 8),
    "block of seven": (1, 100, 100, 1, 1, 16, 7, 5),
    "block of several tiles": (1, 500, 500, 1, 1, 16, 130, 2),
    "slots for a list of 16": (1, 150, 150, 1, 1, 16, 4, 14),
    "slots beyond every list": (1, 120, 120, 1, 1, 16, 4, 20),
    "one query": (2, 1, 145, 2, 2, 16, 8, 3),
    "more blocks than a program takes": (1, 9, 1150, 1, 1, 16, 1, 8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BY_TOKENS)
def test_routing_by_tokens(case, dtype):
    """Small integers: scores are exact, and many are equal."""
    *shape, block_size, topk = BY_TOKENS[case]
    q, k = inputs(*shape, 1, dtype)
    if block_size == 7:
        q, k = q.abs(), -k.abs()  # no score is above that of what is not there
    expected, actual = by_tokens(q, k, plain(q, k), block_size, topk, *((1, 1) if topk > 3 else ()))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("bytes_of_scores", [None, 1])
def test_routing_by_tokens_of_padded_and_packed_sequences(monkeypatch, bytes_of_scores):
    if bytes_of_scores:
        monkeypatch.setattr(triton_routing, "SCORE_BYTES", bytes_of_scores)
        monkeypatch.setattr(triton_routing, "ROW_MULTIPLE", 32)
        monkeypatch.setattr(launch, "_plans", {})
    q, k = inputs(3, 75, 80, 2, 2, 16, 1)
    starts, ends = [3, 0, 30], [80, 60, 30]
    for row in range(3):
        k[row, : starts[row]] = torch.nan
        k[row, ends[row] :] = torch.nan
        q[row, : max(0, 75 - (ends[row] - starts[row]))] = torch.nan
    expected, actual = by_tokens(q, k, padded(q, k, starts, ends), 4, 4)
    assert torch.equal(actual, expected)
    lengths = [0, 1, 3, 4, 5, 12, 41]
    q, k = inputs(1, 75, 80, 2, 2, 16, 1)
    q[:, sum(lengths) :] = torch.nan
    k[:, sum(lengths) + 8 :] = torch.nan
    expected, actual = by_tokens(q, k, packed(q, k, lengths, [0, 1, 3, 4, 9, 16, 41]), 4, 4)
    assert torch.equal(actual, expected)


def test_a_block_with_a_token_that_is_not_a_number_counts_least():
    q, k = inputs(1, 90, 90, 2, 2, 16, 1)
    k[0, [5, 17, 33], 0] = torch.nan
    expected, actual = by_tokens(q, k, plain(q, k), 4, 5)
    assert torch.equal(actual, expected)
    assert not any((actual[0, 80:, 0] == block).any() for block in (1, 4, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_real_tokens_are_routed_as_fp64_scores_say(dtype):
    q, k = make_qkv(1, 150, 150, 2, 2, 48, dtype=dtype, device=DEVICE)[:2]
    actual = by_tokens(q, k, plain(q, k), 5, 6)[1][0]
    scores = max_token_scores(q[0].double(), k[0].double().unflatten(0, (30, 5)))
    own = (torch.arange(150, device=DEVICE) // 5)[:, None, None]
    block = torch.arange(30, device=DEVICE)
    past = (block < own).expand_as(scores)
    chosen = Routing(actual, 5).block_mask(30) & past
    assert torch.equal(chosen.sum(-1), own[..., 0].clamp(max=5).expand(-1, 2))
    least = scores.masked_fill(~chosen, torch.inf).amin(-1)
    most = scores.masked_fill(chosen | ~past, -torch.inf).amax(-1)
    # Products of 16-bit numbers are exact, and sums of 48 of them are rounded 47 times at most.
    bound = 48 * torch.finfo(torch.float32).eps * torch.linalg.vector_norm(q[0].double(), dim=-1) * k.norm(dim=-1).max()
    assert (least >= most - bound).all()


def test_operator_under_torch_compile():
    q, k = inputs(1, 40, 40, 2, 1, 16, 8)
    cu = torch.tensor([0, 13, 40], dtype=torch.int32, device=DEVICE)
    bounds_of_calls = ((None, None, None, None), (cu[:1], None, None, None), (None, None, cu, cu))
    for bounds, (num_heads, by_tokens) in itertools.product(bounds_of_calls, ((2, False), (1, False), (2, True))):
        rest = (num_heads, 8, 3, 0, 0, by_tokens)
        torch.library.opcheck(torch.ops.moba.triton_route, (q, k, None, 40, *bounds, *rest))
    for router in ("mean", "shared", max_token_scores):
        selection = Selection.of(8, 3, 0, 0, router)

        def routed(q, k, selection=selection):
            return backend.route(q, k, plain(q, k), selection)

        assert torch.equal(torch.compile(routed, fullgraph=True, backend="aot_eager")(q, k), routed(q, k))


shapes = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30)), min_size=1, max_size=4),
        "padding": st.integers(0, 4),
        "group": st.integers(1, 3),
        "kv_heads": st.integers(1, 2),
        "block_size": st.integers(1, 20),
        "topk": st.integers(1, 24),
        "keep": st.tuples(st.integers(0, 3), st.integers(0, 3)),
        "seed": st.integers(0, 10_000),
    }
)


@settings(max_examples=25)
@given(shape=shapes)
def test_packed_sequences_of_any_shape(shape):
    torch.manual_seed(shape["seed"])
    q_lengths = [queries for queries, _ in shape["lengths"]]
    k_lengths = [queries + more for queries, more in shape["lengths"]]
    topk = shape["topk"]
    first = min(shape["keep"][0], topk - 1)
    recent = min(shape["keep"][1], topk - 1 - first)
    q, k = inputs(
        1, sum(q_lengths) + shape["padding"], sum(k_lengths) + 2, shape["group"] * shape["kv_heads"],
        shape["kv_heads"], 16, shape["block_size"],
    )  # fmt: skip
    q[:, sum(q_lengths) :] = torch.nan
    k[:, sum(k_lengths) :] = torch.nan
    indices = assert_same_routing(q, k, packed(q, k, q_lengths, k_lengths), shape["block_size"], topk, first, recent)
    assert (indices[:, sum(q_lengths) :] == -1).all()
