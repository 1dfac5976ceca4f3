"""Compiling ahead: what `warmup` asks for, and that there is nothing to do where no kernel is compiled."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model

from moba import MoBAConfig, backends, moba_attention, moba_attention_varlen, warmup
from moba.backends import triton
from moba.backends.triton import ahead, attention, block_scores, decoding, launch, routing, variants
from moba.compilation import _indexer_of, _of_model
from moba.hf import register_moba, set_moba_config
from moba.hf.cache import MoBACache
from moba.hf.indexer import add_indexer

CONFIG = MoBAConfig(block_size=16, topk=3)


def test_a_cpu_compiles_nothing(monkeypatch):
    model = tiny_model("Llama")
    set_moba_config(model, CONFIG)
    assert warmup(model) == 0
    assert warmup(config=CONFIG, heads=4, head_dim=16, device="cpu") == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert warmup(config=CONFIG, heads=4, head_dim=16, device="cuda") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "warmup needs a model, or config, heads and head_dim"),
        ({"config": CONFIG, "heads": 4}, "warmup needs a model, or config, heads and head_dim"),
        ({"config": CONFIG, "heads": 4, "kv_heads": 3, "head_dim": 16}, "kv_heads must divide heads, got 3 and 4"),
        ({"config": CONFIG, "heads": 0, "head_dim": 16}, "heads must be an integer >= 1, got 0"),
        ({"model": torch.nn.Linear(2, 2)}, "Linear has no config with num_attention_heads"),
        ({"max_tokens": 0}, "max_tokens must be an integer >= 1, got 0"),
    ],
)
def test_what_is_missing_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        warmup(**options)


@pytest.fixture
def launched(monkeypatch):
    """What calls would launch on an H100; results stay what memory is filled with: NaN, and the largest integer."""
    variants = set()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(launch.Plan, "run", lambda plan, *tensors, **options: variants.update(plan.variants()))
    monkeypatch.setattr(backends, "resolve", lambda *args, **options: triton)
    for module in (attention, block_scores, decoding, routing):
        monkeypatch.setattr(module, "arch_of", lambda device: 90)
    monkeypatch.setattr(launch, "_plans", {})
    yield variants
    torch.use_deterministic_algorithms(False)


def warmed_up(config, heads, **more):
    options = {"softcap": None, "training": True, "max_tokens": 2048, **more}
    return set(ahead.variants_of(90, torch.bfloat16, config.block_size, config.topk, 1, heads, **options))


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_warming_up_knows_what_calls_launch(launched, rows, heads_first, lse):
    def leaf(heads):
        x = torch.randn(rows, heads, 600, 128, dtype=torch.bfloat16)
        return (x.transpose(1, 2) if heads_first else x.view(rows, 600, heads, 128)).requires_grad_()

    config, (q, k, v) = MoBAConfig(64, 4, keep_first=1), (leaf(4), leaf(2), leaf(2))
    options = {**config.selection, "return_lse": True}
    bounds = {"key_start": torch.zeros(rows, dtype=torch.int32), "key_end": torch.full((rows,), 590, dtype=torch.int32)}
    cu = torch.tensor([0, 300, 600], dtype=torch.int32)
    calls = [moba_attention(q, k, v, **options), moba_attention(q, k, v, **bounds, **options)]
    calls.append(moba_attention_varlen(q[0], k[0], v[0], cu_seqlens=cu, **options))
    for out, row_lse in calls:
        (out.sum() + row_lse.sum() if lse else out.sum()).backward()
    assert {v.kernel.__name__ for v in launched} >= {"_select_kernel", "_delta_kernel", "_dkv_kernel", "_dq_own_kernel"}
    assert launched <= warmed_up(config, (4, 2, 128, 128))


@pytest.mark.parametrize("room", [None, 700])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Phi3"])
def test_warming_up_knows_what_a_model_launches(launched, family, room):
    """Trained and read as it is, and writing with a cache, a row that is padded beside another."""
    register_moba(None)
    model = tiny_model(family, head_dim=128, max_position_embeddings=1024).bfloat16()
    set_moba_config(model, MoBAConfig(64, 4, keep_first=1, decode="moba"))
    model.set_attn_implementation("moba")
    config, *heads, _ = _of_model(model, None)
    tokens, mask = torch.randint(3, 64, (2, 600)), torch.ones(2, 600, dtype=torch.long)
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    for padding in (0, 100):
        mask[1, :padding] = 0
        cache = MoBACache(model.config, max_cache_len=room)
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "disable_compile": True, "do_sample": False}
        model.generate(tokens, attention_mask=mask, past_key_values=cache, **options)
    assert any("append" in v.kernel.__name__ for v in launched)
    assert launched <= warmed_up(config, (*heads, heads[-1]))


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("layout", ["plain", "padded", "packed"])
@pytest.mark.parametrize("training", [False, True])
def test_a_routing_foretells_what_attention_launches(launched, monkeypatch, layout, heads_first, training):
    """So that all kernels of a first call compile at once, and none that it does not need."""
    foretold, later = set(), set()

    def run(plan, *tensors, following=None, **options):
        if any("select" in v.kernel.__name__ for v in plan.variants()):
            foretold.update(following())
        else:
            later.update(plan.variants())

    monkeypatch.setattr(launch.Plan, "run", run)

    def leaf(heads):
        x = torch.randn(1, heads, 600, 64, dtype=torch.bfloat16)
        return (x.transpose(1, 2) if heads_first else x.view(1, 600, heads, 64)).requires_grad_(training)

    q, k, v = leaf(4), leaf(2), leaf(2)
    where = {"key_start": torch.zeros(1, dtype=torch.int32)} if layout == "padded" else {}
    if layout == "packed":
        cu = torch.tensor([0, 300, 600], dtype=torch.int32)
        out = moba_attention_varlen(q[0], k[0], v[0], cu_seqlens=cu, block_size=64, topk=4)
    else:
        out = moba_attention(q, k, v, block_size=64, topk=4, **where)
    if training:
        out.backward(torch.ones_like(out))
    assert foretold == later
    assert ("_dkv_kernel" in {v.kernel.__name__ for v in later}) == training


@pytest.fixture
def card(monkeypatch):
    """A card, as far as `compiled` asks for one."""
    active = SimpleNamespace(get_current_target=lambda: "sm_90")
    monkeypatch.setattr(variants, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(variants, "_kernels", {})
    monkeypatch.setattr(variants, "_compiling", {})


def test_later_kernels_compile_meanwhile_and_every_one_once(monkeypatch, card):
    """`compiled` waits for what a launch needs alone."""
    compiling, loaded, can_end = [], [], Event()

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            loaded.append(self.name)

    def compile_slowly(name, target):
        compiling.append(name)
        assert name == "now" or can_end.wait(60)
        return Kernel(name)

    monkeypatch.setattr(variants, "_compile", compile_slowly)
    monkeypatch.setattr(variants, "_threads", ThreadPoolExecutor(2))
    device = torch.device("cuda", 0)
    assert [kernel.name for kernel in variants.compiled(["now"], device, lambda: ["later"])] == ["now"]
    assert loaded == ["now"]
    can_end.set()
    assert [kernel.name for kernel in variants.compiled(["later", "now"], device)] == ["later", "now"]
    assert sorted(compiling) == ["later", "now"]
    assert loaded == ["now", "later"]
    variants.compiled(["now"], torch.device("cuda", 1))
    assert compiling.count("now") == 2, "a kernel that is loaded serves one device"


def test_a_kernel_that_does_not_compile_is_tried_again(monkeypatch, card):
    tries = []

    def fail(name, target):
        tries.append(name)
        raise OSError("no C compiler")

    monkeypatch.setattr(variants, "_compile", fail)
    for _ in range(2):
        with pytest.raises(OSError, match="no C compiler"):
            variants.compiled(["one"], torch.device("cuda", 0))
    assert tries == ["one", "one"]


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_warming_up_knows_what_a_learned_router_launches(launched, pool):
    register_moba(None)
    model, tokens = tiny_model("Llama", head_dim=128).bfloat16().eval(), torch.randint(3, 64, (2, 600))
    add_indexer(model, 64, pool)
    config = MoBAConfig(64, 4, keep_first=1, decode="moba", router="indexer")
    set_moba_config(model, config)
    model.set_attn_implementation("moba")
    mask = torch.ones_like(tokens)
    mask[1, :100] = 0
    cache = MoBACache(model.config)
    with torch.no_grad():
        model(tokens, attention_mask=mask, past_key_values=cache)
        model(tokens[:, :1], attention_mask=torch.cat([mask, mask[:, :1] | 1], dim=1), past_key_values=cache)
        model(tokens[:1], position_ids=torch.arange(600)[None] % 300, use_cache=False)
    head_dim, by_tokens = _indexer_of(model, config)
    index = ahead.index_variants_of(90, torch.bfloat16, 64, 4, 1, (2, head_dim), by_tokens=by_tokens)
    routing_kernels = {v for v in launched if "select" in v.kernel.__name__ or "block_" in v.kernel.__name__}
    assert {v.kernel.__name__ for v in routing_kernels} >= {v.kernel.__name__ for v in index}
    assert routing_kernels <= set(index)
    assert launched <= {*index, *warmed_up(config, (4, 2, 128, 128), is_shared=True)}
    model.train()(tokens, use_cache=False)
    loss = set(ahead.index_loss_plans(90, torch.bfloat16, 128, 64)[0].variants())
    assert loss <= launched <= {*index, *loss, *warmed_up(config, (4, 2, 128, 128), is_shared=True)}
