"""Context parallelism on gloo, against one device."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from test_parallel import four as four
from test_parallel import ranks as ranks
from test_parallel import two as two
from test_parallel import two_or_four as two_or_four

from moba.parallel import context_parallel_attention
from moba_lab.bench.cases import ParallelCase

# 16 of 128 blocks are popular: each query looks for one of these.
CLUSTERED = ParallelCase(8192, 4, 2, 16, 64, 3, torch.float32, clustered=True, backward=False)


def bytes_sent(rank, case, num_ranks):
    """Bytes that this rank sent, of whatever kind, and its routing."""
    length = case.tokens // num_ranks
    q, k, v = case.make_inputs(torch.device("cpu"), length, first=rank * length)
    sent, exchange = [], dist.batch_isend_irecv

    def counted(operations):
        sent.extend(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)
        return exchange(operations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", counted)
        _, routing = context_parallel_attention(
            q, k, v, block_size=case.block_size, topk=case.topk, transport="selective", return_routing=True
        )
    return sum(sent), routing.indices.numpy()


def assert_only_chosen_blocks_travel(ranks):
    """Means, and who wants what, included: at most 1.1 times the distinct remote blocks that queries chose."""
    num_ranks, case = ranks.num_ranks, CLUSTERED.for_ranks(ranks.num_ranks)
    results = ranks.run(bytes_sent, case, num_ranks)
    per_rank, group = case.tokens // num_ranks // case.block_size, case.heads // case.kv_heads
    chosen = 0
    for rank, (_, indices) in enumerate(results):
        for kv_head in range(case.kv_heads):
            of_head = indices[:, :, kv_head * group : (kv_head + 1) * group]
            chosen += len({int(i) for i in of_head.flatten() if 0 <= i < rank * per_rank})
    remote = case.kv_heads * per_rank * sum(range(num_ranks))
    needed = chosen * 2 * case.block_size * case.head_dim * 4
    assert 0 < chosen < 0.5 * remote, "not clustered"
    sent = sum(count for count, _ in results)
    assert needed <= sent <= 1.1 * needed


def test_only_chosen_blocks_travel_between_three_ranks(ranks):
    assert_only_chosen_blocks_travel(ranks)


def test_only_chosen_blocks_travel_between_two_or_four(two_or_four):
    assert_only_chosen_blocks_travel(two_or_four)
