"""MiniMax-M3's text model: its indexer selects the blocks, and MoBA's backends read exactly those."""

from __future__ import annotations

import pytest
import torch
from all_decoders import tiny_decoder
from helpers import assert_close
from tiny_models import gradients_of, logits, positions_of, random_tokens, read_in_parts
from transformers import DynamicCache

from moba import MoBAConfig, register_moba
from moba.hf.cache import MoBACache

# 3 of up to 13 blocks are read.
SIZES = {"index_block_size": 8, "index_topk_blocks": 3, "index_n_heads": 2, "index_head_dim": 8}
NAME, LENGTH, PADDING = "MiniMaxM3VLForCausalLM", 100, 21
CLOSE = 1e-4


@pytest.fixture(autouse=True)
def _all_blocks():
    """Every block for the layers that MoBA routes."""
    register_moba(MoBAConfig(8, 64, backend="pytorch", decode="moba"))


def make(**changes):
    layers = ["minimax_m3_sparse", "full_attention"]
    return tiny_decoder(NAME, **{"layer_types": layers, **SIZES, "index_local_blocks": 1, **changes})


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.mark.parametrize("name", ["moba", "moba_naive"])
@pytest.mark.parametrize("local_blocks", [0, 1, 2])
def test_logits_are_those_of_the_models_own_attention(name, local_blocks):
    model, tokens = make(index_local_blocks=local_blocks), random_tokens(2, LENGTH)
    expected = logits(model, tokens, "eager")
    assert_close(logits(model, tokens, name), expected, CLOSE)
    full = make(layer_types=["full_attention"] * 2)
    full.load_state_dict(model.state_dict(), strict=False)
    assert (logits(full, tokens, "eager") - expected).abs().max() > 0.1


def test_gradients(model):
    tokens = random_tokens(2, LENGTH)
    assert_close(gradients_of(model, tokens, "moba"), gradients_of(model, tokens, "eager"), CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("has_positions", [False, True])
def test_a_padded_row_reads_what_it_reads_alone(model, side, has_positions):
    tokens, mask = random_tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    real = slice(PADDING, None) if side == "left" else slice(0, -PADDING)
    mask[1] = 0
    mask[1, real] = 1
    inputs = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if has_positions else {}
    padded = logits(model, tokens, attention_mask=mask, **inputs)
    assert_close(padded[:1], logits(model, tokens[:1]), CLOSE)
    assert_close(padded[1:, real], logits(model, tokens[1:, real]), CLOSE)


@pytest.mark.parametrize(
    ("make_cache", "room"), [(DynamicCache, {}), (MoBACache, {}), (MoBACache, {"max_cache_len": 120})]
)
def test_a_text_read_in_parts(model, make_cache, room):
    tokens, mask = random_tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :PADDING] = 0
    cache = make_cache(config=model.config, **room)
    read = read_in_parts(model, tokens, [50, 1, 1, 30, 1, 17], cache, attention_mask=mask)
    assert_close(read[:1], logits(model, tokens[:1]), CLOSE)
    assert_close(read[1:, PADDING:], logits(model, tokens[1:, PADDING:]), CLOSE)


def test_its_own_attention_is_left_alone(model):
    tokens, mask = random_tokens(1, LENGTH), torch.ones(1, LENGTH, dtype=torch.long)
    mask[0, :PADDING] = 0
    logits(model, tokens)
    fresh = make()
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    assert torch.equal(logits(model, tokens, "eager", **inputs), logits(fresh, tokens, "eager", **inputs))


def test_packed_sequences_are_refused(model):
    with pytest.raises(ValueError, match="block_indices: the model's indexer cannot tell packed sequences apart"):
        logits(model, random_tokens(1, LENGTH), position_ids=positions_of([60, 40]), use_cache=False)
    cu = torch.tensor([0, 60, LENGTH], dtype=torch.int32)
    with pytest.raises(ValueError, match="block_indices: the model's indexer cannot tell packed sequences apart"):
        logits(model, random_tokens(1, LENGTH), cu_seq_lens_q=cu, cu_seq_lens_k=cu, use_cache=False)
