"""Positions stretched: by a larger base, by interpolation, by YaRN."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from tiny_models import random_tokens, tiny_model

from moba_lab.models.rope import stretch_positions

TRAINED = 256
BASE = 10_000.0


def model_of(**changes):
    return tiny_model(
        max_position_embeddings=TRAINED, rope_parameters={"rope_type": "default", "rope_theta": BASE}, **changes
    )


def turns_once_in(model):
    """Over how many tokens each channel turns once."""
    return 2 * math.pi / model.model.rotary_emb.inv_freq.double()


def test_a_larger_base_slows_all_but_the_fastest_channel():
    model = model_of()
    before = turns_once_in(model)
    stretch_positions(model, 512, theta=4 * BASE)
    channels = torch.arange(len(before)) / len(before)
    torch.testing.assert_close(turns_once_in(model), before * 4.0**channels, rtol=1e-5, atol=0)
    assert model.config.max_position_embeddings == 512


def test_interpolation_slows_all_channels():
    model = model_of()
    before = turns_once_in(model)
    stretch_positions(model, factor=4)
    torch.testing.assert_close(turns_once_in(model), 4 * before, rtol=1e-5, atol=0)
    assert model.config.max_position_embeddings == TRAINED, "only the caller knows how much longer"


def test_yarn_slows_the_slow_channels_alone():
    model = model_of()
    before = turns_once_in(model)
    stretch_positions(model, factor=4, scaling="yarn")
    slower = turns_once_in(model) / before
    assert (slower[before < TRAINED / 32] < 1.001).all()
    torch.testing.assert_close(
        slower[before > TRAINED], torch.full_like(slower[before > TRAINED], 4), rtol=1e-4, atol=0
    )
    assert slower[0] < 1.001 < 3.9 < slower[-1], "the shape has both"
    assert model.model.rotary_emb.attention_scaling == pytest.approx(1 + 0.1 * math.log(4))
    assert model.config.max_position_embeddings == 4 * TRAINED


def test_a_stretched_model_is_saved_as_such(tmp_path):
    model = model_of()
    stretch_positions(model, factor=2, scaling="yarn")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = random_tokens(1, 300)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    with pytest.raises(ValueError, match="llama has no plain rotary embedding to stretch, but"):
        stretch_positions(loaded, factor=2, scaling="yarn")


def test_nothing_asked_for_changes_nothing():
    model = model_of()
    before = model.config.to_dict()
    stretch_positions(model)
    stretch_positions(model, 100)
    assert model.config.to_dict() == before
    stretch_positions(model, 1000)
    assert model.config.to_dict() == {**before, "max_position_embeddings": 1000}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"factor": 0.5}, "factor must be a finite number >= 1, got 0.5"),
        ({"factor": float("nan")}, "factor must be a finite number >= 1, got nan"),
        ({"factor": 2.0, "scaling": "longrope"}, "scaling must be one of 'linear', 'yarn', got 'longrope'"),
    ],
)
def test_bad_values(options, said):
    model = model_of()
    with pytest.raises(ValueError, match=said):
        stretch_positions(model, **options)
    assert model.config.max_position_embeddings == TRAINED


def test_yarn_after_interpolation_is_refused():
    model = model_of()
    stretch_positions(model, factor=2)
    with pytest.raises(ValueError, match="YaRN needs a plain rotary embedding"):
        stretch_positions(model, factor=2, scaling="yarn")
