"""Context parallelism: what is not valid, or not the same on all ranks, ends all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_parallel import by_first_head, inputs
from test_parallel import ranks as ranks
from torch.distributed.device_mesh import init_device_mesh

from moba.parallel import context_parallel_attention
from moba.parallel.shards import _control_device


def disagree(rank, what):
    q = torch.zeros(1, 16, 2, 8, dtype=torch.float64 if what == "dtype" and rank else torch.float32)
    if what == "head dim" and rank:
        q = q[..., :4]
    k = torch.zeros(1, 15, 2, 8) if what == "shape" and rank else q
    if what == "gradients asked for" and rank:
        k.requires_grad_()
    options = {"block_size": 8 + rank if what == "block_size" else 8, "transport": "gather"}
    if what == "scale":
        options["scale"] = 0.25 if rank else 0.250001
    if what == "backend":
        options["backend"] = "pytorch" if rank else "reference"
    if what == "cu_seqlens":
        options["cu_seqlens"] = torch.tensor([0, 20 + rank, 48]).int()
    context_parallel_attention(q, k, k, topk=2, **options)


@pytest.mark.parametrize(
    "what", ["dtype", "head dim", "shape", "block_size", "scale", "backend", "cu_seqlens", "gradients asked for"]
)
def test_disagreement_ends_all_ranks_with_a_message(ranks, what):
    for rank, (is_right, message) in enumerate(ranks.outcomes(disagree, what)):
        assert not is_right
        assert message.startswith("ValueError")
        if what != "shape":
            assert f"disagree on {what}" in message
        elif rank == 0:
            assert "not valid" in message


def is_given(rank, what):
    q = torch.zeros(1, 16, 2, 8)
    options = {"block_size": 8, "topk": 2}
    if what == "no tensor":
        q = None if rank else q
    elif what == "strides":
        q = q.mT.contiguous().mT if rank else q
    elif what == "heads":
        options["transport"] = "heads"
    elif what == "scale":
        options["scale"] = "0.5" if rank else 0.5
    elif what == "backend":
        options["backend"] = "triton" if rank else "pytorch"
    elif what == "too large":
        options["block_size"] = 1 << 70 if rank else 8
    elif what == "rows":
        options["cu_seqlens"] = torch.tensor([0, 48]).int()
        q = torch.zeros(2, 16, 2, 8)
    elif what == "mesh":
        options["group"] = init_device_mesh("cpu", (1, 3))
    elif what == "some heads":
        options |= {"transport": "heads", "router": by_first_head}
        q = torch.zeros(1, 16, 3, 8)
    elif what != "values":
        options["cu_seqlens"] = torch.tensor({"beyond the end": [0, 49], "not ascending": [0, 20, 10, 48]}[what]).int()
    k = torch.zeros(2 if what == "rows" else 1, 16, 3 if what in ("heads", "some heads") else 1, 8)
    context_parallel_attention(q, k, k[..., :4] if what == "values" else k, **options)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no tensor", "q must be a tensor, got None"),
        ("strides", "the last dimension of q must be contiguous"),
        ("heads", "key/value heads must divide query heads, got 2 query and 3 key/value heads"),
        ("values", "context parallelism needs keys and values of one head dim, got 8 and 4"),
        ("scale", "scale must be a finite number or None, got '0.5'"),
        ("backend", "backend='triton' cannot run here: needs a CUDA device"),
        ("too large", "Overflow"),
        ("rows", "cu_seqlens needs batch size 1, got 2"),
        ("mesh", "group must be a mesh of one dimension, such as mesh['cp'], got one of 2 dimensions"),
        ("some heads", "a router that is a function needs all heads"),
        ("beyond the end", "cu_seqlens must ascend from 0 to at most 48, got [0, 49]"),
        ("not ascending", "cu_seqlens must ascend from 0, got [0, 20, 10, 48]"),
    ],
)
def test_what_is_not_valid_ends_all_ranks_with_a_message(ranks, what, message):
    outcomes = ranks.outcomes(is_given, what)
    assert [is_right for is_right, _ in outcomes] == [False] * 3
    assert all(said.startswith("ValueError") for _, said in outcomes)
    assert message in outcomes[-1][1]


def with_shards_of_before(rank, tokens):
    """What a second call returns that is told the shards of the first; the second may have other tokens."""
    q, k, v, _ = inputs((1, 16, 2, 1, 8))
    options = {"block_size": 8, "topk": 2}
    out, shards = context_parallel_attention(q, k, v, **options, return_shards=True)
    again = context_parallel_attention(q[:, :tokens], k[:, :tokens], v[:, :tokens], **options, shards=shards)
    return torch.equal(out, again)


def test_shards_of_an_earlier_call_are_taken(ranks):
    assert ranks.run(with_shards_of_before, 16) == [True] * 3
    for is_right, message in ranks.outcomes(with_shards_of_before, 8):
        assert not is_right
        assert message.startswith("ValueError: shards gives this rank 16 tokens, got 8")


@pytest.mark.parametrize(
    ("config", "device"), [("cuda:nccl", "cuda:0"), ("cuda:nccl,cpu:gloo", "cuda:0"), ("cpu:gloo,cuda:gloo", "cpu")]
)
def test_a_rank_given_no_tensor_speaks_where_the_others_do(monkeypatch, config, device):
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda group: config)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    assert _control_device(None, None) == torch.device(device)


def test_needs_a_process_group():
    q = torch.zeros(1, 8, 2, 8)
    with pytest.raises(ValueError, match="init_process_group"):
        context_parallel_attention(q, q, q, block_size=8, topk=2)


DYING = """
import os, signal, sys, time, torch, torch.distributed as dist
from datetime import timedelta
from moba.parallel import context_parallel_attention
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
q = torch.zeros(1, 16, 2, 8)
context_parallel_attention(q, q, q, block_size=8, topk=2)
# Not before: imports of the two may end many seconds apart.
group = dist.new_group(timeout=timedelta(seconds=8))
context_parallel_attention(q, q, q, group=group, block_size=8, topk=2)
print("once", flush=True)
if rank == 1:
    if sys.argv[3] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)
context_parallel_attention(q, q, q, group=group, block_size=8, topk=2)
"""


@pytest.mark.parametrize("what", ["dies", "does something else"])
def test_a_rank_that_is_not_there_ends_the_others(tmp_path, what):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DYING, str(rank), str(tmp_path / "store"), what],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        out, error = processes[0].communicate(timeout=500)  # of the other's 1000 seconds
    finally:
        for process in processes:
            process.kill()
    processes[1].communicate()
    assert "once" in out
    assert processes[0].returncode not in (0, None)
    assert "Error" in error
