"""MoBACache: room, memory, devices, compiled steps, refusals."""

from __future__ import annotations

import itertools
import logging
import threading

import pytest
import torch
from all_decoders import tiny_decoder
from helpers import LargestNewTensor, assert_close
from test_cache import CLOSE, PROMPT, SPARSE, generate, read, use
from test_cache import _registered as _registered
from test_cache import llama as llama
from test_cache import model as model
from test_cache import new_cache as new_cache
from tiny_models import random_tokens, tiny_model
from transformers import MistralConfig, StaticCache

from moba import MoBAConfig, register_moba
from moba.block_means import Phase
from moba.hf import attention as hf_attention
from moba.hf.cache import GROWTH, LEAST_GROWTH, MoBACache, MoBADynamicLayer
from moba.hf.hand_over import give, take


def test_offloaded_layers_come_back(llama):
    cache = MoBACache(llama.config)
    tokens = random_tokens(1, PROMPT)
    read(llama, tokens[:, :30], cache)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    actual = read(llama, tokens[:, 30:], cache)
    with torch.no_grad():
        assert_close(actual, llama(tokens, use_cache=False).logits[:, 30:], CLOSE)


@pytest.mark.parametrize("length", [None, 4096], ids=["dynamic", "static"])
def test_appending_neither_copies_nor_allocates_the_context(llama, length):
    """But for the quarter of room that a dynamic cache adds when it is full."""
    layer = MoBACache(llama.config, max_cache_len=length).layers[0]
    states = torch.randn(1, 2, 1, 8)
    layer.update(states.expand(-1, -1, 2000, -1), states.expand(-1, -1, 2000, -1))
    address, count = layer.keys.data_ptr(), 0
    with LargestNewTensor() as made:
        for _ in range(LEAST_GROWTH - 1):
            layer.update(states, states)
            count += 1
    assert layer.keys.data_ptr() == address
    assert made.num_elements <= states.numel()
    assert int(layer.get_seq_length()) == 2000 + count


def test_room_grows_by_a_part_of_the_whole(llama):
    layer = MoBACache(llama.config).layers[0]
    states = torch.randn(1, 2, 1, 8)
    expected, rooms = [], set()
    for i in range(3000):
        layer.update(states + i, states - i)
        expected.append(states + i)
        rooms.add(layer.keys.untyped_storage().nbytes() // (2 * 8 * 4))
    rooms = sorted(rooms)
    assert all(b >= a + LEAST_GROWTH or b >= a * (1 + GROWTH) for a, b in itertools.pairwise(rooms))
    assert rooms[-1] <= 3000 * (1 + GROWTH) + LEAST_GROWTH
    assert torch.equal(layer.keys, torch.cat(expected, dim=2))


def test_memory_of_the_means(model, new_cache):
    cache = new_cache(model)
    generate(model, random_tokens(2, PROMPT), past_key_values=cache)
    for layer in cache.layers:
        keys = layer.keys.untyped_storage().nbytes()
        assert layer.block_means.means.untyped_storage().nbytes() <= keys / SPARSE["block_size"]


def test_inference_mode_and_no_grad_may_alternate(model, new_cache):
    tokens = random_tokens(1, PROMPT)
    cache = new_cache(model)
    with torch.inference_mode():
        model.set_attn_implementation("moba")
        model(tokens[:, :30], past_key_values=cache)
    actual = read(model, tokens[:, 30:], cache)
    with torch.no_grad():
        assert_close(actual, model(tokens, use_cache=False).logits[:, 30:], CLOSE)


def test_a_growing_cache_serves_inference_only(llama):
    with pytest.raises(ValueError, match="inference only: call the model under torch"):
        use(llama)(random_tokens(1, 5), past_key_values=MoBACache(llama.config))


def test_advice_without_a_cache_of_means(llama, monkeypatch, caplog):
    monkeypatch.setattr(hf_attention, "_has_advised", False)
    with caplog.at_level(logging.WARNING, logger="moba"):
        generate(llama, random_tokens(1, PROMPT), past_key_values=MoBACache(llama.config))
        assert not caplog.records
        generate(llama, random_tokens(1, PROMPT))
        generate(llama, random_tokens(1, PROMPT), past_key_values=StaticCache(llama.config, max_cache_len=80))
    assert len(caplog.records) == 1
    assert "past_key_values=moba.hf.cache.MoBACache(model.config)" in caplog.text


def test_keys_that_a_layer_changes_lose_the_means_and_nothing_else(caplog):
    """Latent keys lie in the cache; the layer attends with projections of them."""
    register_moba(MoBAConfig(**{**SPARSE, "decode": "full"}))
    model = tiny_decoder("DeepseekV3ForCausalLM", "moba").double()
    tokens = random_tokens(2, PROMPT)
    cache = MoBACache(model.config)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    with cache.reading(), caplog.at_level(logging.WARNING, logger="moba"):
        # Inside, a chunk of one token is no step of decoding.
        assert_close(read(model, tokens, cache, [44, 1]), expected, CLOSE)
    assert [record.getMessage()[:70] for record in caplog.records] == [
        "DeepseekV3Attention attends with other keys than its MoBACache holds, "
    ]


@pytest.mark.parametrize("kind", ["thread", "layer"])
def test_what_others_were_given_is_not_lost(llama, kind):
    layer, module = MoBADynamicLayer(0 if kind == "thread" else 1, Phase()), llama.model.layers[0].self_attn
    keys = give(torch.zeros(1, 2, 3, 4), layer)
    found = []
    look = threading.Thread(target=lambda: found.append(take(module, keys.clone())))
    if kind == "thread":
        look.start()
        look.join()
        assert [take(module, keys.clone()) for _ in range(2)] == [(layer, False), (None, False)]
    else:
        look.run()
    assert found == [(None, False)]
    assert take(module, keys) == (layer, True)


def compiled_steps(model, tokens, cache, **options):
    """Logits of one token after another after the first 30, compiled, and how often a graph was made for them."""
    graphs = []

    def compile_eagerly(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    read(model, tokens[:, :30], cache)
    step = torch.compile(model.forward, backend=compile_eagerly, **options)
    steps, counts = [], []
    with torch.no_grad():
        for i in range(30, tokens.shape[1]):
            position = torch.full((2, 1), i)
            steps.append(step(input_ids=tokens[:, i : i + 1], past_key_values=cache, position_ids=position).logits)
            counts.append(len(graphs))
    torch.compiler.reset()
    return torch.cat(steps, dim=1), counts


def test_compiled_steps_of_a_static_cache_are_traced_once(llama):
    register_moba(MoBAConfig(**SPARSE, full_layers=1))
    tokens = random_tokens(2, PROMPT)
    actual, counts = compiled_steps(llama, tokens, MoBACache(llama.config, max_cache_len=64))
    with torch.no_grad():
        assert_close(actual, llama(tokens, use_cache=False).logits[:, 30:], CLOSE)
    assert counts[1] == counts[-1]


def test_a_static_cache_does_not_break_the_graph(llama, monkeypatch):
    """With the operators replaced by something that torch.compile can trace, a step is one graph."""

    def attention(q, k, v, *, block_means, key_end, **options):
        assert block_means.shape == (2, 64 // 8, 2, 8)
        return q + k.sum(dim=1, keepdim=True)[:, :, :1] + block_means.sum() + key_end.sum()

    def append(means, k, *, num_new, key_end, **options):
        means.copy_((num_new * key_end[0]).expand_as(means))

    monkeypatch.setattr("moba.hf.attention.moba_attention", attention)
    monkeypatch.setattr("moba.block_means.append_block_means", append)
    tokens = random_tokens(2, PROMPT)
    actual, counts = compiled_steps(llama, tokens, MoBACache(llama.config, max_cache_len=64), fullgraph=True)
    assert set(counts) == {1}
    cache = MoBACache(llama.config, max_cache_len=64)
    assert_close(actual, read(llama, tokens, cache, [30] + [1] * 15)[:, 30:], CLOSE)


def test_refusals(llama, tmp_path):
    with pytest.raises(ValueError, match="config must be a transformers model's config, got LlamaForCausalLM"):
        MoBACache(llama)
    with pytest.raises(ValueError, match="max_cache_len must be an integer >= 1, got 0"):
        MoBACache(llama.config, max_cache_len=0)
    full = MoBACache(llama.config, max_cache_len=16)
    read(llama, random_tokens(1, 12), full)
    with pytest.raises(
        ValueError, match="max_cache_len=16 tokens, so 5 cannot follow the 12 it holds: make it with a l"
    ):
        read(llama, random_tokens(1, 5), full)
    assert full.get_seq_length() == 12
    read(llama, random_tokens(1, 4), full)
    if not torch.accelerator.is_available():
        with pytest.raises(ValueError, match=r"offloading=True .* there is no GPU here"):
            MoBACache(llama.config, offloading=True)
    with pytest.raises(ValueError, match="tokens_to_remove must be negative or 0, got 3"):
        MoBACache(llama.config, max_cache_len=8).crop(3)
    (tmp_path / "text").write_text("no cache")
    with pytest.raises(ValueError, match="text is not a saved MoBACache"):
        MoBACache.load(tmp_path / "text", llama.config)
    with pytest.raises(OSError, match="none"):
        MoBACache.load(tmp_path / "none", llama.config)
    cache = MoBACache(llama.config)
    read(llama, random_tokens(1, 9), cache)
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="holds a cache of 3 layers, the model has 2"):
        MoBACache.load(tmp_path / "cache", tiny_model(num_hidden_layers=2).config)
    with pytest.raises(ValueError, match=r"max_cache_len must be at least the 9 tokens in .*, got 8"):
        MoBACache.load(tmp_path / "cache", llama.config, max_cache_len=8)
    with pytest.raises(ValueError, match=r"the cache holds \(1, .* so \(2, .* cannot be appended"):
        read(llama, random_tokens(2, 9), MoBACache.load(tmp_path / "cache", llama.config))
    torch.save({"moba_cache": 1, "layers": []}, tmp_path / "other")
    with pytest.raises(ValueError, match="other is not a saved MoBACache"):
        MoBACache.load(tmp_path / "other", llama.config)
    sliding = MistralConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=4, sliding_window=8)
    with pytest.raises(ValueError, match="a cache with a DynamicSlidingWindowLayer cannot be saved"):
        MoBACache(sliding).save(tmp_path / "sliding")
    assert not (tmp_path / "sliding").exists()
