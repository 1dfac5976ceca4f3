"""Steps of decoding in a fixed room: what DecodeGraph records, on a CPU; on a GPU the graph and the compiled model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moba import MoBAConfig
from moba.hf import register_moba, set_moba_config
from moba.hf.cache import MoBACache
from moba.hf.graph import DecodeGraph, cache_name, with_room

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def tiny(device, decode="moba", attention="moba", dtype=torch.float32):
    torch.manual_seed(0)
    register_moba(None)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, max_position_embeddings=4096, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device, dtype).eval()
    set_moba_config(model, MoBAConfig(block_size=16, topk=3, decode=decode, full_layers=(1,)))
    model.set_attn_implementation(attention)
    return model


@torch.inference_mode()
def read(model, ids):
    cache = MoBACache(model.config)
    return model(ids, **{cache_name(model): cache}).logits[:, -1], cache


@torch.inference_mode()
def decode(model, logits, cache, num_tokens, step=None):
    """Greedy tokens [B, num_tokens], by a step or by the model."""
    tokens = []
    for _ in range(num_tokens):
        tokens.append(logits.argmax(-1, keepdim=True))
        logits = step(tokens[-1]) if step else model(tokens[-1], **{cache_name(model): cache}).logits[:, -1]
    return torch.cat(tokens, dim=1)


@pytest.mark.parametrize("decode_rule", ["moba", "full"])
def test_a_cache_that_grew_is_moved_into_a_fixed_room(decode_rule):
    model = tiny("cpu", decode_rule)
    ids = torch.randint(1, 97, (2, 75))
    expected = decode(model, *read(model, ids), 40)
    logits, cache = read(model, ids)
    room = with_room(cache, model, 40)
    assert cache.get_seq_length() == 0, "both hold the keys"
    assert with_room(room, model, 40) is room
    assert torch.equal(decode(model, logits, room, 40), expected)


def test_what_cannot_be_recorded_is_refused():
    model = tiny("cpu")
    _, cache = read(model, torch.randint(97, (1, 20)))
    with pytest.raises(ValueError, match="needs a model on a GPU, got one on cpu"):
        DecodeGraph(model, cache, 5)
    with pytest.raises(ValueError, match="MoBADynamicLayer cannot be recorded"):
        with_room(MoBACache(model.config), model, 5)
    with pytest.raises(ValueError, match="max_new_tokens must be an integer >= 1, got 0"):
        DecodeGraph(model, cache, 0)


@on_gpu
@pytest.mark.parametrize(("decode_rule", "attention"), [("moba", "moba"), ("full", "moba"), ("full", "sdpa")])
def test_recorded_steps_make_the_models_tokens(decode_rule, attention):
    model = tiny("cuda", decode_rule, attention)
    ids = torch.randint(1, 97, (2, 75), device="cuda")
    expected = decode(model, *read(model, ids), 60)
    logits, cache = read(model, ids)
    step = DecodeGraph(model, cache, 60)
    assert torch.equal(decode(model, logits, None, 60, step), expected)
    with pytest.raises(ValueError, match="no room for another token"):
        step(expected[:, :1])


@on_gpu
def test_generate_compiles_the_model_over_a_cache_of_fixed_size(monkeypatch):
    model = tiny("cuda")
    torch._dynamo.reset()
    ids = torch.randint(1, 97, (2, 75), device="cuda")
    options = {"max_new_tokens": 60, "min_new_tokens": 60, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, disable_compile=True, past_key_values=MoBACache(model.config), **options)
    skipped = []
    from torch._inductor import cudagraph_utils

    monkeypatch.setattr(cudagraph_utils, "log_cudagraph_skip_and_bump_counter", skipped.append)
    actual = model.generate(ids, past_key_values=MoBACache(model.config, max_cache_len=160), **options)
    assert hasattr(model, "_compiled_call"), "generate did not compile the model"
    assert torch.equal(actual, expected)
    assert not skipped, f"no CUDA graph: {skipped}"
