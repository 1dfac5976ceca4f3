"""Context parallelism on gloo, against one device."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close, make_qkv
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import group_of
from torch.multiprocessing.reductions import StorageWeakRef

from moba import moba_attention, moba_attention_varlen
from moba.parallel import TRANSPORTS, Shards, context_parallel_attention
from moba.parallel import attention as parallel_attention
from moba.parallel.exchange import Gathering
from moba.parallel.routing import SharedRouting, lent_rows

BOTH = {"return_lse": True, "return_routing": True}


@pytest.fixture
def two():
    return group_of(2)


@pytest.fixture
def ranks():
    """Three of them."""
    return group_of(3)


def inputs(shape, dtype=torch.float32):
    """The whole sequence's q, k, v and the gradient of out, the same in every process. `shape`: B, S, H, G, D."""
    torch.manual_seed(7)
    batch, length, heads, kv_heads, head_dim = shape
    q, k, v = make_qkv(batch, length, length, heads, kv_heads, head_dim, dtype=dtype)
    return q, k, v, torch.randn(q.shape, dtype=dtype)


def on_rank(rank, shape, lengths, options):
    """This rank's out, lse, indices and gradients."""
    start = sum(lengths[:rank])
    mine = slice(start, start + lengths[rank])
    q, k, v, d_out = (x[:, mine].clone() for x in inputs(shape))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse, routing = context_parallel_attention(*leaves, **options, **BOTH)
    gradients = torch.autograd.grad(out, leaves, d_out)
    return [x.detach().numpy() for x in (out, lse, routing.indices, *gradients)]


def on_one_device(shape, options):
    *leaves, d_out = inputs(shape)
    leaves = [x.requires_grad_() for x in leaves]
    options = {name: value for name, value in options.items() if name != "transport"}
    if "cu_seqlens" in options:
        out, lse, routing = moba_attention_varlen(*(x[0] for x in leaves), **options, **BOTH)
        out, lse, indices = out[None], lse[None], routing.indices[None]
    else:
        out, lse, routing = moba_attention(*leaves, **options, **BOTH)
        indices = routing.indices
    return out.detach(), lse.detach(), indices, *torch.autograd.grad(out, leaves, d_out)


def assert_same_as_one_device(ranks, shape, lengths, options):
    lengths = [*lengths, *[0] * ranks.num_ranks][: ranks.num_ranks]
    lengths[-1] += shape[1] - sum(lengths)
    results = ranks.run(on_rank, shape, lengths, options)
    actual = [torch.cat([torch.from_numpy(part[i]) for part in results], dim=1) for i in range(6)]
    expected = on_one_device(shape, options)
    assert torch.equal(actual[2], expected[2]), "another routing than on one device"
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y, 2e-5)


CASES = {
    "even": ((1, 96, 4, 4, 16), [24, 24, 24], {"block_size": 8, "topk": 3}),
    "two rows, shared keys": ((2, 64, 8, 4, 16), [16, 16, 16], {"block_size": 8, "topk": 2}),
    "uneven": ((1, 90, 4, 4, 16), [16, 40, 8], {"block_size": 8, "topk": 3}),
    "a rank without tokens": ((1, 50, 4, 4, 16), [24, 0, 16], {"block_size": 8, "topk": 3}),
    "fewer blocks than ranks": ((1, 20, 4, 4, 16), [16], {"block_size": 16, "topk": 2}),
    "kept blocks": ((1, 80, 4, 4, 16), [16, 24, 16], {"block_size": 8, "topk": 4, "keep_first": 1, "keep_recent": 1}),
    "sliding window": ((1, 80, 4, 4, 16), [16, 24, 16], {"block_size": 8, "topk": 3, "router": "recent"}),
    "full attention": ((1, 40, 4, 4, 16), [16, 8, 8], {"block_size": 8, "topk": 5}),
    "own block only": ((1, 40, 4, 4, 16), [16, 8, 8], {"block_size": 8, "topk": 1}),
    "nothing": ((1, 0, 4, 4, 16), [], {"block_size": 8, "topk": 2}),
}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("case", CASES)
def test_three_ranks_compute_what_one_does(ranks, transport, case):
    assert_case(ranks, transport, case)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("case", ["two rows, shared keys", "uneven", "fewer blocks than ranks", "kept blocks"])
def test_two_ranks_too(two, transport, case):
    assert_case(two, transport, case)


def assert_case(ranks, transport, case):
    shape, lengths, options = CASES[case]
    if transport == "heads":
        heads = 12  # a multiple of every number of ranks
        shape = (*shape[:2], 2 * heads if shape[2] != shape[3] else heads, heads, 16)
    assert_same_as_one_device(ranks, shape, lengths, {**options, "transport": transport})


@pytest.mark.parametrize("transport", ["gather", "heads"])
def test_packed_documents(ranks, transport):
    cu = torch.tensor([0, 13, 13, 40, 77, 90], dtype=torch.int32)
    options = {"block_size": 8, "topk": 2, "cu_seqlens": cu, "transport": transport}
    assert_same_as_one_device(ranks, (1, 90, 12, 12, 8), [30, 11, 20], options)


def test_shards_of_any_length_are_gathered(ranks):
    options = {"block_size": 8, "topk": 3, "transport": "gather"}
    assert_same_as_one_device(ranks, (1, 70, 2, 1, 16), [13, 1, 29], options)


def held_by_the_graph(rank, transport):
    """Whether keys are held for a backward whose saved tensors are not, as with checkpointed activations."""
    q, k, v, _ = (x[:, 24 * rank : 24 * rank + 24].clone() for x in inputs((1, 72, 6, 3, 8)))
    k = k.requires_grad_() * 1
    keys = StorageWeakRef(k.untyped_storage())
    with torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda x: x):
        out = context_parallel_attention(q, k, v, block_size=8, topk=3, transport=transport)
    del k
    return out.requires_grad and not keys.expired()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_keys_are_not_held_until_the_backward(ranks, transport):
    assert ranks.run(held_by_the_graph, transport) == [False] * 3


@given(data=st.data())
@settings(max_examples=12)
def test_any_shape(ranks, data):
    block_size = data.draw(st.integers(1, 9))
    lengths = [block_size * data.draw(st.integers(0, 4)) for _ in range(ranks.num_ranks - 1)]
    length = sum(lengths) + data.draw(st.integers(0, 30))
    transport = data.draw(st.sampled_from(TRANSPORTS))
    kv_heads = data.draw(st.sampled_from([3, 6] if transport == "heads" else [1, 2]))
    shape = (data.draw(st.integers(1, 2)), length, kv_heads * data.draw(st.integers(1, 3)), kv_heads, 8)
    options = {"block_size": block_size, "topk": data.draw(st.integers(1, 5))}
    options["transport"] = transport
    assert_same_as_one_device(ranks, shape, lengths, options)


def shared_routing(rank, shape, lengths, selection):
    """The routing when ranks lend each other queries, and when they do not, and how many they lend."""
    start, group = sum(lengths[:rank]), dist.group.WORLD
    q, k, _, _ = (x[:, start : start + lengths[rank]] for x in inputs(shape))
    shards = Shards(tuple(lengths), rank, group)
    lent, own = (SharedRouting(q, k, shards, selection, lends=lends).finish() for lends in (True, False))
    return lent.indices.numpy(), own.indices.numpy()


@pytest.mark.parametrize("lengths", [[32, 32, 32], [48, 0, 24], [0, 8, 64], [64, 24, 8]])
def test_queries_that_another_rank_routes(ranks, lengths):
    shape = (2, sum(lengths), 4, 2, 16)
    selection = {"block_size": 8, "topk": 3, "keep_first": 0, "keep_recent": 0, "router": "mean", "backend": "auto"}
    results = ranks.run(shared_routing, shape, lengths, selection)
    expected = on_one_device(shape, {"block_size": 8, "topk": 3})[2]
    for i in range(2):
        assert torch.equal(torch.cat([torch.from_numpy(part[i]) for part in results], dim=1), expected)


@pytest.mark.parametrize("lengths", [(100, 100), (128, 128, 128), (64, 200, 10, 300), (0, 100), (100, 0), (0, 0)])
def test_lent_queries_make_the_scoring_of_pairs_equal(lengths):
    lent = lent_rows(lengths)
    starts = [sum(lengths[:rank]) for rank in range(len(lengths))]
    for early in range(len(lengths) // 2):
        late = len(lengths) - 1 - early
        start, length = starts[late], lengths[late]
        scored = sum(range(starts[early], starts[early] + lengths[early])) + sum(range(start, start + lent[late]))
        kept = sum(range(start + lent[late], start + length))
        assert abs(scored - kept) <= 2 * (start + length) or not lent[late]
    assert not any(lent[: (len(lengths) + 1) // 2])


def by_first_head(q, means):
    """A router that looks at all heads: every head takes the blocks that the first one likes."""
    scores = torch.einsum("rd,nd->rn", q[:, 0], means[:, 0])
    return scores[:, None].expand(-1, q.shape[1], -1)


def without_gradients(rank, shape, lengths, options):
    start = sum(lengths[:rank])
    q, k, v, _ = (x[:, start : start + lengths[rank]] for x in inputs(shape))
    with torch.no_grad():
        out, lse = context_parallel_attention(q, k, v, **options, return_lse=True)
    return out.numpy(), lse.numpy()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_without_gradients_and_with_settings(ranks, transport):
    shape, lengths = (1, 72, 6, 6, 16), [24, 24, 24]
    options = {"block_size": 8, "topk": 3, "scale": 0.4, "router": "mean" if transport == "heads" else by_first_head}
    results = ranks.run(without_gradients, shape, lengths, {**options, "transport": transport})
    expected = on_one_device(shape, options)
    for i in range(2):
        assert_close(torch.cat([torch.from_numpy(part[i]) for part in results], dim=1), expected[i], 2e-5)


def order_of_events(rank):
    """What happens when, by groups of heads: on their way, there, attended to; differentiated, gradients on their way.

    "route" is when this rank computes its routing, "dq" when q's gradient is whole, "dk" when other ranks' gradients of
    keys are waited for.
    """
    events, counts = [], Counter()
    methods = {"_start": "go", "arrive": "come", "start_back": "back", "gradients": "dk"}
    originals = {name: getattr(Gathering, name) for name in methods}

    def noting(name):
        def method(gathering, *arguments):
            events.append(f"{methods[name]} {counts[name]}")
            counts[name] += 1
            return originals[name](gathering, *arguments)

        return method

    replay, finish = parallel_attention._Call.replay, SharedRouting.finish

    def routing(shared):
        events.append("route")
        return finish(shared)

    def attending(*arguments):
        number = counts["attend"]
        counts["attend"] += 1
        events.append(f"attend {number}")
        out, *rest = replay(*arguments)
        out.register_hook(lambda gradient: events.append(f"differentiate {number}"))
        return out, *rest

    q, k, v, d_out = inputs((1, 48, 8, 4, 16))
    mine = slice(16 * rank, 16 * rank + 16)
    leaves = [x[:, mine].clone().requires_grad_() for x in (q, k, v)]
    leaves[0].register_hook(lambda gradient: events.append("dq"))
    with pytest.MonkeyPatch.context() as patch:
        for name in methods:
            patch.setattr(Gathering, name, noting(name))
        patch.setattr(parallel_attention._Call, "replay", attending)
        patch.setattr(SharedRouting, "finish", routing)
        context_parallel_attention(*leaves, block_size=8, topk=2).backward(d_out[:, mine])
    return events


def test_rows_travel_while_other_heads_are_computed(ranks):
    forward = ["go 0", "route", "go 1", "come 0", "attend 0", "come 1", "attend 1"]
    backward = ["differentiate 1", "back 0", "differentiate 0", "back 1", "dq", "dk 0"]
    assert ranks.run(order_of_events) == [forward + backward] * 3


def gradients_of_some(rank, which, lengths, shape, transport):
    """Gradients of one of q, k and v through out and lse; the inputs' heads lie before their tokens in memory."""
    start = sum(lengths[:rank])
    mine = [x[:, start : start + lengths[rank]].transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(shape)]
    mine[which].requires_grad_()
    out, lse = context_parallel_attention(*mine[:3], block_size=8, topk=3, transport=transport, return_lse=True)
    ((out * mine[3]).sum() + (lse * 1.5).sum()).backward()
    assert [x.grad is not None for x in mine[:3]] == [i == which for i in range(3)]
    return mine[which].grad.numpy()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_of_one_input_through_both_results(ranks, which, transport):
    shape, lengths = (1, 72, 6, 3, 16), [24, 16, 32]
    results = ranks.run(gradients_of_some, which, lengths, shape, transport)
    *leaves, d_out = inputs(shape)
    leaves[which].requires_grad_()
    out, lse = moba_attention(*leaves, block_size=8, topk=3, return_lse=True)
    ((out * d_out).sum() + (lse * 1.5).sum()).backward()
    assert_close(torch.cat([torch.from_numpy(part) for part in results], dim=1), leaves[which].grad, 2e-5)


def alone(rank, transport):
    groups = [dist.new_group([i]) for i in range(dist.get_world_size())]
    *leaves, d_out = inputs((1, 37, 6, 3, 16))
    leaves = [x.requires_grad_() for x in leaves]
    options = {"block_size": 8, "topk": 3}
    for out in (
        context_parallel_attention(*leaves, group=groups[rank], transport=transport, **options),
        moba_attention(*leaves, **options),
    ):
        yield [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def alone_and_plain(rank, transport):
    return [all(torch.equal(x, y) for x, y in zip(*alone(rank, transport), strict=True))]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_group_of_one_computes_what_no_group_does(ranks, transport):
    assert ranks.run(alone_and_plain, transport) == [[True]] * 3
