"""Evaluations against what a plain forward pass gives."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import random_tokens, tiny_model

from moba import MoBAConfig, register_moba
from moba.cli.options import Backend, choose_config
from moba.evals.language import append_copy, copy_recall, perplexity, summarise, token_losses
from moba.hf import set_moba_config


@pytest.fixture(scope="module")
def model():
    register_moba(None)
    model = tiny_model()
    set_moba_config(model, MoBAConfig(4, 3))
    return model


@pytest.mark.parametrize("attention", ["sdpa", "moba"])
@pytest.mark.parametrize("chunk_tokens", [7, 20, 64])
def test_losses_are_those_of_one_forward_pass(model, attention, chunk_tokens):
    model.set_attn_implementation(attention)
    tokens = random_tokens(1, 61)
    with torch.no_grad():
        expected = F.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:], reduction="none")
    losses = token_losses(model, tokens[0], chunk_tokens=chunk_tokens)
    assert losses.shape == (60,)
    # fp32 sums in another order, through layers of deliberately large weights.
    assert torch.allclose(losses, expected, atol=1e-3)


def test_attention_matters_to_the_losses(model):
    tokens = random_tokens(1, 61)[0]
    model.set_attn_implementation("sdpa")
    dense = token_losses(model, tokens)
    model.set_attn_implementation("moba")
    assert (token_losses(model, tokens) - dense).abs().max() > 0.1


def test_summary_of_known_losses():
    record = summarise(torch.tensor([math.log(2.0)] * 3 + [math.log(8.0)] * 2), last=2)
    assert record["num_tokens"] == 5
    assert record["perplexity"] == pytest.approx(2 ** (9 / 5))
    assert record["perplexity_last"] == pytest.approx(8)
    assert [part["start"] for part in record["positions"]] == [0, 2, 4]
    assert [part["perplexity"] for part in record["positions"]] == pytest.approx([2, 4, 8])


def test_perplexity_summarises_the_model_s_losses(model):
    tokens = random_tokens(1, 50)[0]
    assert perplexity(model, tokens, last=10) == summarise(token_losses(model, tokens), last=10)


def test_copy_is_appended_from_the_given_distance():
    text = append_copy(torch.arange(20), num_copied=5, distance=8)
    assert text.tolist() == [*range(20), 12, 13, 14, 15, 16]
    assert text[20 - 8] == text[20]


def test_copy_recall_looks_at_the_copies(model):
    tokens = random_tokens(1, 40)[0]
    record = copy_recall(model, tokens, num_copied=6, distance=20)
    losses = token_losses(model, append_copy(tokens, num_copied=6, distance=20))
    # Losses have no entry for the first token: loss i is that of token i + 1, and the copy's own first one is left out.
    assert record["perplexity_second"] == pytest.approx(losses[40:].mean().exp().item())
    assert record["perplexity_first"] == pytest.approx(losses[20:25].mean().exp().item())


class Rememberer(torch.nn.Module):
    """Predicts the token that followed the last earlier appearance of the current one."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        from transformers import LlamaConfig

        self.config = LlamaConfig(num_hidden_layers=1)
        self.seen = []

    def forward(self, input_ids, past_key_values, use_cache):
        logits = torch.zeros(1, input_ids.shape[1], 100)
        for i, token in enumerate(input_ids[0].tolist()):
            if token in self.seen:
                logits[0, i, self.seen[len(self.seen) - self.seen[::-1].index(token)]] = 20.0
            self.seen.append(token)
        return type("Output", (), {"logits": logits})


def test_copy_recall_is_low_for_a_model_that_remembers():
    record = copy_recall(Rememberer(), torch.randperm(100)[:80], num_copied=20, distance=40, chunk_tokens=16)
    assert record["perplexity_second"] < 1.01
    assert record["perplexity_first"] > 50


@pytest.mark.parametrize(("num_copied", "distance"), [(1, 8), (9, 8), (5, 21)])
def test_the_passage_must_lie_in_the_text(num_copied, distance):
    with pytest.raises(ValueError, match="num_copied"):
        append_copy(torch.arange(20), num_copied=num_copied, distance=distance)


@pytest.mark.parametrize("tokens", [torch.zeros(1, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long)])
def test_losses_need_a_sequence(model, tokens):
    with pytest.raises(ValueError, match="tokens"):
        token_losses(model, tokens)


def test_the_command_lines_default_is_the_choice_of_the_quality_table():
    results = json.loads((Path(__file__).parent.parent / "benchmarks" / "results" / "quality.json").read_text())
    losses, share = {}, {}
    for row in results["rows"]:
        setting = json.dumps(row["config"])
        losses.setdefault(setting, []).append(math.log(row["perplexity"]))
        share[setting] = row["keys_read"]
    documents = len(losses["null"])
    means = {setting: sum(values) / documents for setting, values in losses.items() if len(values) == documents}
    within = [setting for setting, mean in means.items() if mean <= means["null"] + math.log(1.05)]
    sparsest = json.loads(min(within, key=lambda setting: share[setting]))
    assert share[json.dumps(sparsest)] <= 0.35
    default = choose_config(None, Backend.auto, None).config
    assert MoBAConfig.from_dict(sparsest) == default
