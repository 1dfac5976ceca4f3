"""A model's MoBA config inside transformers: which layers it holds for, where it is kept, and what registering says."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from helpers import assert_close
from test_hf import BLOCK, CLOSE, LENGTH, SPARSE, differ
from test_hf import _registered as _registered
from test_hf import llama as llama
from tiny_models import logits, random_tokens, tiny_model
from transformers import AutoModelForCausalLM

from moba import MoBAConfig, register_moba
from moba.hf import get_moba_config, set_moba_config, switch


def test_a_models_own_layers_stay_full(llama):
    tokens = random_tokens(1, LENGTH)
    full, sparse = logits(llama, tokens, "sdpa"), logits(llama, tokens)
    results = {}
    for full_layers in (3, (0, 1, 2), 1, (2,), (0,)):
        register_moba(MoBAConfig(**SPARSE, full_layers=full_layers))
        results[full_layers] = logits(llama, tokens)
    assert_close(results[3], full, CLOSE)
    assert_close(results[0, 1, 2], full, CLOSE)
    assert_close(results[1], results[(2,)], CLOSE)
    assert differ(results[1], full)
    assert differ(results[1], sparse)
    assert differ(results[1], results[(0,)])


def test_layers_are_chosen_by_their_place(llama):
    """With only the first layer sparse, the model is dense from its output on."""
    tokens = random_tokens(1, LENGTH)
    seen = {}
    hooks = [
        layer.register_forward_hook(lambda module, args, output, i=i: seen.__setitem__(i, output))
        for i, layer in enumerate(llama.model.layers)
    ]
    try:
        logits(llama, tokens, "sdpa")
        dense = dict(seen)
        register_moba(MoBAConfig(**SPARSE, full_layers=1))
        logits(llama, tokens)
        assert differ(seen[0], dense[0])
        register_moba(MoBAConfig(**SPARSE, full_layers=(0,)))
        logits(llama, tokens)
        assert_close(seen[0], dense[0], CLOSE)
        assert differ(seen[1], dense[1])
    finally:
        for hook in hooks:
            hook.remove()


def test_registering_again_replaces_the_config(llama):
    tokens = random_tokens(1, LENGTH)
    before = logits(llama, tokens)
    register_moba(MoBAConfig(BLOCK, 1, backend="pytorch"))
    assert differ(logits(llama, tokens), before)


def test_the_config_is_saved_with_the_model(tmp_path):
    model, tokens = tiny_model(), random_tokens(1, LENGTH)
    config = MoBAConfig(16, 2, keep_first=1, full_layers=(1,), decode="moba", backend="reference")
    assert get_moba_config(model) is None
    before = logits(model, tokens)
    set_moba_config(model, config)
    own = logits(model, tokens)
    assert differ(own, before)
    model.save_pretrained(tmp_path)

    register_moba()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="moba")
    assert get_moba_config(loaded) == config
    assert_close(logits(loaded, tokens), own, CLOSE)

    set_moba_config(loaded, None)
    assert get_moba_config(loaded) is None
    with pytest.raises(ValueError, match="no MoBA config"):
        logits(loaded, tokens)
    register_moba(MoBAConfig(**SPARSE))
    assert_close(logits(loaded, tokens), before, CLOSE)


def test_the_models_config_is_parsed_when_it_changes(monkeypatch):
    monkeypatch.setattr("moba.hf.attention._parsed", {})
    parsed, parse = [], MoBAConfig.from_dict
    monkeypatch.setattr(MoBAConfig, "from_dict", lambda values: parsed.append(values) or parse(values))
    model, tokens = tiny_model(), random_tokens(1, LENGTH)
    set_moba_config(model, MoBAConfig(BLOCK, 2, keep_first=1, backend="pytorch"))
    first = logits(model, tokens)
    assert torch.equal(first, logits(model, tokens))
    assert len(parsed) == 1
    model.config.moba["topk"] = 4
    assert differ(first, logits(model, tokens))
    assert len(parsed) == 2
    for equal in (True, 1.0):
        model.config.moba["keep_first"] = equal
        with pytest.raises(ValueError, match=r"config\.moba: keep_first must be an integer"):
            logits(model, tokens)


@pytest.mark.parametrize(
    ("version", "says"), [("5.17.0", False), ("5.24.9", False), ("5.25.0.dev0", True), ("6.0", True)]
)
def test_untested_versions_are_named_once(monkeypatch, caplog, version, says):
    monkeypatch.setattr(switch.transformers, "__version__", version)
    monkeypatch.setattr(switch, "_has_warned", False)
    with caplog.at_level(logging.WARNING, logger="moba"):
        for _ in range(2):
            register_moba(MoBAConfig(**SPARSE))
    expected = [f"transformers {version} is not among those that moba was tested with, 5.17 to 5.24"] if says else []
    assert [record.getMessage() for record in caplog.records] == expected


def test_importing_moba_does_not_import_transformers():
    code = "import sys; from moba import *; assert register_moba and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
