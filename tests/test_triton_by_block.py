"""The by-block view against a sort in plain torch. On a GPU, or in Triton's interpreter."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from helpers import make_qkv
from hypothesis import given, settings
from hypothesis import strategies as st

from moba.backends import reference
from moba.routing import Selection
from moba.sequences import Sequences

triton = pytest.importorskip("triton", reason="the triton backend needs Triton")
if not (triton.knobs.runtime.interpret or torch.cuda.is_available()):
    pytest.skip("Triton kernels need a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from moba.backends.triton import by_block  # noqa: E402
from moba.backends.triton.device import num_global_blocks  # noqa: E402

DEVICE = torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")


def first_blocks(sequences, block_size):
    """Global number of the first block of every query row's sequence: int64 [R, T]."""
    row = torch.arange(sequences.num_rows)[:, None].expand(-1, sequences.num_queries)
    if sequences.cu_q is None:
        return row * sequences.num_blocks(block_size)
    starts = sequences.cu_k.cpu().long()
    numbers = starts // block_size + torch.arange(starts.numel())
    sequence = torch.searchsorted(sequences.cu_q.cpu()[1:], torch.arange(sequences.num_queries), right=True)
    return numbers[sequence][None]


def expected_groups(indices, sequences, block_size):
    """Each head's and block's entries, as nested lists."""
    own = (sequences.positions(indices.device).cpu() // block_size).tolist()
    first = first_blocks(sequences, block_size).tolist()
    _, num_queries, num_heads, topk = indices.shape
    groups = [[[] for _ in range(num_global_blocks(sequences, block_size))] for _ in range(num_heads)]
    for row, of_row in enumerate(indices.tolist()):
        for query, of_query in enumerate(of_row):
            for head, blocks in enumerate(of_query):
                for slot, block in enumerate(blocks[:-1]):
                    if 0 <= block < own[row][query]:
                        entry = (row * num_queries + query) * topk + slot
                        groups[head][first[row][query] + block].append(entry)
    return groups


def assert_groups(indices, sequences, block_size):
    offsets, entries = by_block.group_by_block(indices, sequences, block_size)
    assert offsets.dtype == entries.dtype == torch.int32
    num_rows, num_queries, num_heads, topk = indices.shape
    assert offsets.shape == (num_heads, num_global_blocks(sequences, block_size) + 1)
    assert entries.shape == (num_heads, num_rows * num_queries * (topk - 1))
    for head, groups in enumerate(expected_groups(indices, sequences, block_size)):
        bounds, values = offsets[head].tolist(), entries[head].tolist()
        assert [values[a:b] for a, b in pairwise(bounds)] == groups


def routed(batch, length, heads, block_size, topk, sequences=None):
    q, k, _ = make_qkv(batch, length, length, heads, heads, 16, device=DEVICE)
    sequences = sequences or Sequences(batch, length, length)
    return reference.route(q, k, sequences, Selection.of(block_size, topk, 0, 0, "mean")).contiguous(), sequences


@pytest.mark.parametrize(
    ("length", "block_size", "topk"),
    [(300, 32, 4), (270, 1, 2), (130, 7, 8), (40, 64, 3), (20, 1, 12), (0, 4, 3), (9, 4, 1)],
)
def test_plain(length, block_size, topk):
    indices, sequences = routed(2, length, 2, block_size, topk)
    assert_groups(indices, sequences, block_size)


def test_a_block_that_every_query_chose():
    indices = torch.zeros(1, 600, 2, 2, dtype=torch.int32, device=DEVICE)
    assert_groups(indices, Sequences(1, 600, 600), 4)


def test_packed_and_padded():
    cu_q = torch.tensor([0, 70, 70, 71, 130], dtype=torch.int32, device=DEVICE)
    assert_groups(*routed(1, 140, 2, 8, 4, Sequences(1, 140, 140, cu_q=cu_q, cu_k=cu_q)), 8)
    none = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    assert_groups(*routed(1, 10, 2, 8, 4, Sequences(1, 10, 10, cu_q=none, cu_k=none)), 8)
    start, end = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 13], [100, 77]))
    assert_groups(*routed(2, 100, 2, 8, 4, Sequences(2, 100, 100, key_start=start, key_end=end)), 8)


def test_a_slice_of_heads():
    indices, sequences = routed(1, 60, 4, 8, 3)
    whole_offsets, whole_entries = by_block.group_by_block(indices, sequences, 8)
    offsets, entries = by_block.group_by_block(indices[:, :, 1:3], sequences, 8)
    assert torch.equal(offsets, whole_offsets[1:3])
    for head in range(2):
        end = offsets[head, -1]
        assert torch.equal(entries[head, :end], whole_entries[1 + head, :end])


@settings(max_examples=10)
@given(st.integers(1, 150), st.integers(1, 20), st.integers(1, 6), st.integers(0, 1000))
def test_any_routing_given_by_a_user(length, block_size, topk, seed):
    """Numbers outside 0 ... own block - 1 are left out wherever they stand."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks = -(-length // block_size)
    choice = torch.rand(2, length, 2, num_blocks + topk, generator=generator).argsort(-1)[..., :topk] - 2
    assert_groups(choice.int().to(DEVICE), Sequences(2, length, length), block_size)


def test_too_many_entries():
    indices = torch.zeros(1, 1, 1, 1, dtype=torch.int32).expand(1 << 16, 1 << 12, 1, 8)
    with pytest.raises(ValueError, match=r"below 2\^31"):
        by_block.group_by_block(indices, Sequences(1 << 16, 1 << 12, 1 << 12), 64)
