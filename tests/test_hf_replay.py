"""Routings of a rollout, replayed in training."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from tiny_models import logits, positions_of, random_tokens, tiny_model

from moba import MoBAConfig, register_moba
from moba.hf.cache import MoBACache
from moba.hf.record import record_routings
from moba.hf.replay import load_routings, replay_routings, routing_rows, save_routings
from moba.routing import Routing

CLOSE = 1e-4


@pytest.fixture(autouse=True)
def _registered():
    register_moba(MoBAConfig(8, 3, backend="pytorch", decode="moba"))


@pytest.fixture
def llama():
    model = tiny_model()
    model.set_attn_implementation("moba")
    return model


def recorded(model, tokens, **inputs):
    with record_routings(model) as record:
        out = logits(model, tokens, use_cache=False, **inputs)
    return record, out


def blocks_read(model, tokens, **inputs):
    """Layer -> the indices of one forward pass."""
    record, _ = recorded(model, tokens, **inputs)
    return {layer: routing.indices for layer, routing in record.joined().items()}


def gradient(model, tokens, **inputs):
    model.zero_grad()
    model(tokens, labels=tokens, use_cache=False, **inputs).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.fixture
def moved(llama):
    """The model after an update that changes which blocks it would read."""
    other = tiny_model()
    with torch.no_grad():
        for p, q in zip(other.parameters(), llama.parameters(), strict=True):
            p.copy_(q + 0.2 * torch.randn_like(q))
    other.set_attn_implementation("moba")
    return other


def test_a_rollout_is_replayed_from_a_file(llama, moved, tmp_path):
    prompts = random_tokens(2, 30)
    mask = torch.ones_like(prompts)
    mask[1, :11] = 0
    with record_routings(llama) as record:
        texts = llama.generate(
            prompts, attention_mask=mask, max_new_tokens=20, min_new_tokens=20, do_sample=False,
            past_key_values=MoBACache(llama.config),
        )  # fmt: skip
    mask = torch.nn.functional.pad(mask, (0, 20), value=1)
    rows = routing_rows(record, mask)
    assert [len(row[0].indices) for row in rows] == [49, 38]
    save_routings(tmp_path / "rollout.npz", rows)
    loaded = load_routings(tmp_path / "rollout.npz")
    for row, again in zip(rows, loaded, strict=True):
        assert row.keys() == again.keys() == {0, 1, 2}
        assert all(torch.equal(row[layer].indices, again[layer].indices) for layer in row)

    # Padded as it was, and packed into one row: what each layer reads is what the rollout read, not what it would now.
    padded = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    own = blocks_read(moved, texts, **padded)
    with replay_routings(moved, loaded):
        replayed = blocks_read(moved, texts, **padded)
        out = logits(moved, texts, use_cache=False, **padded)
        packed_tokens = torch.cat([texts[0], texts[1, 11:]])[None]
        packed = logits(moved, packed_tokens, use_cache=False, position_ids=positions_of([50, 39]))
        cu = torch.tensor([0, 50, 89], dtype=torch.int32)
        varlen = logits(moved, packed_tokens, use_cache=False, cu_seq_lens_q=cu, cu_seq_lens_k=cu,
                        position_ids=positions_of([50, 39]))  # fmt: skip
    for layer, indices in replayed.items():
        assert torch.equal(indices[0, :49], rows[0][layer].indices)
        assert torch.equal(indices[1, 11:49], rows[1][layer].indices)
    assert any((own[layer] != replayed[layer])[:, 12:49].any() for layer in own)
    assert_close(packed, torch.cat([out[0], out[1, 11:]])[None], CLOSE)
    assert_close(varlen, packed, CLOSE)


def test_replay_of_what_it_would_choose_changes_nothing(llama):
    tokens = random_tokens(2, 45)
    record, expected = recorded(llama, tokens)
    grads = gradient(llama, tokens)
    with replay_routings(llama, routing_rows(record)):
        assert torch.equal(logits(llama, tokens, use_cache=False), expected)
        assert torch.equal(gradient(llama, tokens), grads)
        llama.gradient_checkpointing_enable()
        llama.train()
        assert torch.equal(gradient(llama, tokens), grads)
    assert not torch.equal(logits(llama.eval(), tokens.flip(1), use_cache=False), expected)


def test_rows_that_do_not_fit(llama, tmp_path):
    tokens = random_tokens(2, 40)
    record, _ = recorded(llama, tokens)
    rows = routing_rows(record)

    def refused(rows, match, tokens=tokens, **inputs):
        with replay_routings(llama, rows), pytest.raises(ValueError, match=match):
            logits(llama, tokens, **inputs)

    refused(rows[:1], "rows must be as many as the batch has sequences, got 1 for 2")
    refused(rows, r"rows\[0\] routes 40 tokens, and the batch's sequence has 38", tokens[:, :38])
    refused(rows, r"rows\[0\] routes 40 tokens, and the batch's sequence has 42", random_tokens(2, 42))
    refused([{0: row[0]} for row in rows], "rows have no routing for layer 1, which is MoBA's: they have \\[0\\]")
    register_moba(MoBAConfig(4, 3))
    refused(rows, "routing was made with block_size=8, got block_size=4")
    register_moba(MoBAConfig(8, 3))
    cache = MoBACache(llama.config)
    logits(llama, tokens[:, :20], past_key_values=cache)
    refused(rows, "20 queries came with 40 keys", tokens[:, 20:], past_key_values=cache)
    with pytest.raises(ValueError, match="rows must have routings of the same layers"):
        replay_routings(llama, [rows[0], {}]).__enter__()
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, at least T\] = \(2, 40\), got \(2, 39\)"):
        routing_rows(record, torch.ones(2, 39))
    holes = torch.ones(2, 40).index_fill(1, torch.tensor([5]), 0)
    with pytest.raises(ValueError, match="in one run"):
        routing_rows(record, holes)
    record[0].append(record[0][0])
    with pytest.raises(ValueError, match=r"the same tokens for every layer, got .*decode='full'"):
        routing_rows(record)
    with pytest.raises(ValueError, match="one block size"):
        save_routings(tmp_path / "x.npz", [rows[0], {layer: Routing(r.indices, 4) for layer, r in rows[1].items()}])
    torch.save({}, tmp_path / "y.npz")
    with pytest.raises(ValueError, match="no saved routings"):
        load_routings(tmp_path / "y.npz")


def test_the_page_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "ecosystem.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    assert names["loss"].isfinite()
