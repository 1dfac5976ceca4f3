"""The embedded language model, loaded once for all test files that import the fixture."""

from __future__ import annotations

from functools import cache

import pytest

from moba.hf import set_moba_config
from moba_lab.models.load import load_model

load_once = cache(load_model)


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M-Instruct and its tokenizer, fp32, with torch's attention before and after every test file."""
    model, tokenizer = load_once()
    yield model, tokenizer
    model.set_attn_implementation("sdpa")
    set_moba_config(model, None)
