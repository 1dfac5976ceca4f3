"""Schedules: which attention holds when, what switching costs under torch.compile, and what it does to the loss."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_hf_schedule import _registered as _registered
from test_hf_schedule import traceable as traceable
from tiny_models import random_tokens, tiny_model
from torch._dynamo.testing import CompileCounter

from moba import MoBAConfig
from moba_lab.models.key_convolution import add_key_convolution
from moba_lab.models.unrotated import apply_config
from moba_lab.train.model import compile_layers


@pytest.mark.usefixtures("traceable")
@pytest.mark.parametrize(("full_layers", "graphs"), [(0, 1), (3, 3), ((0, 4), 3), (6, 1)])
def test_layers_that_attend_alike_share_a_graph(full_layers, graphs):
    """Beside them, where layers differ, torch makes one for the first layer: it takes the number 0 for a constant."""
    torch.compiler.reset()
    model, tokens = tiny_model(num_hidden_layers=6), random_tokens(1, 48)
    model.set_attn_implementation("moba")
    apply_config(model, MoBAConfig(8, 3, full_layers=full_layers))
    expected = model(tokens, use_cache=False).logits
    counter = CompileCounter()
    compile_layers(model, backend=counter)
    torch.testing.assert_close(model(tokens, use_cache=False).logits, expected)
    assert counter.frame_count == graphs
    torch.compiler.reset()


@pytest.mark.usefixtures("traceable")
def test_the_first_call_of_a_thread_compiles():
    """Nothing has run before it, as at the start of a training."""
    torch.compiler.reset()
    model, tokens = tiny_model(num_hidden_layers=2), random_tokens(1, 48)
    model.set_attn_implementation("moba")
    apply_config(model, MoBAConfig(8, 3))
    compile_layers(model, backend="eager")
    with ThreadPoolExecutor(1) as thread:
        logits = thread.submit(lambda: model(tokens, use_cache=False).logits).result()
    torch.compiler.reset()
    torch.testing.assert_close(logits, model(tokens, use_cache=False).logits)


@pytest.mark.usefixtures("traceable")
@pytest.mark.parametrize("what", ["key convolution", "unrotated"])
def test_layers_with_hooks_share_a_graph(what):
    torch.compiler.reset()
    model, tokens = tiny_model(num_hidden_layers=4), random_tokens(1, 48)
    model.set_attn_implementation("moba")
    apply_config(model, MoBAConfig(8, 3, router="unrotated" if what == "unrotated" else "mean"))
    if what == "key convolution":
        add_key_convolution(model)
    counter = CompileCounter()
    compile_layers(model, backend=counter)
    model(tokens, use_cache=False)
    assert counter.frame_count == 1
    torch.compiler.reset()
