"""Attention layers that MoBA in vLLM cannot honour, and pages that do not hold whole blocks: checked without vLLM."""

from __future__ import annotations

import pytest

from moba import MoBAConfig
from moba.vllm import config as plugin


class Layer:
    """What the engine's implementation of a layer says of itself."""

    def __init__(self, **changes):
        plain = {"sliding_window": None, "alibi_slopes": None, "logits_soft_cap": 0, "sinks": None, "head_size": 64}
        self.__dict__.update(plain, kv_cache_dtype="auto")
        self.__dict__.update(changes)


@pytest.mark.parametrize(
    ("layer", "made_with", "message"),
    [
        ({"sliding_window": 64}, {}, "a sliding window, 64"),
        ({"sliding_window": (63, 0)}, {}, "a sliding window"),
        ({"alibi_slopes": [1.0]}, {}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, {}, "soft cap of its logits, 30"),
        ({"sinks": [0.0]}, {}, "sinks"),
        ({"kv_cache_dtype": "fp8_e4m3"}, {}, "quantised keys and values, fp8_e4m3"),
        ({"head_size": 512}, {}, "head dim of 512"),
        ({}, {"attn_type": "encoder_decoder"}, "kind 'encoder_decoder'"),
        ({}, {"kv_sharing_target_layer_name": "layers.1"}, "another layer, layers.1"),
    ],
)
def test_layers_that_cannot_be_served(layer, made_with, message):
    plain = {"attn_type": "decoder", "kv_sharing_target_layer_name": None}
    with pytest.raises(ValueError, match=message):
        plugin.check_layer(Layer(**layer), **{**plain, **made_with})


def test_plain_layers_are_served():
    for window in (None, -1, (-1, -1)):
        plugin.check_layer(Layer(sliding_window=window), "decoder", None)


def test_pages_hold_whole_blocks():
    plugin.check_page_size(192, MoBAConfig(64, 4))
    with pytest.raises(ValueError, match=r"multiple of the MoBA block_size 64, got 100: .* try 128"):
        plugin.check_page_size(100, MoBAConfig(64, 4))
