"""Muon beside AdamW: against torch's own, a matrix at a time, and what it takes and refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moba_lab.train.optimizer import Muon, make_muon, orthogonal

SHAPES = [(8, 8), (24, 8), (8, 24), (24, 8)]


def _weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def _grads(weights, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in weights:
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is of torch 2.9")
def test_steps_are_torchs():
    ours, theirs = _weights(), _weights()
    mine = Muon([{"params": ours, "muon": True}], lr=0.02, weight_decay=0.1)
    own = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        _grads(ours, step)
        _grads(theirs, step)
        mine.step()
        own.step()
    for before, a, b in zip(_weights(), ours, theirs, strict=True):
        # Both iterate in bf16, whose rounding depends on how products are summed up.
        assert (a - b).norm() < 0.01 * (b - before).norm()


def test_the_rest_is_adamws():
    ours, theirs = _weights(), _weights()
    mine = Muon([{"params": ours[:2]}, {"params": ours[2:], "weight_decay": 0.0}], lr=0.02, weight_decay=0.1)
    own = torch.optim.AdamW(
        [{"params": theirs[:2]}, {"params": theirs[2:], "weight_decay": 0.0}],
        lr=0.02,
        betas=(0.9, 0.95),
        weight_decay=0.1,
    )
    for step in range(3):
        _grads(ours, step)
        _grads(theirs, step)
        mine.step()
        own.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 8, 24), (3, 24, 8), (1, 16, 16)])
def test_singular_values_come_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices).float())
    assert values.min() > 0.4
    assert values.max() < 1.3
    # The singular vectors stay: u σ vᵀ becomes u vᵀ, up to how near 1 the values come.
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.cosine_similarity((u @ v).flatten(1), orthogonal(matrices).float().flatten(1)).min() > 0.95


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.layer, self.norm = nn.Embedding(10, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 10, bias=False)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def get_output_embeddings(self):
        return self.head


def test_which_weights_are_whose():
    model = Tied()
    muon, tables, vectors = make_muon(model, lr=1e-3, weight_decay=0.1, beta2=0.9).param_groups
    assert [id(p) for p in muon["params"]] == [id(model.layer.weight)]
    assert {id(p) for p in tables["params"]} == {id(model.table.weight), id(model.head.weight)}
    assert {id(p) for p in vectors["params"]} == {id(p) for p in (model.layer.bias, *model.norm.parameters())}
    assert (muon["weight_decay"], tables["weight_decay"], vectors["weight_decay"]) == (0.1, 0.1, 0.0)
    assert tables["betas"] == (0.9, 0.9)


def test_a_saved_state_goes_on_as_if_uninterrupted():
    model = Tied()
    optimizer = make_muon(model, lr=1e-2, weight_decay=0.1, beta2=0.95)

    def steps(model, optimizer, seeds):
        for seed in seeds:
            _grads([p for p in model.parameters() if p.requires_grad], seed)
            optimizer.step()

    steps(model, optimizer, [0, 1])
    other = copy.deepcopy(model)
    resumed = make_muon(other, lr=1e-2, weight_decay=0.1, beta2=0.95)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, [2, 3])
    steps(other, resumed, [2, 3])
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_schedule_of_the_learning_rate_reaches_all_weights():
    model = Tied()
    optimizer = make_muon(model, lr=1e-2, weight_decay=0.0, beta2=0.95)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(model.state_dict())
    _grads([p for p in model.parameters() if p.requires_grad], 0)
    optimizer.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_what_it_returns_of_a_closure():
    optimizer = Muon([{"params": (weights := _weights()), "muon": True}], lr=0.0)
    _grads(weights, 0)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert optimizer.step() is None
