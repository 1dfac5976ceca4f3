"""Where a benchmark's q and k come from, and packed documents."""

from __future__ import annotations

import pytest
import torch
from routings import count

from moba import moba_attention
from moba_lab.bench import attention, inputs
from moba_lab.bench.attention import run_case
from moba_lab.bench.cases import Case
from moba_lab.bench.inputs import make_inputs

CPU = torch.device("cpu")


def distinct_of_64(routing: str) -> float:
    case = Case(4096, 4, 2, 64, 64, 4, torch.float32, routing=routing)
    q, k, v, _ = make_inputs(case, CPU)
    chosen = moba_attention(q, k, v, block_size=64, topk=4, return_routing=True)[1].indices[0]
    return count(chosen, 64)["distinct of 64"]


def test_clustered_queries_choose_the_blocks_of_a_topic():
    torch.manual_seed(0)
    assert distinct_of_64("clustered") < distinct_of_64("random") / 2


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 128), (3, 3, 64), (6, 3, 192)])
def test_heads_of_a_model_keep_their_logits(monkeypatch, heads, kv_heads, head_dim):
    all_q, all_k = torch.randn(5, 40, 3, 64, dtype=torch.double), torch.randn(5, 40, 64, dtype=torch.double)
    monkeypatch.setattr(inputs, "model_heads", lambda tokens, device: (all_q, all_k))
    case = Case(40, heads, kv_heads, head_dim, 8, 2, torch.double, routing="model")
    q, k, *_ = make_inputs(case, CPU)
    for head in range(heads):
        kv_head, member = divmod(head, heads // kv_heads)
        source = [0, 2, 4][kv_head] if kv_heads == 3 else [0, 4][kv_head]
        logits = q[0, :, head] @ k[0, :, kv_head].T * head_dim**-0.5
        torch.testing.assert_close(logits, all_q[source, :, member % 3] @ all_k[source].T * 64**-0.5)


def test_heads_that_a_model_has_not_are_refused(monkeypatch):
    monkeypatch.setattr(inputs, "model_heads", lambda *_: (torch.randn(5, 40, 3, 64), torch.randn(5, 40, 64)))
    with pytest.raises(ValueError, match="--head-dim must be a multiple of the model's 64, got 96"):
        make_inputs(Case(40, 2, 2, 96, 8, 2, torch.float32, routing="model"), CPU)


def test_queries_and_keys_come_from_the_trained_model(moba):
    """The command reads a text with SmolLM2; its heads attend far more to some keys than random ones, and pass."""
    options = "--tokens 1024 --heads 6 --kv-heads 2 --head-dim 64 --block-size 64 --topk 3 --dtype fp32 --routing model"
    code, out, err = moba("bench", "attention", *options.split(), "--device", "cpu")
    assert code == 0, err
    assert "1K, 6/2 heads, D 64, 64/3, model routing, float32" in out


def test_packed_documents_are_checked_one_by_one(monkeypatch):
    case = Case(96, 2, 1, 16, 8, 3, torch.float32, documents=3)
    result = run_case(case, CPU, "auto", 1, False, {})
    assert "failed" not in result
    assert {"forward_ms", "train_ms", "routing_ms"} <= result["moba"].keys()
    assert result["dense"]["forward_ms"] > 0
    assert case.name == "3 × 32, 2/1 heads, D 16, 8/3, float32"
    assert case.moba_flops == 3 * Case(32, 2, 1, 16, 8, 3, torch.float32).moba_flops
    assert case.dense_flops == 3 * Case(32, 2, 1, 16, 8, 3, torch.float32).dense_flops
    varlen = attention.moba_attention_varlen

    def one_document(*args, cu_seqlens, **options):
        return varlen(*args, cu_seqlens=cu_seqlens[[0, -1]], **options)

    monkeypatch.setattr(attention, "moba_attention_varlen", one_document)
    assert "failed" in run_case(case, CPU, "auto", 1, False, {})


def test_a_choice_is_counted():
    """Two heads, four blocks of two: one always reads block 0, the other its own block alone."""
    own = torch.arange(8) // 2
    first = torch.stack([torch.zeros_like(own), torch.where(own > 0, own, -1)], dim=-1)
    second = torch.stack([own, torch.full_like(own, -1)], dim=-1)
    second[4:, 1] = torch.tensor([0, 1, 1, 1])
    record = count(torch.stack([first, second], dim=1), block_size=2)
    # Entries of past blocks 0, 1, 2 are 6, 0, 0 and 1, 3, 0.
    assert record["fullest block"] == round((3 + 9 / 4) / 2, 1)
    assert record["of any head"] == 3.0


def test_the_reference_is_not_timed_beside_packed_documents(moba):
    code, _, err = moba("bench", "attention", "--tokens", 64, "--documents", 2, "--reference", "--device", "cpu")
    assert code == 2
    assert "--reference reads one document" in err


def test_a_case_without_its_model_fails_alone(monkeypatch):
    def no_model(tokens, device):
        raise ValueError("no such model")

    monkeypatch.setattr(inputs, "model_heads", no_model)
    case = Case(64, 2, 1, 64, 8, 3, torch.float32, routing="model")
    assert run_case(case, CPU, "auto", 1, False, {})["failed"] == "no such model"
