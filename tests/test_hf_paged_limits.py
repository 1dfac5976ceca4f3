"""Continuous batching with MoBA: what is refused or does not fit, and what stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from real_model import smollm2  # noqa: F401
from test_hf_paged import PAGE_SIZE, SPARSE, Served, alone, batching, greedy, prompt, serve, use
from test_hf_paged import _poisoned as _poisoned
from test_hf_paged import model as model
from tiny_models import tiny_model
from transformers import BloomConfig, BloomForCausalLM
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moba import MoBAConfig
from moba.hf import enable_paged, set_moba_config

OLD = PAGE_SIZE == "block_size"


def test_without_a_batching_config_the_page_size_fits(model):
    use(model, block_size=24)
    generation = greedy()
    manager = model.init_continuous_batching(generation)
    assert getattr(manager.continuous_batching_config, PAGE_SIZE) == 264
    model.set_attn_implementation("moba")


def test_a_prompt_too_long_for_the_cache_fails_alone(model):
    use(model)
    prompts = [prompt(40, 1), prompt(150, 2), prompt(20, 3), []]
    with Served(model, batching(pages=8)) as served:
        names = [served.add(tokens) for tokens in prompts]
        for name in names:
            if name not in served.errors:
                served.wait(name, 10**9)
    assert served.errors[names[0]] is served.errors[names[2]] is None
    assert "needs room for 161 tokens (150 of prompt, max_new_tokens=12)" in served.errors[names[1]]
    assert "empty prompt" in served.errors[names[3]]
    assert served.tokens[names[0]] == alone(model, prompts[0])
    assert served.tokens[names[2]] == alone(model, prompts[2])


def test_the_largest_request_that_fits(model):
    use(model)
    capacity = 8 * 16 - (2 if OLD else 0)
    tokens = prompt(capacity - 11, 1)
    assert serve(model, [tokens], config=batching(pages=8)) == [alone(model, tokens)]


def test_a_request_without_a_limit_keeps_its_tokens_when_pages_run_out(model):
    use(model)
    tokens = prompt(40, 1)
    with Served(model, batching(pages=6), new=None) as served:
        made = served.wait(served.add(tokens))
    (error,) = served.errors.values()
    assert "No requests can be scheduled" in error
    assert len(made) > 40
    assert made == alone(model, tokens, len(made))


def test_other_models_and_other_calls_are_untouched(model):
    other = tiny_model("Qwen2").double()
    tokens = prompt(50, 1)
    before = [other.generate_batch([tokens], greedy(), batching())["req_0"].generated_tokens]
    before.append(alone(other, tokens, attention="sdpa"))
    functions = dict(ALL_ATTENTION_FUNCTIONS.items())
    use(model)
    changed = {name for name, function in ALL_ATTENTION_FUNCTIONS.items() if functions.get(name) is not function}
    assert {name.removeprefix("paged|") for name in changed} <= {"moba", "moba_naive", "moba_flash"}
    other.set_attn_implementation("sdpa")
    after = other.generate_batch([tokens], greedy(), batching())["req_0"].generated_tokens
    assert [after, alone(other, tokens, attention="sdpa")] == before
    model.set_attn_implementation("sdpa")
    assert serve(model, [tokens], config=batching()) == [alone(model, tokens)]
    model.set_attn_implementation("sdpa")
    serve(model, [tokens], config=batching())
    assert model.config._attn_implementation == "sdpa"


def test_a_copied_model_serves_itself(model):
    use(model)
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.lm_head.weight, generator=torch.Generator().manual_seed(9))
    tokens = prompt(50, 1)
    assert serve(other, [tokens]) == [alone(other, tokens)] != serve(model, [tokens])


def test_a_later_call_replaces_the_config(model):
    tokens = prompt(60, 60)
    assert serve(use(model, topk=2), [tokens]) == [alone(model, tokens)]
    assert serve(use(model, topk=5), [tokens]) == [alone(model, tokens)]


def test_the_config_that_the_model_carries(model):
    tokens = prompt(60, 60)
    expected = serve(use(model, topk=2), [tokens])
    set_moba_config(model, MoBAConfig(**{**SPARSE, "topk": 2}))
    try:
        enable_paged(model)
        assert serve(model, [tokens]) == expected
    finally:
        set_moba_config(model, None)


def test_a_persistent_manager_keeps_its_cache_and_its_config(model):
    use(model)
    tokens = prompt(60, 1)
    for _ in range(2):
        output = model.generate_batch([tokens], greedy(), batching(), persistent_manager=True)
        assert [o.generated_tokens for o in output.values()] == [alone(model, tokens)]
    use(model, topk=2)
    with pytest.raises(ValueError, match="destroy_cached_continuous_batching_manager"):
        model.generate_batch([tokens], greedy(), batching())
    model.destroy_cached_continuous_batching_manager()
    assert serve(model, [tokens]) == [alone(model, tokens)]


def test_the_model_cannot_be_called_while_it_serves(model):
    use(model)
    with Served(model, batching()), pytest.raises(ValueError, match="stop it before calling"):
        model(torch.tensor([prompt(5)]))
    model(torch.tensor([prompt(5)]))


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"page": 12}, {}, f"{PAGE_SIZE}=12 must be a multiple of the MoBA block_size 8"),
        ({"page": 4}, {}, f"{PAGE_SIZE}=4 must be a multiple .* ContinuousBatchingConfig.{PAGE_SIZE}=8"),
        ({"page": 12, "allow_block_sharing": False}, {}, "must be a multiple"),
        ({"use_cuda_graph": True}, {}, "use_cuda_graph=True"),
        ({"use_cuda_graph": (False, True)}, {"decode": "full"}, "use_cuda_graph=.False, True."),
        ({"cpu_offload_space": 1.0}, {}, "cpu_offload_space=1.0"),
    ],
    ids=str,
)
def test_batching_configs_that_cannot_be_honoured(model, options, changes, message):
    use(model, **changes)
    with pytest.raises(ValueError, match=message):
        model.generate_batch([prompt(5)], greedy(), batching(**options))
    assert model.config._attn_implementation == "moba"


def test_models_that_cannot_be_served(model):
    with pytest.raises(ValueError, match="no MoBA config"):
        enable_paged(model)
    with pytest.raises(ValueError, match="model must be a transformers model, got int"):
        enable_paged(3)
    with pytest.raises(ValueError, match="config must be a MoBAConfig or None, got 'moba'"):
        enable_paged(model, "moba")
    with pytest.raises(ValueError, match=r"full_layers must fit the model's 3 layers, got \(3,\)"):
        enable_paged(model, MoBAConfig(8, 3, full_layers=(3,)))
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    hybrid = tiny_model("Qwen3", layer_types=kinds, sliding_window=16, use_sliding_window=True)
    with pytest.raises(ValueError, match=r"for MoBA in pages, got \['full_attention', 'sliding_attention'\]"):
        enable_paged(hybrid, MoBAConfig(**SPARSE))
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=3, n_head=4))
    with pytest.raises(ValueError, match="BloomForCausalLM computes its attention itself"):
        enable_paged(bloom, MoBAConfig(**SPARSE))


def test_a_transformers_that_cannot_be_served(model, monkeypatch):
    monkeypatch.delattr(PagedAttentionCache, "copy_cache" if OLD else "perform_cache_copy")
    with pytest.raises(ValueError, match=f"transformers {transformers.__version__} cannot serve MoBA"):
        enable_paged(model, MoBAConfig(**SPARSE))
