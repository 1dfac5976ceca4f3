"""What a user can get wrong is refused with a ValueError that names the argument, what it was and what is valid."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import make_qkv

from moba import (
    MoBAConfig,
    Routing,
    append_block_means,
    backends,
    moba_attention,
    moba_attention_paged,
    moba_attention_varlen,
    moba_route,
)
from moba.sequences import Sequences

Q, K, V = make_qkv(2, 12, 16, 4, 2, 8)
VALID = {"block_size": 4, "topk": 2}
CHOSEN = torch.zeros(2, 12, 2, 2, dtype=torch.int64)
ONES = torch.ones(2, dtype=torch.int32)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size must be an integer >= 1, got 0"),
        ({"block_size": 4.0}, "block_size must be an integer >= 1, got 4.0"),
        ({"block_size": True}, "block_size must be an integer >= 1, got True"),
        ({"topk": 0}, "topk must be an integer >= 1, got 0"),
        ({"keep_first": -1}, "keep_first must be an integer >= 0, got -1"),
        ({"keep_first": 1, "keep_recent": 1}, "keep_first + keep_recent must be at most topk - 1 = 1"),
        ({"router": "best"}, "router must be one of 'mean', 'recent', 'sink', 'shared', 'top_p=0.9', got 'best'"),
        ({"scale": "0.5"}, "scale must be a finite number or None, got '0.5'"),
        ({"scale": float("nan")}, "scale must be a finite number or None, got nan"),
        ({"scale": [0.5]}, "scale must be a finite number or None, got [0.5]"),
        ({"backend": "cuda"}, "backend must be one of 'auto', 'reference', 'pytorch', 'triton', got 'cuda'"),
        ({"key_start": torch.ones(2)}, "key_start must be an int32 tensor [B] = [2], got torch.float32 (2,)"),
        ({"key_end": int32(1, 2, 3)}, "key_end must be an int32 tensor [B] = [2], got torch.int32 (3,)"),
        ({"key_start": [0, 1]}, "key_start must be an int32 tensor [B] = [2], got [0, 1]"),
        ({"key_end": int32(17, 3)}, "0 <= key_start <= key_end <= S = 16 must hold in every row, got key_end=[17, 3]"),
        ({"key_start": int32(5, 1), "key_end": int32(4, 3)}, "got key_start=[5, 1], key_end=[4, 3]"),
        ({"routing": Routing(torch.zeros(2, 12, 4, 2, dtype=torch.int32), 8)}, "routing was made with block_size=8"),
        (
            {"routing": Routing(torch.zeros(2, 12, 4, 3, dtype=torch.int32), 4)},
            "routing.indices must be int32 (2, 12, 4, 2)",
        ),
        (
            {"routing": Routing(torch.zeros(2, 12, 4, 2, dtype=torch.int32), 4), "router": "recent"},
            "router, keep_first and keep_recent choose blocks, so they cannot be combined with routing, got 'recent'",
        ),
        (
            {"routing": Routing(torch.zeros(2, 12, 4, 2, dtype=torch.int32), 4), "keep_first": 1},
            "cannot be combined with routing, got 'mean', 1 and 0",
        ),
        ({"softcap": 0.0}, "softcap must be a finite number > 0 or None, got 0.0"),
        ({"softcap": float("inf")}, "softcap must be a finite number > 0 or None, got inf"),
        ({"softcap": "50"}, "softcap must be a finite number > 0 or None, got '50'"),
        ({"softcap": True}, "softcap must be a finite number > 0 or None, got True"),
        ({"sinks": torch.zeros(2)}, "sinks must be a floating-point tensor [H] = [4], got torch.float32 (2,)"),
        ({"sinks": torch.zeros(4).int()}, "sinks must be a floating-point tensor [H] = [4], got torch.int32 (4,)"),
        ({"sinks": 0.0}, "sinks must be a floating-point tensor [H] = [4], got 0.0"),
        ({"sinks": torch.zeros(4, device="meta")}, "sinks must be on cpu like q, got meta"),
        ({"topk": None}, "topk must be an integer >= 1, got None"),
        ({"block_indices": CHOSEN, "topk": 3}, "topk must be left out or be the 2 places of block_indices, got 3"),
        ({"block_indices": CHOSEN, "own_block": 1}, "own_block must be True or False, got 1"),
        ({"own_block": False}, "own_block says how block_indices are read, and there are none: got False"),
        (
            {"block_indices": CHOSEN[:, 1:]},
            "block_indices must be int32 or int64 [B, T, H or G, K] with a K >= 1 beside",
        ),
        ({"block_indices": CHOSEN[:, :, :1]}, "q (2, 12, 4, 8) and 2 key/value heads, got torch.int64 (2, 12, 1, 2)"),
        ({"block_indices": CHOSEN[..., :0]}, "got torch.int64 (2, 12, 2, 0)"),
        ({"block_indices": CHOSEN.float()}, "got torch.float32 (2, 12, 2, 2)"),
        ({"block_indices": [[0]]}, "got [[0]]"),
        ({"block_indices": CHOSEN.to("meta")}, "block_indices must be on cpu like q, got meta"),
        (
            {"block_indices": CHOSEN, "router": "sink"},
            "blocks, so they cannot be combined with block_indices, got 'sink'",
        ),
        ({"block_indices": CHOSEN, "route_by": (Q, K)}, "so they cannot be combined with route_by"),
        ({"block_indices": CHOSEN, "block_means": K[:, ::4]}, "so they cannot be combined with block_means"),
        (
            {"block_indices": CHOSEN, "routing": Routing(torch.zeros(2, 12, 4, 2, dtype=torch.int32), 4)},
            "so they cannot be combined with routing",
        ),
        ({"route_by": (Q, K), "router": "sink"}, "route_by serves to score blocks, and router='sink' scores none"),
        ({"router": lambda q, means: torch.zeros(3, 1, 1)}, "router must return floating scores [rows, H, N]"),
        ({"router": lambda q, means: torch.zeros(q.shape[0], 4, means.shape[0], dtype=torch.long)}, "torch.int64"),
    ],
)
@pytest.mark.parametrize("named", ["pytorch", "reference"])
def test_options(named, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        moba_attention(Q, K, V, **{"backend": named, **VALID, **options})


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        (Q[0], K, V, "q must be [B, T, H, D], got shape (12, 4, 8)"),
        (Q.double(), K, V, "q, k and v must share one dtype"),
        (Q.int(), K.int(), V.int(), "q, k and v must share one dtype of fp16, bf16, fp32, fp64; q is torch.int32"),
        (Q, K[:1], V[:1], "q, k and v must have one batch size, got 2 and 1"),
        (
            Q,
            K[:, :11],
            V[:, :11],
            "T must be at most S, got T=12, S=11 for q [B, T, H, D] (2, 12, 4, 8) and k [B, S, G",
        ),
        (Q[:, :, :3], K, V, "got 3 query and 2 key/value heads"),
        (Q, K[..., :4], V, "q and k must have one head dim, got 8 and 4"),
        (Q, K, V[:, :15], "k and v must have one shape but for the head dim, got (2, 16, 2, 8) and (2, 15, 2, 8)"),
        (Q.repeat(1, 1, 1, 40), K.repeat(1, 1, 1, 40), V, "head dim must be 1 to 256, got 320 for q"),
        (Q, K, V.repeat(1, 1, 1, 40), "head dim must be 1 to 256, got 320 for v"),
        (Q.mT.contiguous().mT, K, V, "the last dimension of q must be contiguous"),
        (Q[:, :1], K[:, :, :0], V[:, :, :0], "4 query and 0 key/value heads: heads are the last dimension but one"),
        (
            Q.transpose(1, 2),
            K.transpose(1, 2),
            V.transpose(1, 2),
            "got 12 query and 16 key/value heads: heads are the last dimension but one",
        ),
        (Q.to("meta"), K, V, "must be on one device"),
        (Q.to("meta"), K.to("meta"), V.to("meta"), "q, k and v must hold values, got tensors on the device meta"),
    ],
)
def test_tensors(q, k, v, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        moba_attention(q, k, v, **VALID)


@pytest.mark.parametrize(
    ("cu", "cu_k", "message"),
    [
        (int32(), None, "cu_seqlens must be an int32 tensor [num_sequences + 1]"),
        (int32(1, 5), None, "cu_seqlens must ascend from 0 to at most 12, got [1, 5]"),
        (int32(0, 7, 5), None, "cu_seqlens must ascend from 0"),
        (int32(0, 13), None, "cu_seqlens must ascend from 0 to at most 12"),
        ([0, 12], None, "got [0, 12]"),
        (int32(0, 5, 12), int32(0, 16), "cu_seqlens_k must have as many entries as cu_seqlens, got 2 and 3"),
        (int32(0, 5, 12), int32(0, 4, 16), "cu_seqlens_k must give every sequence at least as many keys as queries"),
    ],
)
def test_packed(cu, cu_k, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        moba_attention_varlen(Q[0], K[0], V[0], cu_seqlens=cu, cu_seqlens_k=cu_k, **VALID)


INTERPRETED = """
import torch, triton
from moba import moba_attention
triton.__version__ = VERSION
for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    q, k, v = (torch.randn(1, 40, 2, 16, dtype=dtype, requires_grad=True) for _ in range(3))
    results = []
    for backend in ("reference", "triton"):
        out = moba_attention(q, k, v, block_size=8, topk=2, backend=backend)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    for expected, got in zip(*results):
        assert (got - expected).abs().max() <= error * expected.abs().max()
"""


@pytest.mark.parametrize(
    ("version", "said"),
    [("triton.__version__", None), ("'3.7.1'", "Triton's interpreter serves in Triton 3.6.x only, this is 3.7.1")],
)
def test_the_interpreter_works_as_a_user_types_it(version, said):
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "-c", INTERPRETED.replace("VERSION", version)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if said is None:
        assert result.returncode == 0, result.stderr
    else:
        assert result.stderr.endswith(f"ValueError: backend='triton' is not available here: {said}\n")


def test_a_named_backend_runs_or_raises():
    with pytest.raises(ValueError, match=r"backend='triton'.*(interpreter|not available)"):
        moba_attention(Q, K, V, **VALID, backend="triton")


def test_an_older_triton_is_refused_by_name(monkeypatch, caplog):
    """PyTorch 2.6 and 2.7 come with one that the kernels cannot be imported with."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    monkeypatch.delattr(triton, "knobs")
    for name in [name for name in sys.modules if name.startswith("moba.backends.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(backends, "triton", raising=False)
    monkeypatch.setattr(backends, "AUTO", {"cpu": ("triton", "pytorch")})  # as on a GPU
    monkeypatch.setattr(backends, "_announced", set())
    said = "backend='triton' is not available here: needs Triton 3.6 or newer, as PyTorch 2.10 brings it, this is 3.3.1"
    with pytest.raises(ValueError, match=re.escape(said)):
        moba_attention(Q, K, V, **VALID, backend="triton")
    with caplog.at_level(logging.INFO, logger="moba"):
        taken = [moba_attention(Q, K, V, **VALID) for _ in range(2)]
    assert torch.equal(taken[1], moba_attention(Q, K, V, **VALID, backend="pytorch"))
    assert [record.getMessage() for record in caplog.records] == [f"backend=\"auto\" takes 'pytorch' on cpu: {said}"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode": "sparse"}, "decode must be one of 'full', 'moba', got 'sparse'"),
        ({"full_layers": -1}, "full_layers must be an integer >= 0, got -1"),
        ({"full_layers": (0, -2)}, "full_layers must be an integer >= 0, got -2"),
        ({"full_layers": "last"}, "full_layers must be an integer >= 0, got 'last'"),
        ({"backend": "flash"}, "backend must be one of"),
    ],
)
def test_config(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MoBAConfig(**VALID, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": None}, "q must be a tensor, got None"),
        ({"k": [1.0]}, "k must be a tensor, got [1.0]"),
        ({"routing": 3}, "routing must be a Routing, got 3"),
        ({"router": lambda q, means: None}, "router must return floating scores [rows, H, N] = (12, 4, 3), got None"),
    ],
)
def test_what_is_no_tensor_is_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        moba_attention(**{"q": Q, "k": K, "v": V, **VALID, "backend": "pytorch", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_means": None}, "block_means must be a tensor, got None"),
        ({"block_means": K[0]}, "block_means must be [B, T, H, D], got shape (16, 2, 8)"),
        ({"block_means": K[..., :4]}, "q and block_means must have one head dim, got 8 and 4"),
        ({"q": Q[:, :, :3]}, "key/value heads must divide query heads, got 3 query and 2"),
        ({"num_keys": 11}, "num_keys must be an integer >= 12, got 11"),
    ],
)
def test_routing_alone(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        moba_route(**{"q": Q, "block_means": K, "num_keys": 16, **VALID, **changes})


def test_more_positions_than_int32_counts():
    far = torch.zeros(1).expand(1, 2**31, 1, 1)
    with pytest.raises(ValueError, match="at most 2147483647 keys, as positions are int32, got 2147483648"):
        moba_attention(far[:, :1], far, far, **VALID)
    with pytest.raises(ValueError, match="at most 2147483647 keys"):
        moba_route(far[:, :1], far[:, :1], num_keys=2**31, block_size=2**31, topk=2)


@pytest.mark.parametrize("named", ["pytorch", "reference"])
@pytest.mark.parametrize("block_size", [2**20, 2**31, 2**40, 2**70])
def test_a_block_larger_than_any_memory_is_full_attention(named, block_size):
    bounds = {"key_start": int32(0, 3), "key_end": int32(16, 9), "return_lse": True, "return_routing": True}
    expected = moba_attention(Q, K, V, block_size=16, topk=2, backend=named, **bounds)
    whole = moba_attention(Q, K, V, block_size=block_size, topk=2, backend=named, **bounds)
    step = moba_attention(Q[:, -1:], K, V, block_size=block_size, topk=2, backend=named, block_means=K[:, :0], **bounds)
    append_block_means(K[:, :0], K, num_new=16, block_size=block_size, backend=named)
    assert torch.equal(whole[0], expected[0])
    assert torch.equal(whole[2].indices, expected[2].indices)
    assert whole[2].block_size == block_size
    torch.testing.assert_close(step[0], expected[0][:, -1:])
    torch.testing.assert_close(step[1], expected[1][:, -1:])


@pytest.mark.parametrize("named", ["pytorch", "reference"])
def test_a_block_larger_than_any_memory_in_pages_that_no_power_of_two_divides(named):
    q, k, v = (x[:1] for x in (Q[:, -1:], K, V))
    k_pages, v_pages = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 2)).view(3, 6, 2, 8) for x in (k, v))
    pages = {"page_table": int32(0, 1, 2)[None], "key_end": int32(16), "block_means": torch.zeros(3, 1, 2, 8)}
    out = moba_attention_paged(q, k_pages, v_pages, **pages, block_size=6 << 40, topk=2, backend=named)
    torch.testing.assert_close(out, moba_attention(q, k, v, block_size=16, topk=2, backend=named))
    fitting = Sequences(1, 1, 18, key_end=pages["key_end"], page_table=pages["page_table"]).fitting_block_size(6 << 40)
    assert fitting % 6 == 0


def test_a_gpu_that_falls_back_to_plain_torch_is_warned_of(monkeypatch, caplog):
    x = SimpleNamespace(is_meta=False, device=torch.device("cuda", 0))
    monkeypatch.setattr(backends, "_announced", set())
    monkeypatch.setattr(backends, "unavailable", lambda name, *_, **asked: "not for this" if name == "triton" else None)
    for _ in range(2):
        assert backends.resolve("auto", x, x, own_block=False) is backends.load("pytorch")
    (record,) = caplog.records
    assert (record.levelname, record.getMessage()) == (
        "WARNING",
        "backend=\"auto\" takes 'pytorch' on cuda:0: not for this",
    )


def test_heads_and_tokens_that_seem_to_have_changed_places_are_warned_of(recwarn):
    x = torch.randn(1, 8, 300, 2)
    with pytest.warns(UserWarning, match=r"is 8 tokens of 300 heads, as q, k and v are \[B, T, H, D\]"):
        moba_attention(x, x, x, **VALID)
    recwarn.clear()
    moba_attention(x.transpose(1, 2), x.transpose(1, 2), x.transpose(1, 2), **VALID)
    moba_attention(x[:, :, :256], x[:, :, :256], x[:, :, :256], **VALID)
    assert not recwarn
