"""Hybrid models: layers that read a window or a chunk attend as their model defines it, and MoBA serves the others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from all_decoders import tiny_decoder
from helpers import LargestNewTensor, assert_close
from tiny_models import gradients_of, logits, positions_of, random_tokens, read_in_parts
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, StaticLayer

from moba import MoBAConfig, register_moba
from moba.hf.cache import MoBACache
from moba.hf.layout import PackedRows, PaddedRows
from moba.hf.local import attend_locally
from moba.hf.record import record_routings
from moba.parallel.models import _check_call

# A text is read in three runs of queries.
WIDTH, LENGTH = 16, 600
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WIDTH}
HYBRIDS = {
    "Cohere2": SLIDING,
    "Gemma2": {**SLIDING, "attn_logit_softcapping": 2.0},
    "Gemma3": SLIDING,
    "GptOss": SLIDING,
    "Llama4": {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": WIDTH},
    "Ministral": SLIDING,
    "Olmo3": SLIDING,
    "Qwen2": {**SLIDING, "use_sliding_window": True, "max_window_layers": 1},
    "Qwen3": {**SLIDING, "use_sliding_window": True},
}
# fp32 logits of up to about ten through two layers of random weights.
CLOSE = 1e-4


@pytest.fixture(autouse=True)
def _all_blocks():
    register_moba(MoBAConfig(8, LENGTH // 8, backend="pytorch", decode="moba"))


@pytest.fixture(scope="module", params=HYBRIDS)
def model(request):
    return tiny_decoder(f"{request.param}ForCausalLM", **HYBRIDS[request.param])


def padded(length):
    """A mask of two rows, each padded on the left, and the positions."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :3] = mask[1, :21] = 0
    return mask, (mask.cumsum(1) - 1).clamp(min=0)


def test_all_blocks_are_the_models_own_attention(model):
    tokens = random_tokens(2, LENGTH)
    assert_close(logits(model, tokens), logits(model, tokens, "eager"), CLOSE)
    mask, positions = padded(LENGTH)
    inputs = {"attention_mask": mask, "position_ids": positions}
    ours, theirs = (logits(model, tokens, name, **inputs)[mask.bool()] for name in ("moba", "eager"))
    assert_close(ours, theirs, CLOSE)


def test_packed_sequences(model):
    tokens = random_tokens(1, 90)
    lengths = [40, 5, 45]
    alone = torch.cat([logits(model, part) for part in tokens.split(lengths, dim=1)], dim=1)
    packed = {"position_ids": positions_of(lengths), "use_cache": False}
    if "GptOss" in type(model).__name__:  # makes its masks without looking at the positions
        with pytest.raises(ValueError, match="position_ids must ascend"):
            logits(model, tokens, **packed)
    else:
        # As the model tells them apart: transformers 5.17 counts the chunks of packed sequences from the row's start.
        assert_close(logits(model, tokens, **packed), logits(model, tokens, "eager", **packed), CLOSE)
    cu = torch.tensor([0, 40, 45, 90], dtype=torch.int32)
    assert_close(logits(model, tokens, **packed, cu_seq_lens_q=cu, cu_seq_lens_k=cu, seq_idx=cu), alone, CLOSE)


ROOM = {"max_cache_len": 80}


@pytest.mark.parametrize(
    ("make", "room"), [(DynamicCache, {}), (StaticCache, ROOM), (MoBACache, {}), (MoBACache, ROOM)]
)
def test_a_cache_has_the_models_own_layers_for_them(model, make, room):
    tokens, (mask, positions) = random_tokens(2, 60), padded(60)
    cache = make(config=model.config, **room)
    inputs = {"attention_mask": mask, "position_ids": positions}
    # Up to the window's edge, over it, by single tokens, and by a chunk once it is full.
    actual = read_in_parts(model, tokens, [7, 30, 1, 1, 20, 1], cache, **inputs)
    assert_close(actual[mask.bool()], logits(model, tokens, "eager", **inputs)[mask.bool()], CLOSE)


def test_generation(model):
    tokens, (mask, _) = random_tokens(2, 40), padded(40)
    texts = []
    for name in ("eager", "moba"):
        model.set_attn_implementation(name)
        texts.append(model.generate(tokens, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False))
    assert torch.equal(*texts)


def test_gradients(model):
    tokens = random_tokens(1, LENGTH)
    assert_close(gradients_of(model, tokens, "moba"), gradients_of(model, tokens, "eager"), CLOSE)


def test_moba_serves_the_layers_that_read_everything(model):
    tokens = random_tokens(1, 80)
    expected = logits(model, tokens)
    register_moba(MoBAConfig(8, 2, backend="pytorch"))
    model.set_attn_implementation("moba")
    with record_routings(model) as record, torch.no_grad():
        sparse = model(tokens, use_cache=False).logits
    assert list(record) == [1]
    assert (sparse - expected).abs().max() > 1e-3
    assert_close(sparse, logits(model, tokens, "moba_naive"), CLOSE)


@pytest.mark.parametrize("decode", ["full", "moba"])
@pytest.mark.parametrize("family", ["Gemma2", "GptOss"])
def test_full_layers_have_sinks_and_softcap(family, decode):
    """Those that the config keeps full, and the steps that are: plain and padded."""
    model, tokens = tiny_decoder(f"{family}ForCausalLM", **HYBRIDS[family]), random_tokens(2, 60)
    register_moba(MoBAConfig(8, 2, full_layers=2 if decode == "moba" else 0, backend="pytorch", decode=decode))
    mask, positions = padded(60)
    inputs = {"attention_mask": mask, "position_ids": positions}
    expected = logits(model, tokens, "eager", **inputs)
    if decode == "moba":
        assert_close(logits(model, tokens, **inputs)[mask.bool()], expected[mask.bool()], CLOSE)
        assert_close(logits(model, tokens), logits(model, tokens, "eager"), CLOSE)
        return
    for given, parts in ((inputs, expected), ({}, logits(model, tokens, "eager"))):
        cache = DynamicCache(config=model.config)
        before = {name: x[:, :59] for name, x in given.items()}
        logits(model, tokens[:, :59], "eager", past_key_values=cache, **before)
        last = {**given, "position_ids": positions[:, 59:]} if given else {}
        assert_close(logits(model, tokens[:, 59:], past_key_values=cache, **last), parts[:, 59:], CLOSE)


def test_compile():
    model, tokens = tiny_decoder("Gemma3ForCausalLM", "moba", **SLIDING), random_tokens(1, 40)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")(tokens, use_cache=False).logits
    assert_close(compiled, logits(model, tokens, "eager"), CLOSE)


LAYER = SimpleNamespace(
    config=SimpleNamespace(sliding_window=WIDTH, attention_chunk_size=WIDTH), num_key_value_groups=2
)


def by_formula(q, k, v, visible, sinks, softcap):
    """Attention over the keys [S] that each query [T] sees, in fp64, everything in one matrix."""
    k, v = (x.double().repeat_interleave(2, dim=1) for x in (k, v))
    scores = 0.3 * q.double() @ k.mT
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None], -torch.inf).exp()
    total = scores.sum(dim=3, keepdim=True)
    total = total if sinks is None else total + sinks.double().exp()[:, None, None]
    return (scores / total.clamp(min=1e-300) @ v).transpose(1, 2)


@pytest.mark.parametrize("local", ["sliding", "chunked"])
@pytest.mark.parametrize(("has_sinks", "softcap"), [(False, None), (True, None), (False, 2.0), (True, 2.0)])
def test_sinks_and_softcap_as_the_formula_has_them(local, has_sinks, softcap):
    q = torch.randn(2, 4, LENGTH, 8, requires_grad=True)
    k, v = (torch.randn(2, 2, LENGTH, dim, requires_grad=True) for dim in (8, 8))
    sinks = torch.randn(4, requires_grad=True) if has_sinks else None
    start, end = torch.tensor([5, -3], dtype=torch.int32), torch.tensor([LENGTH, LENGTH - 9], dtype=torch.int32)
    rows = PaddedRows(start, end, torch.full_like(end, LENGTH), local)
    query, key, begin = torch.arange(LENGTH)[:, None], torch.arange(LENGTH), start[:, None, None]
    near = key > query - WIDTH if local == "sliding" else (key - begin) // WIDTH == (query - begin) // WIDTH
    visible = (key <= query) & (key >= begin) & (key < end[:, None, None]) & near
    out = attend_locally(LAYER, q, k, v, rows, 0.3, sinks=sinks, softcap=softcap)
    expected = by_formula(q, k, v, visible, sinks, softcap)
    assert_close(out, expected, 2e-5)
    leaves = [x for x in (q, k, v, sinks) if x is not None]
    upstream = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream.double()),
        strict=True,
    ):
        assert_close(ours, theirs, 1e-4)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_no_mask_of_all_queries_and_keys(softcap):
    length = 4096
    q, k = torch.randn(1, 2, length, 8), torch.randn(1, 1, length, 8)
    rows = PackedRows(torch.tensor([[0, 1000, length]], dtype=torch.int32), "sliding")
    with LargestNewTensor() as largest:
        attend_locally(LAYER, q, k, k, rows, None, softcap=softcap)
    assert largest.num_elements < length * length / 16


def test_what_cannot_be_told_is_refused():
    tokens = random_tokens(1, 40)
    model = tiny_decoder("Gemma3ForCausalLM", **SLIDING)
    cache = Cache(layers=[StaticLayer(max_cache_len=64) for _ in range(2)])
    with pytest.raises(ValueError, match="a static cache gives this model's sliding or chunked layers more keys"):
        logits(model, tokens, past_key_values=cache)
    model.config.attention_chunk_size = WIDTH
    with pytest.raises(
        ValueError, match="sliding_window: this model makes a mask for a window or chunk that its config"
    ):
        logits(model, tokens, use_cache=False)
    kinds = ["sliding_attention"] * 2
    for family, field, changes in (
        ("Mistral", "sliding_window=16", {"sliding_window": 16}),
        ("Gemma3", r"layer_types=\['sliding_attention', 'sliding_attention'\]", {"layer_types": kinds}),
    ):
        model = tiny_decoder(f"{family}ForCausalLM", **changes)
        with pytest.raises(ValueError, match=rf"^{family}ForCausalLM reads a window or chunk .*\(config\.{field}"):
            model.set_attn_implementation("moba")


def test_windows_do_not_run_across_ranks():
    rows = PaddedRows(*torch.tensor([[0], [40], [40]], dtype=torch.int32), "sliding")
    q = torch.zeros(1, 40, 2, 8)
    with pytest.raises(ValueError, match="sliding_window: layers that read a window or chunk cannot run across ranks"):
        _check_call(q, q, rows.encode(), torch.tensor([0, 40]), "mean")


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "FalconMamba", "xLSTM"])
def test_a_model_without_attention_is_refused(name):
    with pytest.raises(ValueError, match=rf"^{name}ForCausalLM has no attention layers"):
        tiny_decoder(f"{name}ForCausalLM", "moba")
    model = tiny_decoder(f"{name}ForCausalLM")
    with pytest.raises(ValueError, match=rf"^{name}ForCausalLM has no attention layers"):
        model.set_attn_implementation("moba_naive")
