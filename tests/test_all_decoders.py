"""Every causal decoder of the installed transformers under MoBA: no token sees a later one, or the model is refused.

"moba" and "moba_naive" lose causality together where a model does, so that they agree says nothing here.
"""

from __future__ import annotations

import re

import pytest
import torch
from all_decoders import decoder_classes, outcome, tiny_decoder

from moba import MoBAConfig, register_moba

# Classes that no config of their own alone makes run, and why.
NOT_BUILT = {
    "Gemma3nForConditionalGeneration": "its vision tower is in the package timm",
    "Gemma4AssistantForCausalLM": "drafts for another model, whose keys it reads",
    "Gemma4UnifiedAssistantForCausalLM": "drafts for another model, whose keys it reads",
}
# Classes without a layer of attention: the names mean nothing to them.
WITHOUT_ATTENTION = {"FalconMambaForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM", "xLSTMForCausalLM"}
# What a refusal names: the class, or what it asks for that MoBA cannot honour.
NAMED = "{name} |sliding_window: |softcap: |s_aux: |position_bias: |is_causal=False: |is_causal: |head dim must be "

INSTALLED = decoder_classes()


@pytest.fixture(autouse=True)
def _registered():
    register_moba(MoBAConfig(8, 2, backend="pytorch"))


@pytest.mark.parametrize("attention", ["moba", "moba_naive"])
@pytest.mark.parametrize("name", [name for name in INSTALLED if name not in NOT_BUILT])
def test_no_token_sees_a_later_one(name, attention):
    kind, why = outcome(name, attention)
    assert (kind == "no attention") == (name in WITHOUT_ATTENTION)
    assert kind != "refused" or re.match(NAMED.format(name=name), why), why
    if kind == "refused" and why.startswith(name):
        model = tiny_decoder(name)
        with pytest.raises(ValueError, match=f"^{name} "):
            model.set_attn_implementation(attention)


@pytest.mark.parametrize("family", ["Olmo3", "Gemma3", "Cohere2", "Qwen2Moe", "Ministral"])
def test_a_mask_is_refused_only_by_a_layer_that_is_given_it(family):
    """These models make the mask of a sliding window whatever their layers are."""
    name = f"{family}ForCausalLM"
    assert outcome(name, "moba") == ("runs", "")
    kind, why = outcome(name, "moba", layer_types=["sliding_attention", "full_attention"], sliding_window=16)
    assert kind == "refused"
    assert why.startswith("sliding_window: ")


@pytest.mark.parametrize("name", [name for name in NOT_BUILT if name in INSTALLED])
def test_what_is_not_built_cannot_be(name):
    with pytest.raises(Exception, match=r"timm|hidden_size_per_layer_input|shared_kv_states|vocab_size"):
        tiny_decoder(name)(torch.ones(1, 9, dtype=torch.long))
