"""The loss without logits: the same value and gradients as the model's own, and the memory it takes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from inspect import signature

import pytest
import torch
from helpers import LargestNewTensor, assert_close, relative_error
from tiny_models import random_tokens, tiny_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from moba_lab.train.loss import linear_cross_entropy, use_fused_loss


def loss_and_gradients(model, tokens, labels, **options):
    model.zero_grad()
    loss = model(tokens, labels=labels, use_cache=False, **options).loss
    loss.backward()
    return loss, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 1000])
def test_sum_and_gradients_are_those_of_logits(chunk_tokens):
    hidden, weight = (torch.randn(n, 16, dtype=torch.float64, requires_grad=True) for n in (64, 50))
    labels = torch.randint(0, 50, (64,))
    labels[::5] = -100
    total = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)
    expected = F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")
    assert_close(total, expected, 1e-12)
    for got, wanted in zip(
        torch.autograd.grad(total, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        assert_close(got, wanted, 1e-12)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma"])
@pytest.mark.parametrize("num_items", [None, 50])
def test_a_models_loss_stays_what_it_was(family, num_items):
    model, tokens = tiny_model(family).double(), random_tokens(2, 40)
    labels = tokens.clone()
    labels[0, :13] = -100
    fused = copy.deepcopy(model)
    assert use_fused_loss(fused) == "chunked"
    options = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
    loss, gradients = loss_and_gradients(fused, tokens, labels, **options)
    expected, wanted = loss_and_gradients(model, tokens, labels, **options)
    # transformers computes the loss in fp32, whatever the logits' dtype.
    assert_close(loss, expected, 1e-6)
    for got, want in zip(gradients, wanted, strict=True):
        assert_close(got, want, 1e-6)
    with torch.no_grad():
        assert torch.equal(fused(tokens).logits, model(tokens).logits), "without labels nothing changes"


def test_a_copy_computes_its_own_loss_and_is_saved_as_the_model(tmp_path):
    model, tokens = tiny_model(), random_tokens(2, 40)
    use_fused_loss(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.embed_tokens.weight.mul_(-1)
        losses = [one(tokens, labels=tokens).loss for one in (model, copied)]
    assert abs(losses[0] - losses[1]) > 0.01
    assert signature(model.forward) == signature(tiny_model().forward), "callers read names from it"
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LlamaForCausalLM
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_logits_of_all_tokens_never_exist():
    hidden = torch.randn(5000, 4, requires_grad=True)
    weight = torch.randn(300, 4, requires_grad=True)
    labels = torch.randint(0, 300, (5000,))
    with LargestNewTensor() as largest:
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=100).backward()
    assert largest.num_elements <= 100 * 300


@pytest.mark.parametrize("learned", [(True, True), (True, False), (False, True), (False, False)])
def test_only_gradients_that_are_needed_exist(learned):
    hidden, weight = (torch.randn(n, 16, requires_grad=needs) for n, needs in zip((64, 50), learned, strict=True))
    labels = torch.randint(0, 50, (64,))
    total = linear_cross_entropy(hidden, weight, labels, chunk_tokens=7)
    assert total.requires_grad == any(learned)
    if any(learned):
        total.backward()
    assert [x.grad is not None for x in (hidden, weight)] == list(learned)


def test_more_chunks_round_no_more():
    hidden, weight = (torch.randn(n, 16, requires_grad=True) for n in (4096, 50))
    labels = torch.randint(0, 50, (4096,))
    (expected,) = torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum"), weight)
    errors = []
    for chunk_tokens in (4096, 64):
        with torch.autocast("cpu", torch.bfloat16):
            total = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)
        (gradient,) = torch.autograd.grad(total, weight)
        assert gradient.dtype == torch.float32
        errors.append(relative_error(gradient, expected))
    assert errors[1] < 1.1 * errors[0]


def test_labels_that_are_all_ignored():
    model, tokens = tiny_model(), random_tokens(1, 20)
    use_fused_loss(model)
    loss, gradients = loss_and_gradients(model, tokens, torch.full_like(tokens, -100))
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


def test_models_whose_logits_are_more_than_a_product():
    import transformers

    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    gemma = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**shape, **heads))
    assert use_fused_loss(gemma, "auto") == "logits"
    assert gemma(random_tokens(1, 8), labels=random_tokens(1, 8)).logits is not None
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        use_fused_loss(gemma, "chunked")
    with pytest.raises(ValueError, match="loss must be one of"):
        use_fused_loss(gemma, "best")


def test_liger_computes_the_same():
    """Its Triton kernel runs in the interpreter, chosen when it is imported: in a process of its own."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    code = """
import torch
from moba.backends.triton import interpreter
interpreter.repair()
from moba_lab.train.loss import _liger, linear_cross_entropy
torch.manual_seed(0)
hidden, weight = torch.randn(24, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
labels = torch.randint(0, 50, (24,))
labels[::5] = -100
both = (_liger, linear_cross_entropy)
gradients = [torch.autograd.grad(f(hidden, weight, labels) / 19, (hidden, weight)) for f in both]
for got, wanted in zip(*gradients):
    torch.testing.assert_close(got, wanted)
torch.testing.assert_close(_liger(hidden, weight, labels), linear_cross_entropy(hidden, weight, labels))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
