"""`python -m moba.hf.serve`: transformers' server, whose models attend with MoBA."""

from __future__ import annotations

import json
import sys

import pytest
from test_hf_paged import alone, prompt, serve
from tiny_models import tiny_model
from transformers.cli.serving.model_manager import ModelManager

from moba import MoBAConfig, register_moba
from moba.hf.serve import main

SPARSE = {"block_size": 8, "topk": 3, "backend": "pytorch", "decode": "moba"}


@pytest.fixture
def run(monkeypatch):
    """Run the command with transformers' own command and loading replaced; what it was asked, what it loads."""
    model, asked = tiny_model().double(), []
    monkeypatch.setattr(ModelManager, "load_model_and_processor", lambda self, name: (model, name))
    monkeypatch.setattr("transformers.cli.transformers.main", lambda: asked.append(sys.argv))
    monkeypatch.setattr(sys, "argv", sys.argv)

    def run(*arguments):
        main(list(arguments))
        return asked, lambda: ModelManager.load_model_and_processor(None, "m")[0], model

    return run


@pytest.mark.parametrize("is_carried", [True, False])
def test_a_loaded_model_attends_with_moba(run, is_carried):
    options = [] if is_carried else ["--moba", json.dumps(SPARSE)]
    asked, load, model = run("M", "--continuous-batching", "--port", "99", *options)
    assert asked == [["transformers", "serve", "M", "--continuous-batching", "--port", "99"]]
    if is_carried:
        with pytest.raises(ValueError, match="no MoBA config"):
            load()
        model.config.moba = SPARSE
    assert load() is model
    tokens = prompt(60)
    register_moba(MoBAConfig(**SPARSE))
    assert serve(model, [tokens]) == [alone(model, tokens)] != [alone(model, tokens, attention="sdpa")]


def test_options_that_cannot_be_honoured(run):
    with pytest.raises(ValueError, match="--continuous-batching must be given"):
        run("M")
    with pytest.raises(ValueError, match="--moba must be a JSON object, got 'x'"):
        run("M", "--continuous-batching", "--moba", "x")
    with pytest.raises(ValueError, match="unknown keys"):
        run("M", "--continuous-batching", "--moba", '{"size": 3}')
