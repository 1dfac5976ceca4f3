"""Statistics of a routing against attention weights that transformers computes itself."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_tokens, tiny_model

from moba import MoBAConfig, register_moba
from moba.hf import set_moba_config
from moba.hf.record import record_routings
from moba_lab.evals.routing import averages, block_mass, choice_masses, routing_quality

BLOCK, TOPK, LENGTH = 8, 3, 90


@pytest.fixture(scope="module")
def model():
    register_moba(None)
    model = tiny_model()
    set_moba_config(model, MoBAConfig(BLOCK, TOPK))
    model.set_attn_implementation("moba")
    return model


@pytest.fixture(scope="module")
def tokens():
    return random_tokens(1, LENGTH)[0]


def expected_of_first_layer(model, tokens):
    """Mass by block [T, H, N] and the blocks attended to [T, H, N] of layer 0, whose input no attention has changed."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(tokens[None], output_attentions=True).attentions[0][0]  # [H, T, S]
    model.set_attn_implementation("moba")
    num_blocks = -(-LENGTH // BLOCK)
    padded = torch.nn.functional.pad(weights, (0, num_blocks * BLOCK - LENGTH))
    with record_routings(model) as record, torch.no_grad():
        model(tokens[None])
    mass = padded.unflatten(-1, (num_blocks, BLOCK)).sum(dim=-1).transpose(0, 1)
    return mass, record.joined()[0].block_mask(num_blocks)[0]


@pytest.mark.parametrize("chunk_tokens", [1024, 7])
def test_masses_are_those_of_the_attention_weights(model, tokens, chunk_tokens):
    mass, mask = expected_of_first_layer(model, tokens)
    needle, num_question = (20, 27), 5
    records = routing_quality(
        model, tokens, needle=needle, num_question=num_question, num_queries=LENGTH, chunk_tokens=chunk_tokens
    )
    assert [(r["layer"], r["head"]) for r in records] == [(i, h) for i in range(3) for h in range(4)]
    free = slice(TOPK * BLOCK, None)
    for head in range(4):
        record = records[head]
        assert record["num_queries"] == LENGTH - TOPK * BLOCK
        assert record["covered"] == pytest.approx((mass * mask)[free, head].sum(dim=-1).mean().item(), abs=1e-5)
        best = [_best(mass[t, head], t // BLOCK) for t in range(TOPK * BLOCK, LENGTH)]
        assert record["best"] == pytest.approx(sum(best) / len(best), abs=1e-5)
        assert record["covered"] <= record["best"] + 1e-6
        asked = mask[-num_question:, head]
        assert record["needle_chosen"] == pytest.approx((asked[:, 2] & asked[:, 3]).float().mean().item())
        assert record["needle_mass"] == pytest.approx(
            mass[-num_question:, head, 2:4].sum(dim=-1).mean().item(), abs=1e-5
        )
    means = averages(records)
    assert means["covered"] == pytest.approx(sum(r["covered"] for r in records) / 12)


def _best(mass, own):
    past = sorted(mass[:own].tolist(), reverse=True)[: TOPK - 1]
    return sum(past) + mass[own].item()


def test_sampled_queries_without_a_needle(model, tokens):
    records = routing_quality(model, tokens, num_queries=9)
    assert {r["num_queries"] for r in records} == {len([t for t in range(9, LENGTH, 10) if t >= TOPK * BLOCK])}
    assert "needle_chosen" not in records[0]


def test_choices_of_known_masses():
    mass = torch.tensor([[[0.1, 0.4, 0.05, 0.15, 0.3]]])
    indices, own = torch.tensor([[[2, 4, -1]]]), torch.tensor([4])
    values = {name: value.item() for name, value in choice_masses(mass, indices, own, 3).items()}
    assert values == pytest.approx({"covered": 0.35, "best": 0.85, "recent": 0.55})
    values = {name: value.item() for name, value in choice_masses(mass, torch.tensor([[[4]]]), own, 1).items()}
    assert values == pytest.approx({"covered": 0.3, "best": 0.3, "recent": 0.3})


def test_block_masses_sum_to_one_and_see_no_future():
    q, k = torch.randn(3, 4, 8), torch.randn(20, 2, 8)
    mass = block_mass(q, k, torch.tensor([3, 9, 19]), 5, 0.3)
    assert mass.shape == (3, 4, 4)
    assert torch.allclose(mass.sum(dim=-1), torch.ones(3, 4))
    assert (mass[0, :, 1:] == 0).all()
    assert (mass[1, :, 2:] == 0).all()


def test_what_cannot_be_measured_is_refused(model, tokens):
    with pytest.raises(ValueError, match="no query a choice"):
        routing_quality(model, tokens[: TOPK * BLOCK])
    with pytest.raises(ValueError, match="tokens must be"):
        routing_quality(model, tokens[None])
    model.set_attn_implementation("sdpa")
    try:
        with pytest.raises(ValueError, match="attention must be 'moba'"):
            routing_quality(model, tokens)
    finally:
        model.set_attn_implementation("moba")
