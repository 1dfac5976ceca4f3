"""Every call on a card: random shapes against fp64, one of everything, the release's matrix, memory and compilations.

`make test-gpu` runs this and the kernels' own tests. Shapes run one after another in one process, on purpose.
"""

from __future__ import annotations

import random

import pytest
import torch
from helpers import relative_error

from moba import (
    MoBAConfig,
    MoBAttention,
    append_block_means,
    moba_attention,
    moba_attention_paged,
    moba_attention_varlen,
    moba_route,
)
from moba.backends.triton import variants
from moba.compat import moba_attn_varlen, moba_attn_varlen_naive
from moba.routing import Routing

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

# Bounds on ‖error‖ / ‖result‖ of out and gradients, in units of the dtype's spacing at one: results are
# rounded once, weights and partials before they are multiplied.
SPACINGS = {torch.float32: 32.0, torch.float16: 4.0, torch.bfloat16: 4.0}


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda").to(dtype)


def assert_near(actual, expected, dtype, name):
    bound = SPACINGS[dtype] * torch.finfo(dtype).eps
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    error = relative_error(actual, expected)
    assert error <= bound, f"{name}: error {error:.1e} above {bound:.1e}"


def assert_right(call, q, k, v, block_size, topk, **options):
    """A call and its gradients by the kernels, twice, against the reference in fp64 over the same routing."""
    # A replayed routing holds what was kept, and refuses to be told again.
    where = {name: value for name, value in options.items() if not name.startswith("keep_")}
    leaves, dtype = [x.requires_grad_() for x in (q, k, v)], q.dtype
    d_out = normal(*q.shape[:-1], v.shape[-1], dtype=dtype)

    def run(leaves, d_out, **more):
        out, lse, routing = call(
            *leaves, block_size=block_size, topk=topk, return_lse=True, return_routing=True, **more
        )
        return [out, *torch.autograd.grad(out, leaves, d_out)], lse, routing

    results, lse, routing = run(leaves, d_out, backend="triton", **options)
    again, _, _ = run(leaves, d_out, backend="triton", **options)
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True)), "a second run differs"
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected, exact_lse, _ = run(exact, d_out.double(), backend="reference", routing=routing, **where)
    for name, a, b in zip(("out", "d_q", "d_k", "d_v"), results, expected, strict=True):
        if b.abs().max() < 1e-8 * max(1.0, results[0].abs().max().item()):
            assert a.abs().max() < 1e-2, f"{name} must vanish"  # one key: its weight has no gradient
        else:
            assert_near(a, b, dtype, name)
    assert torch.equal(torch.isfinite(lse), torch.isfinite(exact_lse))
    assert (lse - exact_lse)[torch.isfinite(lse)].abs().max() < 1e-2
    # What the kernels chose is what fp64 chooses, but for scores that nearly tie.
    exact_call = {"backend": "reference", "return_routing": True, **options}
    with torch.no_grad():
        _, best = call(*exact, block_size=block_size, topk=topk, **exact_call)
    same = (routing.indices == best.indices).all(-1).double().mean()
    assert same >= (0.99 if dtype == torch.float32 else 0.9), f"only {same:.3f} of the rows choose fp64's blocks"


DRAWS = 60


@pytest.mark.parametrize("seed", range(DRAWS))
def test_random_shapes(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
    head_dim = draw.choice([16, 32, 64, 64, 80, 96, 128, 128, 256, 8, 40])
    block_size = draw.choice([16, 32, 64, 96, 100, 128, 128, 256, 512, 1024, 2048, 7, 1, draw.randint(1, 300)])
    topk = draw.choice([1, 2, 3, 4, 8, 12, 16, 40])
    kv_heads = draw.choice([1, 1, 2, 3])
    heads = kv_heads * draw.choice([1, 1, 2, 4, 5])
    tokens = draw.choice([1, 2, block_size, block_size + 1, draw.randint(1, 3000), draw.randint(1, 3000)])
    tokens = min(tokens, 3000)
    layout = draw.choice(["plain", "plain", "last", "padded", "packed", "packed", "heads first"])
    options = {"block_size": block_size, "topk": topk}
    if topk > 2 and draw.random() < 0.3:
        options |= {"keep_first": 1, "keep_recent": draw.choice([0, 1])}
    if layout == "packed":
        cuts = sorted(draw.randint(0, tokens) for _ in range(draw.choice([0, 0, 1, 5, 30])))
        cu = torch.tensor([0, *cuts, tokens], dtype=torch.int32, device="cuda")
        q, k, v = (normal(tokens, n, head_dim, dtype=dtype) for n in (heads, kv_heads, kv_heads))
        assert_right(moba_attention_varlen, q, k, v, cu_seqlens=cu, **options)
        return
    rows = draw.choice([1, 2, 3])
    queries = draw.randint(1, tokens) if layout == "last" else tokens
    q, k, v = (
        normal(rows, n, t, head_dim, dtype=dtype).transpose(1, 2)
        if layout == "heads first"
        else normal(rows, t, n, head_dim, dtype=dtype)
        for n, t in ((heads, queries), (kv_heads, tokens), (kv_heads, tokens))
    )
    if layout == "padded":
        starts = torch.tensor([draw.randint(0, tokens) for _ in range(rows)], dtype=torch.int32, device="cuda")
        options["key_start"] = starts
    assert_right(moba_attention, q, k, v, **options)


@pytest.mark.parametrize("lengths", [[512], [1], [0, 512, 0], [3, 1, 0, 700, 64, 64], [17] * 300])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(("block_size", "topk"), [(128, 3), (512, 3), (16, 1)])
def test_packed_sequences(lengths, heads, block_size, topk):
    cu = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    q, k, v = (normal(sum(lengths), heads, 128) for _ in range(3))
    assert_right(moba_attention_varlen, q, k, v, cu_seqlens=cu, block_size=block_size, topk=topk)


@pytest.mark.parametrize("dtype", SPACINGS, ids=str)
@pytest.mark.parametrize(("block_size", "topk"), [(64, 4), (128, 3), (512, 3), (100, 1)])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(192, 128), (64, 256), (40, 16)])
def test_values_of_another_head_dim(head_dim, value_dim, block_size, topk, dtype):
    options = {"block_size": block_size, "topk": topk}
    q, k, v = (normal(2, 700, n, d, dtype=dtype) for n, d in ((4, head_dim), (2, head_dim), (2, value_dim)))
    assert_right(moba_attention, q, k, v, **options)
    cu = torch.tensor([0, 300, 300, 650], dtype=torch.int32, device="cuda")
    assert_right(moba_attention_varlen, *(x[0].detach() for x in (q, k, v)), cu_seqlens=cu, **options)
    means = k.new_zeros(2, 700 // block_size, 2, head_dim)
    options["backend"] = "triton"
    with torch.no_grad():
        append_block_means(means, k, num_new=700, block_size=block_size, backend="triton")
        whole, routing = moba_attention(q, k, v, **options, return_routing=True)
        step, chosen = moba_attention(q[:, -3:], k, v, **options, block_means=means, return_routing=True)
        same = (chosen.indices == routing.indices[:, -3:]).all(-1)
        assert_near(step[same], whole[:, -3:][same], dtype, "a step")


@pytest.mark.parametrize(("heads", "kv_heads", "block_size", "topk"), [(8, 1, 128, 16), (4, 2, 64, 4), (4, 4, 500, 2)])
def test_blocks_that_somebody_else_selected(heads, kv_heads, block_size, topk):
    """One list a key/value head, in any order, among them later blocks and none; steps read as the prefill does."""
    q, k, v = (normal(2, 3000, n, 128) for n in (heads, kv_heads, kv_heads))
    num_blocks = -(-3000 // block_size)
    block_indices = torch.randint(-1, num_blocks, (2, 3000, kv_heads, topk), device="cuda")
    options = {"block_size": block_size, "block_indices": block_indices, "backend": "triton"}
    out, routing = moba_attention(q, k, v, **options, return_routing=True)
    read = routing.block_mask(num_blocks)
    own = torch.arange(3000, device="cuda") // block_size
    listed = torch.nn.functional.one_hot(block_indices + 1, num_blocks + 1).any(-2)[..., 1:]
    listed = listed.repeat_interleave(heads // kv_heads, dim=2)
    blocks = torch.arange(num_blocks, device="cuda")
    assert torch.equal(read, (listed & (blocks < own[:, None])[:, None]) | (blocks == own[:, None])[:, None])
    step = moba_attention(q[:, -3:], k, v, **{**options, "block_indices": block_indices[:, -3:]})
    assert_near(step, out[:, -3:], q.dtype, "a step")
    places = routing.indices.shape[-1]
    given = {"block_size": block_size, "topk": places, "routing": routing, "return_lse": True}
    leaves = [x.requires_grad_() for x in (q, k, v)]
    d_out = torch.randn_like(out)
    actual = torch.autograd.grad(moba_attention(*leaves, **options), leaves, d_out)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected, _ = moba_attention(*exact, **given, backend="reference")
    assert_near(out, expected, q.dtype, "out")
    wanted = torch.autograd.grad(expected, exact, d_out.double())
    for name, a, b in zip(("d_q", "d_k", "d_v"), actual, wanted, strict=True):
        assert_near(a, b, q.dtype, name)


@pytest.mark.parametrize("dtype", SPACINGS, ids=str)
@pytest.mark.parametrize(("block_size", "topk"), [(64, 8), (512, 3)])
@pytest.mark.parametrize("softcap", [None, 1.5, 50.0])
def test_sinks_and_softcaps(softcap, block_size, topk, dtype):
    """Out, lse and gradients, those of the sinks too; steps as the prefill."""
    options = {"block_size": block_size, "topk": topk, "return_lse": True, "return_routing": True, "softcap": softcap}
    inputs = [normal(2, 1500, n, 64, dtype=dtype) for n in (4, 2, 2)] + [torch.tensor([-3.0, 0.5, 2.0, 8.0]).cuda()]
    d_out = normal(2, 1500, 4, 64, dtype=dtype)

    def run(inputs, **more):
        q, k, v, sinks = (x.requires_grad_() for x in inputs)
        out, lse, routing = moba_attention(q, k, v, sinks=sinks, **options, **more)
        return [
            out,
            *torch.autograd.grad((out, lse), (q, k, v, sinks), (d_out.to(q.dtype), 0.1 * lse.detach())),
        ], routing

    results, routing = run(inputs, backend="triton")
    expected, _ = run([x.detach().double() for x in inputs], backend="reference", routing=routing)
    for name, a, b in zip(("out", "d_q", "d_k", "d_v"), results, expected, strict=False):
        assert_near(a, b, dtype, name)
    assert relative_error(results[4], expected[4]) < 5e-3
    q, k, v, sinks = (x.detach() for x in inputs)
    means = k.new_zeros(2, 1500 // block_size, 2, 64)
    append_block_means(means, k, num_new=1500, block_size=block_size, backend="triton")
    step, _, chosen = moba_attention(q[:, -3:], k, v, sinks=sinks, block_means=means, **options, backend="triton")
    same = (chosen.indices == routing.indices[:, -3:]).all(-1)
    assert_near(step[same], results[0][:, -3:][same], dtype, "a step")


def test_one_of_everything():
    """Every public function on one row, token, head, block, sequence and page."""
    x = normal(1, 1, 1, 16)
    one = torch.ones(1, dtype=torch.int32, device="cuda")
    options = {"block_size": 1, "topk": 1, "backend": "triton"}
    cu = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
    assert torch.equal(moba_attention(x, x, x, **options), x)
    assert torch.equal(moba_attention(x, x, x, key_start=one - 1, key_end=one, **options), x)
    assert (moba_attention(x, x, x, key_start=one, **options) == 0).all()
    assert torch.equal(moba_attention_varlen(x[0], x[0], x[0], cu_seqlens=cu, **options), x[0])
    assert torch.equal(moba_attn_varlen(x[0], x[0], x[0], cu, 1, 1, 1), x[0])
    means = torch.full((1, 1, 1, 16), torch.nan, device="cuda", dtype=x.dtype)
    append_block_means(means, x, num_new=1, block_size=1, backend="triton")
    assert torch.equal(means[0, 0], x[0, 0])
    routing = moba_route(x, means, num_keys=1, **options)
    assert routing.indices.tolist() == [[[[0]]]]
    assert torch.equal(moba_attention(x, x, x, block_means=means, **options), x)
    assert torch.equal(moba_attention(x, x, x, routing=Routing(routing.indices, 1), **options), x)
    table = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
    paged = moba_attention_paged(x, x, x, page_table=table, key_end=one, block_means=means, **options)
    assert torch.equal(paged, x)
    layer = MoBAttention(16, 1, config=MoBAConfig(block_size=1, topk=1)).to("cuda", torch.bfloat16)
    out = layer(x[:, :, 0])
    out.sum().backward()
    assert torch.isfinite(out).all()
    for rows in (0, 1):
        empty = x[:rows, :0].requires_grad_()
        moba_attention(empty, empty, empty, **options).sum().backward()
        assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("first", [(128, 8), (2048, 3)])
def test_memory_given_back_between_shapes(first):
    """Blocks that do not divide the length, in memory whose neighbours were given back to the driver."""

    def inputs():
        return [normal(1, 131072, 16, 128) for _ in range(3)]

    block_size, topk = first
    leaves = [x.requires_grad_() for x in inputs()]
    moba_attention(*leaves, block_size=block_size, topk=topk).sum().backward()
    del leaves
    torch.cuda.empty_cache()
    with torch.no_grad():
        q, k, v = inputs()
        out = moba_attention(q, k, v, block_size=96, topk=10)
    torch.cuda.synchronize()
    assert torch.isfinite(out).all()
    del q, k, v, out
    torch.cuda.empty_cache()


@pytest.mark.parametrize("num_sequences", [1, 4, 7])
@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("tokens", [512, 1024, 2048])
def test_matrix_of_the_release(num_sequences, heads, tokens):
    """Its own test's cases and bound: bf16, head dim 128, values and gradients against the mask-based reference."""
    cuts = sorted(random.Random(num_sequences).sample(range(1, tokens), num_sequences - 1))
    cu = torch.tensor([0, *cuts, tokens], dtype=torch.int32, device="cuda")
    for block_size in (128, 256, 1024):
        for topk in (2, 3, 4):
            leaves = [normal(tokens, heads, 128).requires_grad_() for _ in range(3)]
            options = {"cu_seqlens": cu, "block_size": block_size, "topk": topk, "return_routing": True}
            with torch.no_grad():
                _, chosen = moba_attention_varlen(*leaves, backend="triton", **options)
                _, expected = moba_attention_varlen(*leaves, backend="reference", **options)
            # Rows whose routing nearly ties may differ; no gradient comes from them.
            agrees = (chosen.indices == expected.indices).all(-1)[..., None]
            assert agrees.float().mean() > 0.98
            d_out = normal(tokens, heads, 128) * agrees
            results = []
            for function in (moba_attn_varlen, moba_attn_varlen_naive):
                out = function(*leaves, cu, tokens, block_size, topk)
                results.append((out * agrees, *torch.autograd.grad(out, leaves, d_out)))
            for name, actual, naive in zip(("out", "d_q", "d_k", "d_v"), *results, strict=True):
                worst = ((actual - naive).abs() - 2e-2 * naive.abs()).max().item()
                assert worst <= 2e-2, f"{name} of {block_size}/{topk} differs by {worst}"


def num_kernels():
    return len(variants._kernels)


def test_nothing_is_compiled_for_another_length_batch_or_document():
    def call(rows, tokens):
        q, k, v = (normal(rows, tokens, n, 64).requires_grad_() for n in (4, 2, 2))
        moba_attention(q, k, v, block_size=64, topk=3).sum().backward()

    def packed(*lengths):
        cu = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
        q, k, v = (normal(sum(lengths), n, 64).requires_grad_() for n in (4, 2, 2))
        moba_attention_varlen(q, k, v, cu_seqlens=cu, block_size=64, topk=3).sum().backward()

    call(1, 2048)
    packed(1000, 24, 1000)
    known = num_kernels()
    for rows, tokens in ((1, 1000), (1, 999), (3, 4096), (2, 33_000), (1, 300_000), (16, 257)):
        call(rows, tokens)
    packed(700)
    packed(*[300] * 40)
    packed(100_000, 1, 0, 333)
    assert num_kernels() == known


def test_nothing_is_compiled_for_another_page_table():
    def step(rows, pages):
        keys, values = (normal(rows * pages, 64, 2, 64) for _ in range(2))
        table = torch.randperm(rows * pages, device="cuda").int().view(rows, pages)
        end = torch.full((rows,), pages * 64 - 5, dtype=torch.int32, device="cuda")
        means = torch.zeros(rows * pages, 1, 2, 64, device="cuda", dtype=keys.dtype)
        options = {"page_table": table, "key_end": end, "block_size": 64}
        append_block_means(means, keys, num_new=pages * 64, **options)
        moba_attention_paged(normal(rows, 1, 4, 64), keys, values, block_means=means, topk=4, **options)

    step(2, 40)
    known = num_kernels()
    for rows, pages in ((1, 33), (2, 41), (5, 64)):
        step(rows, pages)
    assert num_kernels() == known
