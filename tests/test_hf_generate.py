"""Generation with MoBA through transformers; what depends on the cache is in test_cache.py."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from tiny_models import random_tokens, tiny_model
from transformers import DynamicCache, StaticCache

from moba import MoBAConfig, register_moba
from moba.hf.cache import MoBACache

SPARSE = {"block_size": 8, "topk": 3, "backend": "pytorch", "decode": "moba"}
CLOSE = 1e-4
PROMPT, NEW = 45, 12


@pytest.fixture(autouse=True)
def _registered():
    register_moba(MoBAConfig(**SPARSE))


@pytest.fixture(scope="module")
def model():
    """In fp64: scores in fp32 nearly tie, and whether by one way or another they round differently is up to the CPU."""
    return tiny_model().double()


def use(model, attention="moba"):
    model.set_attn_implementation(attention)
    return model


def generate(model, tokens, attention="moba", **options):
    options = {"attention_mask": torch.ones_like(tokens), "do_sample": False, "max_new_tokens": NEW, **options}
    return use(model, attention).generate(tokens, **options)


def greedy_without_cache(model, tokens, steps=NEW):
    use(model)
    with torch.no_grad():
        for _ in range(steps):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tokens


def caches(model):
    yield "dynamic", DynamicCache(config=model.config)
    yield "static", StaticCache(config=model.config, max_cache_len=80)


def test_generate_with_a_cache_of_its_own_is_recomputing_every_step(model):
    tokens = random_tokens(2, PROMPT)
    expected = greedy_without_cache(model, tokens)
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(generate(model, tokens, **options), expected)


def steps(model, tokens, cache, attention="moba"):
    """Logits of one token after another after the first 30 at once."""
    use(model, attention)
    parts = tokens.split([30] + [1] * (tokens.shape[1] - 30), dim=1)
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)[:, 30:]


def test_a_row_of_padding_only_stays_finite(model):
    register_moba(MoBAConfig(8, 3, full_layers=1, backend="pytorch"))
    tokens = random_tokens(2, PROMPT)
    mask = torch.ones(2, PROMPT + 2)
    mask[1] = 0
    use(model)
    with torch.no_grad():
        for _, cache in caches(model):
            model(tokens, past_key_values=cache, attention_mask=mask[:, :PROMPT])
            for end in (PROMPT + 1, PROMPT + 2):
                step = model(tokens[:, :1], past_key_values=cache, attention_mask=mask[:, :end]).logits
                assert torch.isfinite(step).all()


def test_full_decode_reads_the_cache_that_moba_filled(model):
    """Each step's first layer is dense; the prompt's deeper keys are what the sparse prefill made of them."""
    tokens = random_tokens(2, PROMPT)
    register_moba(MoBAConfig(**{**SPARSE, "decode": "full"}))
    full = {name: steps(model, tokens, cache) for name, cache in caches(model)}
    assert_close(full["dynamic"], full["static"], CLOSE)
    mixed = DynamicCache(config=model.config)
    with torch.no_grad():
        use(model)(tokens[:, :30], past_key_values=mixed)
        use(model, "sdpa")
        parts = [model(part, past_key_values=mixed).logits for part in tokens[:, 30:].split(1, dim=1)]
    assert_close(full["dynamic"], torch.cat(parts, dim=1), CLOSE)
    register_moba(MoBAConfig(**SPARSE))
    sparse = steps(model, tokens, DynamicCache(config=model.config))
    assert (sparse - full["dynamic"]).abs().max() > 0.05


def test_right_padding_cannot_be_continued(model):
    tokens = random_tokens(2, PROMPT)
    mask = torch.ones_like(tokens)
    mask[1, 40:] = 0
    with pytest.raises(ValueError, match="pad on the left"):
        generate(model, tokens, attention_mask=mask)


def test_a_mask_must_cover_the_cache(model):
    tokens = random_tokens(1, PROMPT)
    cache = DynamicCache(config=model.config)
    use(model)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask must cover the 45 cached and the 5 new tokens, got 5"):
            model(tokens[:, :5], past_key_values=cache, attention_mask=torch.ones(1, 5))


@pytest.mark.parametrize("cache", [None, "MoBA", "MoBA static"])
@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
@pytest.mark.parametrize("decode", ["full", "moba"])
def test_proposed_tokens_count_as_decoding(model, decode, how, cache):
    """What an assistant or the prompt proposes changes the speed of greedy generation, not its tokens."""
    register_moba(MoBAConfig(**{**SPARSE, "topk": 2, "decode": decode}))
    # A prompt that repeats itself is one to propose from.
    tokens = random_tokens(1, 15).repeat(1, 3)
    assistant = use(tiny_model("Llama", num_hidden_layers=1).double())
    options = {"prompt_lookup_num_tokens": 4} if how == "prompt lookup" else {"assistant_model": assistant}

    def caches():
        room = {"MoBA": None, "MoBA static": 96}
        return {} if cache is None else {"past_key_values": MoBACache(model.config, max_cache_len=room[cache])}

    expected = generate(model, tokens, max_new_tokens=30, **caches())
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda module, args, inputs: lengths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    proposed = generate(model, tokens, max_new_tokens=30, **caches(), **options)
    hook.remove()
    assert any(length > 1 for length in lengths[1:]), "nothing was proposed"
    assert torch.equal(proposed, expected)
    assert not hasattr(model.config, "moba_num_prompt")
