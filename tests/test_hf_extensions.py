"""Queries and keys to route by, and parts, that other code adds to a model's attention modules."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import logits, random_tokens, tiny_model

from moba import MoBAConfig, moba_attention, register_moba
from moba.hf import provide_route_by, set_moba_config
from moba.hf.record import record_routings

CONFIG = MoBAConfig(4, 3, router="unrotated")


@pytest.fixture(autouse=True)
def registered():
    register_moba(CONFIG)


def reversed_heads(module, q, k):
    """To route by: other vectors than those to attend with, of another width."""
    return q.flip(2)[..., :5], k.flip(2)[..., :5]


def test_blocks_are_those_that_the_provided_queries_and_keys_choose():
    model, tokens, seen = tiny_model(), random_tokens(2, 40), []

    def provider(module, q, k):
        seen.append((q, k))
        return reversed_heads(module, q, k)

    for layer in model.model.layers:
        provide_route_by(layer.self_attn, "unrotated", provider)
    set_moba_config(model, CONFIG)
    model.set_attn_implementation("moba")
    with record_routings(model) as record, torch.no_grad():
        model(tokens, use_cache=False)
        actual = copy.deepcopy(record)
        set_moba_config(model, MoBAConfig(4, 3))
        model(tokens, use_cache=False)
    assert len(seen) == len(model.model.layers), "only the calls under the router's name ask"
    for layer, (q, k) in enumerate(seen):
        by_q, by_k = reversed_heads(None, q, k)
        expected = moba_attention(by_q, by_k, by_k, block_size=4, topk=3, return_routing=True)[1].indices
        assert torch.equal(actual[layer][0].indices, expected)
    assert not torch.equal(record[0][1].indices, actual[0][0].indices)


def test_what_nothing_provides_is_refused():
    model, tokens = tiny_model(), random_tokens(1, 20)
    with pytest.raises(ValueError, match="provide_route_by"):
        set_moba_config(model, CONFIG)
    with pytest.raises(ValueError, match=r"LlamaAttention: .*provide_route_by"):
        logits(model, tokens)
    provide_route_by(model.model.layers[0].self_attn, "unrotated", reversed_heads)
    with pytest.raises(ValueError, match="provide_route_by"):
        logits(model, tokens)  # its second layer
    with pytest.raises(ValueError, match="router must be one of 'unrotated', got 'mean'"):
        provide_route_by(model.model.layers[0].self_attn, "mean", reversed_heads)


def test_a_part_that_the_config_asks_for_must_be_there():
    register_moba(MoBAConfig(4, 3))
    model, tokens = tiny_model(), random_tokens(1, 20)
    model.config.moba_key_convolution = 3
    with pytest.raises(ValueError, match="moba_key_convolution=3, but the model's layers have no key_convolution"):
        logits(model, tokens)
    for layer in model.model.layers:
        layer.self_attn.key_convolution = torch.nn.Identity()
    logits(model, tokens)
