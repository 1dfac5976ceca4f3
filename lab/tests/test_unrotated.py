"""router="unrotated": queries and keys from before the rotary embedding choose the blocks, whatever the cache."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import logits, positions_of, random_tokens, tiny_model
from transformers import DynamicCache, GenerationConfig, StaticCache

from moba import MoBAConfig, moba_attention, register_moba
from moba.hf import enable_paged
from moba.hf.cache import MoBACache
from moba.hf.record import record_routings
from moba_lab.models.key_convolution import add_key_convolution
from moba_lab.models.unrotated import apply_config, watch_projections

CONFIG = MoBAConfig(4, 3, decode="moba", router="unrotated")


@pytest.fixture(autouse=True)
def registered():
    register_moba(None)


def unrotated_model(family="Llama", **changes):
    """In fp64, as in test_hf_generate.py."""
    model = tiny_model(family, **changes).double()
    apply_config(model, CONFIG)
    model.set_attn_implementation("moba")
    return model


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Olmo2", "SmolLM3"])
def test_blocks_are_those_that_unrotated_queries_and_keys_choose(family):
    model, tokens = unrotated_model(family), random_tokens(2, 40)
    inputs = []
    layer = model.model.layers[0].self_attn
    layer.register_forward_pre_hook(
        lambda module, args, options: inputs.append(options["hidden_states"]), with_kwargs=True
    )
    with record_routings(model) as record, torch.no_grad():
        model(tokens, use_cache=False)
    q, k = layer.q_proj(inputs[0]), layer.k_proj(inputs[0])
    if family == "Olmo2":  # norms of all heads together
        q, k = layer.q_norm(q), layer.k_norm(k)
    q, k = q.view(2, 40, 4, 8), k.view(2, 40, 2, 8)
    if family == "Qwen3":
        q, k = layer.q_norm(q), layer.k_norm(k)
    options = {"block_size": 4, "topk": 3, "return_routing": True}
    expected = moba_attention(q, k, k, **options)[1].indices
    assert torch.equal(record[0][0].indices, expected)
    apply_config(model, MoBAConfig(4, 3))
    with record_routings(model) as rotated, torch.no_grad():
        model(tokens, use_cache=False)
    assert not torch.equal(rotated[0][0].indices, expected)


@pytest.mark.parametrize("family", ["Phi", "StableLm", "Lfm2"])
@pytest.mark.parametrize("length", [4, 40])
def test_norms_by_other_names_and_heads_before_tokens(family, length):
    """`length` equal to the number of heads: a tensor's shape does not tell which is which."""
    changes = {
        "Phi": {"qk_layernorm": True},
        "StableLm": {"qk_layernorm": True},
        "Lfm2": {"layer_types": ["full_attention"] * 3, "block_auto_adjust_ff_dim": False},
    }[family]
    model = tiny_model(family, **changes).double()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.3, 3.0)
    block_size = 1 if length == 4 else 2
    apply_config(model, MoBAConfig(block_size, 2, router="unrotated"))
    model.set_attn_implementation("moba")
    layer, inputs = model.model.layers[0].self_attn, []
    layer.register_forward_pre_hook(
        lambda module, args, options: inputs.append(
            options["hidden_states"] if "hidden_states" in options else args[0]
        ),
        with_kwargs=True,
    )
    with record_routings(model) as record, torch.no_grad():
        model(random_tokens(2, length), use_cache=False)
    with torch.no_grad():
        by_head = [
            norm(projection(inputs[0]).view(2, length, heads, 8).transpose(1, 2)).transpose(1, 2)
            for projection, norm, heads in (
                (layer.q_proj, layer.q_layernorm, 4),
                (layer.k_proj, layer.k_layernorm, 2),
            )
        ]
    expected = moba_attention(by_head[0], by_head[1], by_head[1], block_size=block_size, topk=2, return_routing=True)[1]
    assert torch.equal(record[0][0].indices, expected.indices)


@pytest.mark.parametrize(("family", "named"), [("NanoChat", "q_norm"), ("HunYuanDenseV1", "query_layernorm")])
def test_norms_behind_the_rotary_embedding_are_refused(family, named):
    with pytest.raises(ValueError, match=f'router="unrotated".*{named}'):
        logits(unrotated_model(family), random_tokens(1, 20))


@pytest.mark.parametrize("kind", ["dynamic", "static", "MoBA", "MoBA static"])
@pytest.mark.parametrize("convolved", [False, True], ids=["", "convolved"])
def test_decoding_is_prefill(kind, convolved):
    model = unrotated_model()
    if convolved:
        add_key_convolution(model, 3)
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.key_convolution.weight)
    tokens = random_tokens(2, 40)
    expected = logits(model, tokens)
    cache = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=48),
        "MoBA": lambda: MoBACache(model.config),
        "MoBA static": lambda: MoBACache(model.config, max_cache_len=48),
    }[kind]()
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        parts = [
            model(tokens[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits
            for start, stop in ((0, 7), (7, 30), *((i, i + 1) for i in range(30, 40)))
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=2e-4, atol=2e-4)


def test_left_padding_and_packing():
    model, tokens = unrotated_model(), random_tokens(1, 40)
    alone = logits(model, tokens[:, 9:])
    mask = (torch.arange(40) >= 9).long()[None]
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = logits(model, tokens, attention_mask=mask, position_ids=position_ids)
    torch.testing.assert_close(padded[:, 9:], alone, rtol=2e-4, atol=2e-4)
    packed = logits(model, tokens, position_ids=positions_of([9, 31]), use_cache=False)
    torch.testing.assert_close(packed[:, 9:], alone, rtol=2e-4, atol=2e-4)
    cu = torch.tensor([0, 9, 40], dtype=torch.int32)
    options = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 31, "max_length_k": 31}
    told = logits(model, tokens, position_ids=positions_of([9, 31]), use_cache=False, **options)
    torch.testing.assert_close(told, packed, rtol=2e-4, atol=2e-4)


def test_beam_search_moves_the_keys():
    model, tokens = unrotated_model(), random_tokens(2, 21)
    options = GenerationConfig(max_new_tokens=8, num_beams=3, do_sample=False, pad_token_id=0)
    with_cache = model.generate(tokens, options, past_key_values=MoBACache(model.config))
    assert torch.equal(with_cache, model.generate(tokens, options, use_cache=False))


def test_copies_and_nothing_held_after_a_call():
    model, tokens = unrotated_model(), random_tokens(1, 20)
    expected = logits(model, tokens)
    assert torch.equal(logits(copy.deepcopy(model), tokens), expected)
    watch_projections(model)
    assert torch.equal(logits(model, tokens), expected)
    projections = model.model.layers[0].self_attn.moba_projections
    assert [projections.q, projections.k, projections.cache_layer] == [None] * 3
    model.train()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.isfinite().all()


def test_refusals():
    with pytest.raises(ValueError, match="q_proj, k_proj"):
        apply_config(tiny_model("Phi3"), CONFIG)
    model, tokens = tiny_model(), random_tokens(1, 20)
    register_moba(CONFIG)
    with pytest.raises(ValueError, match="watch_projections"):
        logits(model, tokens)
    watch_projections(model)
    logits(model, tokens)
    with pytest.raises(ValueError, match="continuous batching"):
        enable_paged(model, CONFIG)
    convolved = tiny_model()
    add_key_convolution(convolved)
    with pytest.raises(ValueError, match="continuous batching"):
        enable_paged(convolved, MoBAConfig(4, 3))
    model.model.layers[0].self_attn.q_proj = copy.deepcopy(tiny_model().model.layers[0].self_attn.q_proj)
    with pytest.raises(ValueError, match="q_proj was replaced"):
        logits(model, tokens)
