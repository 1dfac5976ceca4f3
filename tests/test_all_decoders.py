"""Every causal decoder of the installed transformers under MoBA: what docs/models.md says of it is so."""

from __future__ import annotations

import re

import models_page
import pytest
import torch
import transformers
from all_decoders import NOT_BUILT, decoder_classes, tiny_decoder, verdict

from moba import MoBAConfig, register_moba

INSTALLED = decoder_classes()
PAGE = models_page.read_page()
# Empty where the installed version is none of the tested.
SAID = PAGE.get(transformers.__version__, {})
# What a refusal names: the class, or what it asks for that MoBA cannot honour.
NAMED = re.compile(
    r"computes its|chooses by|has no att|(\w+ )?reads a window|(\w+|is_causal=False): MoBA |head dim must be |"
    r"attention_mask must be "
)


def test_the_page_has_every_class():
    assert not SAID or sorted(SAID) == INSTALLED
    for verdicts in PAGE.values():
        assert sum(verdict.startswith("works") for verdict in verdicts.values()) >= 120


@pytest.mark.parametrize("name", INSTALLED)
def test_what_the_page_says(name):
    found = verdict(name)
    assert found == SAID.get(name, found)
    if not found.startswith("refused: "):
        return
    reason = found.removeprefix("refused: ")
    assert NAMED.match(reason), reason
    if reason.startswith(("computes", "chooses", "has no", "reads a")):
        register_moba(MoBAConfig(8, 2))
        model = tiny_decoder(name)
        for attention in ("moba", "moba_naive"):
            with pytest.raises(ValueError, match=f"^{name} "):
                model.set_attn_implementation(attention)


@pytest.mark.parametrize("name", [name for name in NOT_BUILT if name in INSTALLED])
def test_what_is_not_built_cannot_be(name):
    with pytest.raises(Exception, match=r"timm|hidden_size_per_layer_input|shared_kv_states|vocab_size"):
        tiny_decoder(name)(torch.ones(1, 9, dtype=torch.long))
