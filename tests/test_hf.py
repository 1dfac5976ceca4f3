"""MoBA inside transformers' models: padding, packing, training and compilation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from tiny_models import logits, positions_of, random_tokens, read_in_parts, tiny_model
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache

from moba import MoBAConfig, moba_attention, register_moba
from moba.hf import set_moba_config

LENGTH, BLOCK, TOPK = 70, 8, 3
NAMES, PAIR = ("moba", "moba_naive"), ("moba", "sdpa")
SPARSE = {"block_size": BLOCK, "topk": TOPK, "backend": "pytorch", "decode": "moba"}
# fp32 logits of up to about ten through three layers of random weights.
CLOSE = 1e-4


@pytest.fixture(autouse=True)
def _registered():
    register_moba(MoBAConfig(**SPARSE))


def differ(a, b):
    return (a - b).abs().max() > 0.05


@pytest.fixture(scope="module")
def llama():
    return tiny_model().double()


@pytest.mark.parametrize("full_layers", [0, 3])
@pytest.mark.parametrize("how", ["plain", "padded", "positions", "cu_seqlens", "chunks", "steps", "padded steps"])
def test_the_models_scaling_is_honoured_on_every_path(how, full_layers):
    model, tokens = tiny_model("Granite", attention_multiplier=0.7).double(), random_tokens(1, LENGTH)
    assert model.model.layers[0].self_attn.scaling == 0.7
    register_moba(MoBAConfig(BLOCK, -(-LENGTH // BLOCK), full_layers=full_layers, backend="pytorch", decode="full"))
    mask = torch.ones_like(tokens)
    mask[:, :9] = 0
    if how in ("plain", "padded"):
        inputs = {"attention_mask": mask} if how == "padded" else {}
        real = mask[0].bool() if how == "padded" else slice(None)
        out, expected = (logits(model, tokens, name, **inputs)[:, real] for name in PAIR)
    elif how in ("positions", "cu_seqlens"):
        cu = torch.tensor([0, 30, LENGTH], dtype=torch.int32)
        positions = {"position_ids": positions_of([30, LENGTH - 30]), "use_cache": False}
        inputs = {**positions, "cu_seq_lens_q": cu, "cu_seq_lens_k": cu} if how == "cu_seqlens" else positions
        out, expected = logits(model, tokens, **inputs), logits(model, tokens, "sdpa", **positions)
    else:
        lengths = [30, 1, LENGTH - 31] if how == "chunks" else [LENGTH - 2, 1, 1]
        inputs, real = ({"attention_mask": mask}, mask[0].bool()) if "padded" in how else ({}, slice(None))
        caches = [DynamicCache(config=model.config) for _ in PAIR]
        out, expected = (
            read_in_parts(model, tokens, lengths, cache, name, **inputs)[:, real]
            for cache, name in zip(caches, PAIR, strict=True)
        )
    assert_close(out, expected, CLOSE)


@pytest.mark.parametrize(("name", "runs"), [("moba", "pytorch"), ("moba_naive", "reference")])
@pytest.mark.parametrize("router", ["mean", "sink"])
def test_the_whole_config_reaches_attention(monkeypatch, llama, name, runs, router):
    seen = []

    def attention(q, k, v, **options):
        seen.append(options)
        return moba_attention(q, k, v, **options)

    monkeypatch.setattr("moba.hf.attention.moba_attention", attention)
    chosen = {"block_size": 8, "topk": 4, "keep_first": 1, "keep_recent": 2, "router": router}
    register_moba(MoBAConfig(**chosen, backend="pytorch"))
    logits(llama, random_tokens(1, LENGTH), name)
    softmax = {"scale": llama.model.layers[0].self_attn.scaling, "sinks": None, "softcap": None}
    expected = {**chosen, **softmax, "backend": runs}
    assert seen == [expected] * 3


def padded(tokens, pads, side):
    """The rows with `pads[i]` padding tokens of garbage at one side, and their mask."""
    longest = tokens.shape[1] + max(pads)
    ids, mask = torch.full((len(pads), longest), 3), torch.zeros(len(pads), longest, dtype=torch.long)
    for row, pad in enumerate(pads):
        length = longest - pad
        real = slice(pad, None) if side == "left" else slice(0, length)
        ids[row, real] = random_tokens(len(pads), longest)[row, :length]
        mask[row, real] = 1
    return ids, mask


@pytest.mark.parametrize("full_layers", [0, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_the_rows_alone(llama, side, full_layers):
    register_moba(MoBAConfig(**SPARSE, full_layers=full_layers))
    pads = [0, 13, 29, 1]
    ids, mask = padded(random_tokens(4, 30), pads, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = logits(llama, ids, attention_mask=mask, position_ids=positions)
    assert torch.isfinite(out).all()
    for row in range(4):
        real = mask[row].bool()
        assert_close(out[row, real], logits(llama, ids[row, real][None])[0], CLOSE)


def test_a_mask_may_reach_beyond_the_tokens(llama):
    """Only its first columns count, as in chunks of a prompt that all get the whole prompt's mask."""
    ids, mask = padded(random_tokens(2, 40), [0, 5], "left")
    out = logits(llama, ids[:, :30], attention_mask=mask)
    assert_close(out, logits(llama, ids[:, :30], attention_mask=mask[:, :30]), CLOSE)
    mask[:, 35] = 0
    assert_close(out, logits(llama, ids[:, :30], attention_mask=mask), CLOSE)


def test_right_padding_without_positions_is_no_padding(llama):
    ids, mask = padded(random_tokens(2, 40), [0, 17], "right")
    out = logits(llama, ids, attention_mask=mask)
    assert_close(out[1, :40], logits(llama, ids[1:, :40])[0], CLOSE)


def test_a_row_of_padding_only_is_finite(llama):
    ids, mask = padded(random_tokens(2, 40), [0, 5], "left")
    mask[1] = 0
    out = logits(llama, ids, attention_mask=mask)
    assert torch.isfinite(out).all()
    assert_close(out[0], logits(llama, ids[:1])[0], CLOSE)


LENGTHS = [17, 1, 40, 12]


def separately(model, tokens, lengths):
    return torch.cat([logits(model, part) for part in tokens.split(lengths, dim=1)], dim=1)


def test_what_a_collator_says_of_packed_rows_is_taken(llama):
    """`DataCollatorWithFlattening(return_seq_idx=True)`, and TRL's packing, number the tokens' sequences, too."""
    parts = random_tokens(1, sum(LENGTHS)).split(LENGTHS, dim=1)
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True, return_tensors="pt")
    batch = collate([{"input_ids": part[0].tolist()} for part in parts])
    assert {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "seq_idx", "position_ids"} <= set(batch)
    labels, tokens = batch.pop("labels"), batch.pop("input_ids")
    out = logits(llama, tokens, use_cache=False, **batch)
    assert_close(out, separately(llama, tokens, LENGTHS), CLOSE)
    assert labels[0, 0] == -100
    with pytest.raises(ValueError, match="seq_idx"):
        logits(llama, tokens, use_cache=False, seq_idx=batch["seq_idx"])


@pytest.mark.parametrize("full_layers", [0, 2])
@pytest.mark.parametrize("how", ["positions", "cu_seqlens", "both", "no positions"])
def test_packed_is_separate(llama, how, full_layers):
    register_moba(MoBAConfig(**SPARSE, full_layers=full_layers))
    tokens = random_tokens(1, sum(LENGTHS))
    cu = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
    by_cu = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 40, "max_length_k": 40}
    inputs = {} if how == "positions" else by_cu
    if how != "no positions":
        inputs = {**inputs, "position_ids": positions_of(LENGTHS)}
    out = logits(llama, tokens, use_cache=False, **inputs)
    if how == "no positions":
        # Only the rotary embedding, which is relative, sees the difference.
        assert_close(out, separately(llama, tokens, LENGTHS), 1e-3)
    else:
        assert_close(out, separately(llama, tokens, LENGTHS), CLOSE)


def test_rows_packed_each_in_its_own_way(llama):
    tokens = random_tokens(3, 60)
    lengths = [[60], [25, 35], [10, 20, 30]]
    out = logits(llama, tokens, position_ids=torch.cat([positions_of(n) for n in lengths]), use_cache=False)
    for row in range(3):
        assert_close(out[row], separately(llama, tokens[row : row + 1], lengths[row])[0], CLOSE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_matches_the_reference(checkpointing):
    register_moba(MoBAConfig(**SPARSE, full_layers=1))
    tokens = random_tokens(2, LENGTH)
    gradients = {}
    for name in NAMES:
        model = tiny_model().double()
        model.set_attn_implementation(name)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients[name] = [p.grad for p in model.parameters()]
    for a, b in zip(gradients["moba"], gradients["moba_naive"], strict=True):
        assert_close(a, b, CLOSE)
        assert a.abs().sum() > 0


@pytest.mark.parametrize("full_layers", [0, 1])
def test_autocast_and_bfloat16(full_layers):
    register_moba(MoBAConfig(BLOCK, 9, full_layers=full_layers, backend="pytorch"))
    model, tokens = tiny_model(initializer_range=0.1), random_tokens(1, LENGTH)
    expected = logits(model, tokens, "sdpa")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # bf16 keeps 8 bits: three layers of roundings of 2^-8 each, on logits of order one.
        assert_close(logits(model, tokens).float(), expected, 0.05)
    assert_close(logits(model.to(torch.bfloat16), tokens).float(), expected, 0.05)


@pytest.mark.parametrize("own_config", [False, True])
@pytest.mark.parametrize("inputs", ["plain", "padded", "static cache"])
def test_the_layers_trace_into_one_graph(monkeypatch, inputs, own_config):
    """With attention itself replaced by something that torch.compile can trace, nothing else breaks the graph."""

    def attention(q, k, v, **options):
        if (start := options.get("key_start")) is not None:
            q = q + start[:, None, None, None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr("moba.hf.attention.moba_attention", attention)
    model, tokens = tiny_model(num_hidden_layers=2), random_tokens(2, 20)
    model.set_attn_implementation("moba")
    if own_config:
        set_moba_config(model, MoBAConfig(**SPARSE, full_layers=1))
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    torch.compiler.reset()

    def options():
        cache = StaticCache(config=model.config, max_cache_len=32)
        return {"plain": {}, "padded": {"attention_mask": mask}, "static cache": {"past_key_values": cache}}[inputs]

    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(tokens, **options()).logits
        assert_close(compiled, model(tokens, **options()).logits, CLOSE)


def test_compile():
    llama = tiny_model(num_hidden_layers=1)
    llama.set_attn_implementation("moba")
    tokens = random_tokens(2, 30)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    torch.compiler.reset()
    compiled = torch.compile(llama, backend="eager")
    with torch.no_grad():
        assert_close(compiled(tokens).logits, llama(tokens).logits, CLOSE)
        assert_close(compiled(tokens, attention_mask=mask).logits, llama(tokens, attention_mask=mask).logits, CLOSE)
        packed = {"position_ids": positions_of([10, 20]), "use_cache": False}
        # Where transformers breaks the graph before the mask is made, the sequences are found as in eager mode.
        raised = None
        try:
            out = compiled(tokens[:1], **packed).logits
        except (RuntimeError, ValueError) as error:
            raised = str(error)
        if raised is None:
            assert_close(out, llama(tokens[:1], **packed).logits, CLOSE)
        else:
            assert "position_ids must ascend" in raised
    torch.compiler.reset()
