"""Compiling ahead: what `warmup` asks for, and that there is nothing to do where no kernel is compiled."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from moba import MoBAConfig, warmup
from moba.hf import set_moba_config

CONFIG = MoBAConfig(block_size=16, topk=3)


def test_a_cpu_compiles_nothing():
    model = tiny_model("Llama")
    set_moba_config(model, CONFIG)
    assert warmup(model) == 0
    assert warmup(config=CONFIG, heads=4, head_dim=16, device="cpu") == 0


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
