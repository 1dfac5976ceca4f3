"""router="indexer": a learned module in each layer chooses the blocks of each key/value head."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from all_decoders import tiny_decoder
from helpers import LargestNewTensor, assert_close
from tiny_models import logits, positions_of, random_tokens, read_in_parts, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache

from moba import MoBAConfig, register_moba
from moba.hf import set_moba_config
from moba.hf.cache import MoBACache
from moba.hf.graph import with_room
from moba.hf.indexer import add_indexer, choose_by_index, load_indexer
from moba.hf.layout import PackedRows, PaddedRows
from moba.hf.record import record_routings

CONFIG = MoBAConfig(4, 3, decode="moba", router="indexer")
CLOSE = 1e-9
POOLS = ["max", "mean"]


@pytest.fixture(autouse=True)
def registered():
    register_moba(None)


def indexed_model(pool="max", family="Llama", head_dim=6, config=CONFIG, **changes):
    """With random indexers, in fp64, so that roundings do not decide which blocks are chosen."""
    model = tiny_model(family, **changes).double()
    add_indexer(model, head_dim, pool)
    for name, weight in model.named_parameters():
        if "moba_indexer" in name:
            torch.nn.init.normal_(weight, std=0.3)
    set_moba_config(model, config)
    model.set_attn_implementation("moba")
    return model


def reference(by_q, by_k, pool, config):
    """The selection of one sequence by its definition: [T, G, K], ascending, the own block included, then -1."""
    size, num_before = config.block_size, len(by_k) - len(by_q)
    chosen = torch.full((*by_q.shape[:2], config.topk), -1, dtype=torch.int32)
    for t in range(len(by_q)):
        own = (num_before + t) // size
        kept = {*range(min(config.keep_first, own)), *range(max(own - config.keep_recent, 0), own)}
        for head in range(by_q.shape[1]):
            scores = []
            for block in range(own):
                products = by_k[block * size : (block + 1) * size, head].double() @ by_q[t, head].double()
                scores.append(float(products.max() if pool == "max" else products.mean()))
            ranked = sorted(set(range(own)) - kept, key=lambda block: (-scores[block], block))
            blocks = sorted([own, *kept, *ranked[: config.topk - 1 - len(kept)]])
            chosen[t, head, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    return chosen


def integers(*shape):
    return torch.randint(-2, 3, shape).float()


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("first", "recent"), [(0, 0), (1, 1), (2, 1)])
@pytest.mark.parametrize("queries", [50, 7])
def test_the_selection_is_the_reference_s(pool, first, recent, queries):
    """Small integers have exact scores and many ties."""
    config = MoBAConfig(4, 4, keep_first=first, keep_recent=recent, router="indexer")
    layer = SimpleNamespace(moba_indexer=SimpleNamespace(pool=pool))
    by_q, by_k = integers(2, queries, 2, 6), integers(2, 50, 2, 6)
    expected = [reference(q, k, pool, config) for q, k in zip(by_q, by_k, strict=True)]
    assert torch.equal(choose_by_index(layer, by_q, by_k, None, config, "auto"), torch.stack(expected))
    start, end = torch.tensor([0, 9], dtype=torch.int32), torch.tensor([50, 45], dtype=torch.int32)
    chosen = choose_by_index(layer, by_q, by_k, PaddedRows(start, end, end), config, "auto")
    assert torch.equal(chosen[0], expected[0])
    real = min(queries, 45 - 9)
    assert torch.equal(chosen[1, queries - real :], reference(by_q[1, queries - real :], by_k[1, 9:45], pool, config))
    assert (chosen[1, : queries - real] == -1).all()


@pytest.mark.parametrize("pool", POOLS)
def test_packed_sequences_choose_alone(pool):
    layer = SimpleNamespace(moba_indexer=SimpleNamespace(pool=pool))
    by_q, by_k, cu = integers(1, 50, 2, 6), integers(1, 50, 2, 6), torch.tensor([0, 19, 50], dtype=torch.int32)
    parts = [reference(by_q[0, a:b], by_k[0, a:b], pool, CONFIG) for a, b in ((0, 19), (19, 50))]
    for layout in (PackedRows(cu[None]), (cu, cu)):
        assert torch.equal(choose_by_index(layer, by_q, by_k, layout, CONFIG, "auto")[0], torch.cat(parts))
    model, tokens = indexed_model(pool), random_tokens(2, 50)
    positions = torch.cat([positions_of([19, 31]), positions_of([33, 17])])
    packed = logits(model, tokens, position_ids=positions, use_cache=False)
    for row, start in ((0, 19), (1, 33)):
        assert_close(packed[row, start:], logits(model, tokens[row : row + 1, start:])[0], CLOSE)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Phi3", "Cohere", "GPTNeoX"])
def test_layers_read_the_blocks_that_their_indexers_choose(pool, family):
    heads = {"num_key_value_heads": 4} if family == "GPTNeoX" else {}
    model, tokens, seen = indexed_model(pool, family, **heads), random_tokens(2, 40), []
    layer = next(module for module in model.modules() if hasattr(module, "moba_indexer"))
    layer.moba_indexer.register_forward_hook(lambda module, args, vectors: seen.append(vectors))
    with record_routings(model) as record:
        sparse = logits(model, tokens, use_cache=False)
    expected = torch.stack([reference(q, k, pool, CONFIG) for q, k in zip(*seen[0], strict=True)])
    actual = record[0][0].indices
    assert torch.equal(actual, expected.repeat_interleave(actual.shape[2] // expected.shape[2], dim=2))
    assert (logits(model, tokens, "sdpa", use_cache=False) - sparse).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "SmolLM3"])
def test_an_untrained_indexer_is_the_shared_router(family):
    model, tokens = tiny_model(family).double(), random_tokens(2, 40)
    model.set_attn_implementation("moba")
    add_indexer(model, 8, "mean")
    found = []
    for router in ("indexer", "shared"):
        set_moba_config(model, MoBAConfig(4, 3, router=router))
        with record_routings(model) as record:
            logits(model, tokens, use_cache=False)
        found.append(record.joined()[2].indices)
    assert torch.equal(*found)


@pytest.mark.parametrize("head_dim", [4, 8, 12])
def test_rotated_scores_depend_on_distances_alone(head_dim):
    model = indexed_model(head_dim=head_dim)
    indexer, hidden = model.model.layers[0].self_attn.moba_indexer, torch.randn(1, 20, 32).double()
    scores = []
    for start in (0, 13):
        rotary = model.model.rotary_emb(hidden, torch.arange(start, start + 20)[None])
        q, k = indexer(hidden, rotary)
        scores.append(torch.einsum("btgd,bsgd->bgts", q, k))
    assert_close(*scores, 1e-6)  # the angles are fp32
    assert (scores[0] - torch.einsum("btgd,bsgd->bgts", *indexer(hidden))).abs().max() > 0.1


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_reads_what_it_reads_alone(pool, side):
    model, tokens, mask = indexed_model(pool), random_tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    real = slice(9, None) if side == "left" else slice(0, -9)
    mask[1] = 0
    mask[1, real] = 1
    padded = logits(model, tokens, **by_token(mask))
    assert_close(padded[:1], logits(model, tokens[:1]), CLOSE)
    assert_close(padded[1:, real], logits(model, tokens[1:, real]), CLOSE)


def test_refusals():
    model, tokens = tiny_model(), random_tokens(1, 20)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no indexer: .*add_indexer"):
        set_moba_config(model, CONFIG)
    register_moba(CONFIG)
    with pytest.raises(ValueError, match=r"LlamaAttention has no indexer: .*load_indexer"):
        logits(model, tokens)
    with pytest.raises(ValueError, match="head_dim must be even, got 5"):
        add_indexer(model, 5)
    with pytest.raises(ValueError, match="pool must be one of 'max', 'mean', got 'sum'"):
        add_indexer(model, 4, "sum")
    add_indexer(model, 4)
    with pytest.raises(ValueError, match="indexers already"):
        add_indexer(model, 4)
    model.model.layers[0].self_attn.moba_indexer.num_heads = 3
    with pytest.raises(ValueError, match="has 3 heads, and the layer 2 key/value heads"):
        logits(model, tokens)


def test_selecting_keeps_no_scores_of_all_tokens():
    """By the largest tensor that is made: scores of one query head's tokens would be T x S."""
    model, tokens = indexed_model(vocab_size=8, config=MoBAConfig(32, 3, router="indexer")), torch.ones(1, 3000).long()
    with LargestNewTensor() as largest:
        logits(model, tokens, logits_to_keep=1, use_cache=False)
    assert largest.num_elements < 3000 * 3000 / 4


def by_token(mask):
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("room", [{}, {"max_cache_len": 64}])
def test_a_text_read_in_parts(pool, room):
    model, tokens, mask = indexed_model(pool), random_tokens(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[1, :9] = 0
    cache = MoBACache(model.config, **room)
    read = read_in_parts(model, tokens, [20, 1, 1, 16, 1, 11], cache, **by_token(mask))
    assert_close(read[:1], logits(model, tokens[:1]), CLOSE)
    assert_close(read[1:, 9:], logits(model, tokens[1:, 9:]), CLOSE)
    cache.crop(-13)
    assert_close(read_in_parts(model, tokens[:, 37:], [12, 1], cache, **by_token(mask)), read[:, 37:], CLOSE)
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([1, 0]))
    turned = read_in_parts(model, tokens.flip(0)[:, 47:], [1, 2], cache, **by_token(mask.flip(0)))
    assert_close(turned.flip(0), read[:, 47:], CLOSE)


@pytest.mark.parametrize("room", [{}, {"max_cache_len": 64}])
def test_a_layer_that_makes_other_keys_of_the_cached_ones(room):
    """Index keys are of the layer's input, so they hold where block means do not."""
    model, tokens = tiny_decoder("DeepseekV3ForCausalLM", "moba").double().eval(), random_tokens(1, 50)
    add_indexer(model, head_dim=8)
    set_moba_config(model, CONFIG)
    cache = MoBACache(model.config, **room)
    read = read_in_parts(model, tokens, [20, 1, 28, 1], cache)
    assert_close(read, logits(model, tokens), CLOSE)


def test_a_cache_moved_to_a_fixed_room():
    model, tokens = indexed_model(), random_tokens(1, 50)
    cache = MoBACache(model.config)
    logits(model, tokens[:, :40], past_key_values=cache)
    fixed = with_room(cache, model, 10)
    assert_close(read_in_parts(model, tokens[:, 40:], 1, fixed), logits(model, tokens)[:, 40:], CLOSE)


@pytest.mark.parametrize("room", [{}, {"max_cache_len": 64}])
def test_generate(room):
    model, tokens = indexed_model(), random_tokens(2, 30)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    cache = MoBACache(model.config, **room)
    found = model.generate(tokens, attention_mask=mask, past_key_values=cache, **options)
    for row, start in ((0, 0), (1, 9)):
        text = found[row : row + 1, start:]
        expected = logits(model, text, use_cache=False)[0, 29 - start : -1].argmax(-1)
        assert torch.equal(text[0, 30 - start :], expected)


def test_what_no_index_keys_are_known_of():
    model, tokens = indexed_model(), random_tokens(1, 20)
    cache = DynamicCache(config=model.config)
    logits(model, tokens, past_key_values=cache)
    with pytest.raises(ValueError, match=r"past_key_values=moba\.hf\.cache\.MoBACache"):
        logits(model, tokens[:, :1], past_key_values=cache)
    full = MoBAConfig(4, 3, router="indexer")
    set_moba_config(model, full)
    logits(model, tokens[:, :1], past_key_values=cache)  # a full step needs none
    set_moba_config(model, CONFIG)
    cache = MoBACache(model.config)
    logits(model, tokens, "sdpa", past_key_values=cache)
    with pytest.raises(ValueError, match="which only a MoBACache that this model filled"):
        logits(model, tokens[:, :1], past_key_values=cache)


@pytest.mark.parametrize("pool", POOLS)
def test_saved_with_the_model(tmp_path, pool):
    model, tokens = indexed_model(pool), random_tokens(1, 40)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="moba")
    with pytest.raises(ValueError, match="load_indexer"):
        logits(loaded, tokens)
    load_indexer(loaded, tmp_path)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    with pytest.raises(ValueError, match="its config has no moba_indexer"):
        load_indexer(tiny_model(), tmp_path)
