"""Schedules: which attention holds when, what switching costs under torch.compile, and what it does to the loss."""

from __future__ import annotations

import pytest
import torch
from tiny_models import logits, random_tokens, tiny_model
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from moba import MoBAConfig, register_moba
from moba.hf.schedule import (
    Schedule,
    activation,
    anneal_block_size,
    anneal_topk,
    apply_schedule,
    hybrid,
    mixed,
    throughout,
)

SPARSE = MoBAConfig(8, 3, keep_first=1)


@pytest.fixture(autouse=True)
def _registered():
    register_moba(None)


def fields_of(schedule, field, num_layers=3):
    return [getattr(schedule.at(start, num_layers), field) for start, _ in schedule.stages]


def test_stages_begin_where_they_say():
    assert throughout(SPARSE).at(0.0, 3) == throughout(SPARSE).at(1.0, 3) == SPARSE
    full = MoBAConfig(8, 3, keep_first=1, full_layers=3)
    assert [activation(SPARSE, at=0.25).at(p, 3) for p in (0, 0.2499, 0.25, 1)] == [full, full, SPARSE, SPARSE]
    assert [hybrid(SPARSE).at(p, 3) for p in (0, 0.8999, 0.9, 1)] == [SPARSE, SPARSE, full, full]
    assert throughout(None).at(0.5, 3).full_layers == 3


def test_mixing_has_full_steps_but_for_the_last():
    def full_steps(num_steps, **options):
        schedule = mixed(SPARSE, num_steps=num_steps, **options)
        return [step for step in range(num_steps) if schedule.at(step / num_steps, 3) != SPARSE]

    assert full_steps(17, every=4) == [0, 4, 8, 12], "the model is saved with MoBA"
    assert full_steps(900, every=8) == list(range(0, 900, 8))
    assert full_steps(20, every=4, at=0.3) == [0, 1, 2, 3, 4, 5, 8, 12, 16]


def test_annealing_ends_at_the_config():
    schedule = anneal_topk(SPARSE, start=32, until=0.5, num_stages=4)
    assert fields_of(schedule, "topk") == [32, 15, 7, 3]
    assert [start for start, _ in schedule.stages] == pytest.approx([0, 1 / 6, 1 / 3, 1 / 2])
    assert fields_of(anneal_block_size(SPARSE, start=64, num_stages=4), "block_size") == [64, 32, 16, 8]
    assert fields_of(anneal_topk(SPARSE, start=4, num_stages=8), "topk") == [4, 3], "equal stages are one"
    wide = anneal_topk(SPARSE, start=32, num_stages=4, length=15 * 8)
    assert [config and config.topk for _, config in wide.stages] == [None, 7, 3], "stages that cover it are full"
    assert wide.stages[1][0] == schedule.stages[2][0]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Schedule(()), "stages"),
        (lambda: Schedule(((0.1, SPARSE),)), "stages"),
        (lambda: Schedule(((0, SPARSE), (1.0, None))), "stages"),
        (lambda: Schedule(((0, SPARSE), (0.5, None), (0.5, SPARSE))), "stages"),
        (lambda: Schedule(tuple((i / 20, MoBAConfig(8, 3 + i)) for i in range(9))), "at most 8"),
        (lambda: activation(SPARSE, at=0), "at must lie"),
        (lambda: hybrid(SPARSE, full_from=1.5), "full_from must lie"),
        (lambda: mixed(SPARSE, every=1, num_steps=9), "every must be an integer >= 2"),
        (lambda: mixed(SPARSE, every=2, num_steps=1), "num_steps must be an integer >= 2"),
        (lambda: mixed(SPARSE, every=2, num_steps=9, at=1), "at must lie"),
        (lambda: anneal_topk(SPARSE, start=2), "start must be an integer >= 3"),
        (lambda: anneal_topk(SPARSE, start=9, num_stages=9), "num_stages"),
        (lambda: anneal_block_size(SPARSE, start=16, until=1.0), "until"),
        (lambda: throughout(SPARSE).at(1.5, 3), "progress"),
    ],
)
def test_bad_schedules_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_model_of_another_attention_is_refused():
    with pytest.raises(ValueError, match="'sdpa'"):
        apply_schedule(tiny_model(), throughout(SPARSE), 0)
    model = tiny_model()
    model.set_attn_implementation("moba")
    with pytest.raises(ValueError, match="full_layers must fit"):
        apply_schedule(model, throughout(MoBAConfig(8, 3, full_layers=9)), 0)


def test_a_switched_model_computes_what_it_should():
    model, tokens = tiny_model(), random_tokens(1, 100)
    full = logits(model, tokens, "sdpa")
    model.set_attn_implementation("moba")
    schedule = hybrid(SPARSE)
    assert apply_schedule(model, schedule, 0.0)
    assert not apply_schedule(model, schedule, 0.5), "nothing changed"
    sparse = logits(model, tokens)
    assert (sparse - full).abs().max() > 0.1
    assert apply_schedule(model, schedule, 0.95)
    torch.testing.assert_close(logits(model, tokens), full)
    apply_schedule(model, schedule, 0.0)
    assert torch.equal(logits(model, tokens), sparse)


def steps_of_a_compiled_model(num_steps, **options):
    """Frames that torch.compile had compiled after each step, while a schedule of twelve stages switches among three
    attentions; each step's loss is compared with the model's, not compiled.
    """
    torch.compiler.reset()
    model, tokens = tiny_model(num_hidden_layers=2), random_tokens(1, 48)
    model.set_attn_implementation("moba")
    schedule = Schedule(tuple((i / 12, (None, SPARSE, MoBAConfig(16, 2))[i % 3]) for i in range(12)))
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, **options)
    frames = []
    for step in range(num_steps):
        apply_schedule(compiled, schedule, step / num_steps)
        loss = compiled(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        with torch.no_grad():
            expected = model(tokens, labels=tokens, use_cache=False).loss
        torch.testing.assert_close(loss.detach(), expected)
        frames.append(counter.frame_count)
    torch.compiler.reset()
    return frames


@pytest.fixture
def traceable(monkeypatch):
    """An attention that torch.compile can trace, as the Triton backend's is."""

    def attention(q, k, v, *, block_size, topk, **options):
        position = torch.arange(q.shape[1])
        near = position[:, None] // block_size - position // block_size < topk
        mask = near & (position[:, None] >= position)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr("moba.hf.attention.moba_attention", attention)


@pytest.mark.usefixtures("traceable")
def test_one_graph_for_each_different_stage():
    frames = steps_of_a_compiled_model(24, fullgraph=True)
    assert frames == [1, 1, 2, 2, *[3] * 20]


def test_returning_to_a_stage_compiles_nothing():
    """With the backend of CPUs, which breaks graphs at its loops: several frames a stage, but none a third time (the
    first stage is compiled again once, now that the weights have gradients).
    """
    frames = steps_of_a_compiled_model(12)
    assert frames[0] < frames[1] < frames[2]
    assert set(frames[6:]) == {frames[6]}


def test_switching_does_not_move_the_loss():
    """A model that learned with full attention to copy from 40 tokens back goes on with MoBA, and back again."""
    model = tiny_model(hidden_size=64, num_hidden_layers=2, head_dim=16, initializer_range=0.05).train()
    model.set_attn_implementation("moba")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    routed, near = MoBAConfig(16, 4), MoBAConfig(16, 2, router="recent")
    schedule = Schedule(((0.0, None), (0.9, routed), (0.95, None)))
    num_steps = 200
    losses = []
    for step in range(num_steps):
        tokens = torch.randint(2, 64, (8, 40), generator=generator).repeat(1, 5)[:, :192]
        if step == 180:
            with torch.no_grad():
                apply_schedule(model, throughout(near), 0)
                blind = model(tokens, labels=tokens, use_cache=False).loss.item()
        apply_schedule(model, schedule, step / num_steps)
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    before = losses[170:180]
    assert losses[0] > 4 > 1.1 > max(before), "it has learned"
    assert blind > 2 * max(before), "and what it learned needs blocks that lie back"
    assert max(losses[180:]) < 1.05 * max(before)
