"""The indexers' loss: its value and gradients by the formula, whom it trains, and that training finds the mass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import LargestNewTensor, assert_close
from test_hf_indexer import CONFIG, POOLS, indexed_model, logits, registered  # noqa: F401
from tiny_models import positions_of, random_tokens

from moba.hf import set_moba_config
from moba.hf.indexer import choose_by_index
from moba.hf.indexer_training import Target, _Divergence, indexer_loss

SIZE = 4
DENSE = replace(CONFIG, full_layers=3)


def naive_loss(by_q, by_k, target):
    """The mean over queries with a past block, and heads, of KL(P || Q), one query and head at a time."""
    losses, group = [], target.q.shape[2] // by_q.shape[2]
    for row, start, stop in target.spans:
        for t in range(start + SIZE, stop):
            own = (t - start) // SIZE
            keys = target.k[row, start : t + 1]
            for g in range(by_q.shape[2]):
                past = list(range(own))
                if target.chosen is not None:
                    past = [j for j in past if j in target.chosen[row, t, g]]
                if not past:
                    losses.append(by_q.new_zeros(()))
                    continue
                places = [[j * SIZE + i for i in range(SIZE) if j * SIZE + i <= t - start] for j in (*past, own)]
                mass = 0
                for h in range(g * group, (g + 1) * group):
                    x = target.scale * keys[:, g] @ target.q[row, t, h]
                    x = target.softcap * torch.tanh(x / target.softcap) if target.softcap else x
                    parts = torch.stack([x[place].exp().sum() for place in places])
                    sink = 0 if target.sinks is None else target.sinks[h].exp()
                    mass = mass + parts[:-1] / (parts.sum() + sink)
                p = mass / mass.sum()
                products = [by_k[row, start + j * SIZE : start + (j + 1) * SIZE, g] @ by_q[row, t, g] for j in past]
                scores = torch.stack([x.max() if target.pool == "max" else x.mean() for x in products])
                log_q = (scores * by_q.shape[-1] ** -0.5).log_softmax(0)
                losses.append((p * (p.log() - log_q)).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("softmax", [{}, {"softcap": 2.0, "sinks": torch.randn(4).double()}], ids=["plain", "all"])
@pytest.mark.parametrize("small", [False, True])
def test_value_and_gradients(monkeypatch, pool, is_sparse, softmax, small):
    if small:  # chunks of a few rows and of one block
        monkeypatch.setattr("moba.hf.indexer_training._PRODUCTS", {"cpu": 80})
        monkeypatch.setattr("moba.backends.pytorch.block_scores.MAX_LOGITS", {"cpu": 80})
        monkeypatch.setattr("moba.routers._PRODUCTS_PER_CHUNK", 30)
    by_q, by_k, k = (torch.randn(2, 27, 2, 6).double() for _ in range(3))
    q, spans = torch.randn(2, 27, 4, 6).double(), [(0, 0, 27), (1, 2, 5), (1, 5, 24)]
    target = Target(q, k, None, spans, SIZE, pool, 0.7, **softmax)
    if is_sparse:
        chosen = torch.randint(-1, 7, (2, 27, 2, 3)).int()
        target = target._replace(chosen=chosen)
    found = []
    for loss_of in (naive_loss, _Divergence.apply):
        inputs = [x.clone().requires_grad_() for x in (by_q, by_k)]
        loss = loss_of(*inputs, target)
        found.append([loss, *torch.autograd.grad(3 * loss, inputs)])
    for expected, actual in zip(*found, strict=True):
        assert_close(actual, expected, 1e-12)


def weights(model):
    """The indexers' weights, and the model's own."""
    named = list(model.named_parameters())
    return [w for n, w in named if "moba_indexer" in n], [w for n, w in named if "moba_indexer" not in n]


@pytest.mark.parametrize("config", [CONFIG, DENSE], ids=["sparse", "dense"])
def test_each_loss_trains_its_own(config):
    model, tokens = indexed_model(config=config).train(), random_tokens(2, 40)
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    indexers, own = weights(model)
    assert all(w.grad is None for w in indexers)
    assert all(w.grad.abs().max() > 0 for w in own)
    model.zero_grad()
    indexer_loss(model).backward()
    assert all(w.grad.abs().max() > 0 for w in indexers)
    assert all(w.grad is None for w in own)
    with pytest.raises(ValueError, match="no layer has computed an indexer loss"):
        indexer_loss(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(tokens, use_cache=False)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        indexer_loss(model)
    model.eval()(tokens, use_cache=False)
    with pytest.raises(ValueError, match="no layer has computed an indexer loss"):
        indexer_loss(model)


@pytest.mark.parametrize("config", [CONFIG, DENSE], ids=["sparse", "dense"])
@pytest.mark.parametrize("layout", ["plain", "padded", "packed"])
def test_recomputed_activations_change_nothing(config, layout):
    model, tokens = indexed_model(config=config).train(), random_tokens(1, 40)
    mask = torch.ones_like(tokens)
    mask[0, 30:] = 0
    inputs = {"plain": {}, "padded": {"attention_mask": mask}, "packed": {"position_ids": positions_of([17, 23])}}
    found = []
    for recomputes in (False, True):
        model.zero_grad()
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(tokens, labels=tokens, use_cache=False, **inputs[layout]).loss + indexer_loss(model)
        loss.backward()
        with pytest.raises(ValueError, match="no layer has computed"):
            indexer_loss(model)
        found.append([loss, *(w.grad for w in model.parameters())])
    for expected, actual in zip(*found, strict=True):
        assert_close(actual, expected, 1e-12)


def test_sparse_layers_learn_the_selected_blocks_alone():
    model, tokens = (
        indexed_model(config=replace(DENSE, full_layers=1), num_hidden_layers=1).train(),
        random_tokens(1, 40),
    )
    losses = []
    for config in (replace(DENSE, full_layers=1), replace(CONFIG, topk=10), CONFIG):
        set_moba_config(model, config)
        model(tokens, use_cache=False)
        losses.append(indexer_loss(model))
    assert_close(losses[1], losses[0], 1e-12)
    assert (losses[2] - losses[0]).abs() > 0.01


def test_padding_does_not_count():
    model, tokens = indexed_model(config=DENSE).train(), random_tokens(1, 40)
    model(tokens[:, :30], use_cache=False)
    expected = indexer_loss(model)
    mask = torch.ones_like(tokens)
    mask[0, 30:] = 0
    model(tokens, attention_mask=mask, use_cache=False)
    assert_close(indexer_loss(model), expected, 1e-12)


@pytest.mark.parametrize("pool", POOLS)
def test_memory_stays_below_tokens_times_tokens(pool):
    q, k, length = torch.randn(1, 4096, 2, 4), torch.randn(1, 4096, 1, 4), 4096
    target = Target(q, k, None, [(0, 0, length)], 16, pool)
    with LargestNewTensor() as largest:
        _Divergence.apply(k.clone().requires_grad_(), k.clone().requires_grad_(), target).backward()
    assert largest.num_elements <= length * length / 16


def recall(model, tokens, pool):
    """The share of the past blocks' mass, in the first layer's heads together, that its indexer's two choices hold."""
    seen = {}
    layer = model.model.layers[0].self_attn
    hook = layer.moba_indexer.register_forward_hook(lambda module, args, vectors: seen.update(by=vectors))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        layer.moba_indexer.call = None
        probabilities = model(tokens, output_attentions=True, use_cache=False).attentions[0]
        model.set_attn_implementation("moba")
        model(tokens, use_cache=False)
    hook.remove()
    length = tokens.shape[1]
    mass = probabilities.unflatten(1, (2, 2)).sum(2).unflatten(-1, (length // SIZE, SIZE)).sum(-1).transpose(1, 2)
    chosen = choose_by_index(layer, *seen["by"], None, CONFIG, "auto").long()
    own = torch.arange(length)[:, None, None] // SIZE
    past = mass.masked_fill(torch.arange(length // SIZE) >= own, 0)
    held = past.gather(-1, chosen.clamp(min=0)).masked_fill((chosen < 0) | (chosen == own), 0).sum(-1)
    late = slice(4 * SIZE, None)
    return (held[:, late] / past.sum(-1)[:, late]).mean().item()


@pytest.mark.parametrize("pool", POOLS)
def test_training_finds_the_mass(pool):
    model = indexed_model(pool, head_dim=8, config=DENSE).float().train()
    held_out, losses = random_tokens(16, 48), []
    before = recall(model, held_out, pool)
    optimizer = torch.optim.Adam(weights(model)[0], lr=1e-2)
    for step in range(100):
        set_moba_config(model, DENSE if step < 80 else CONFIG)
        model(torch.randint(2, 64, (8, 48)), use_cache=False)
        loss = indexer_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = recall(model, held_out, pool)
    assert losses[79] < losses[0] / 2
    assert after > before + 0.1
