"""MoBAttention: the layer for models that are not transformers'."""

from __future__ import annotations

import doctest

import pytest
import torch
from helpers import assert_close
from tiny_models import random_tokens, tiny_model

from moba import MoBAConfig, MoBAttention, moba_attention, module, register_moba

CONFIG = MoBAConfig(block_size=8, topk=3, decode="moba", backend="pytorch")


def layer(**changes):
    torch.manual_seed(0)
    return MoBAttention(**{"hidden_size": 48, "num_heads": 6, "num_kv_heads": 2, "config": CONFIG, **changes})


def test_the_example_in_the_documentation():
    assert doctest.testmod(module) == (0, 7)


def test_is_the_attention_of_a_llama_layer():
    register_moba(CONFIG)
    model = tiny_model()
    model.set_attn_implementation("moba")
    theirs = model.model.layers[0].self_attn
    ours = MoBAttention(32, 4, 2, 8, config=CONFIG, rope_base=model.config.rope_parameters["rope_theta"])
    ours.load_state_dict(theirs.state_dict())
    tokens = random_tokens(2, 60)
    captured = {}

    def keep(module, args, kwargs, output):
        captured.update(x=kwargs["hidden_states"], out=output[0])

    theirs.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(tokens)
        assert_close(ours(captured["x"]), captured["out"], 1e-5)


def test_tokens_one_by_one_are_the_whole():
    attention = layer()
    x = torch.randn(2, 45, 48)
    expected = attention(x)
    out, past = attention(x[:, :20], return_past=True)
    parts = [out]
    for row in range(20, 45):
        out, past = attention(x[:, row : row + 1], past=past, return_past=True)
        parts.append(out)
    assert_close(torch.cat(parts, dim=1), expected, 1e-5)
    assert past[0].shape == past[1].shape == (2, 45, 2, 8)


def test_decode_is_full_unless_the_config_says_moba():
    x = torch.randn(1, 45, 48)
    sparse, by_default = layer(), layer(config=MoBAConfig(8, 3))
    _, past = sparse(x[:, :-1], return_past=True)
    step = by_default(x[:, -1:], past=past)
    sparse.full = True
    assert_close(step, sparse(x)[:, -1:], 1e-5)
    sparse.full = False
    assert (step - sparse(x)[:, -1:]).abs().max() > 1e-3


def test_full_is_dense_attention():
    attention = layer()
    x = torch.randn(2, 45, 48)
    sparse = attention(x)
    attention.full = True
    dense = attention(x)
    attention.full, attention.config = False, MoBAConfig(8, 6, backend="pytorch")
    assert_close(attention(x), dense, 1e-5)
    assert (sparse - dense).abs().max() > 1e-3


def test_left_padding_is_no_padding():
    attention = layer(bias=True)
    x = torch.randn(2, 40, 48)
    start = torch.tensor([0, 11], dtype=torch.int32)
    out = attention(x, key_start=start)
    assert_close(out[0], attention(x[:1])[0], 1e-5)
    assert_close(out[1, 11:], attention(x[1:, 11:])[0], 1e-5)
    assert torch.equal(out[1, :11], attention.o_proj.bias.expand(11, -1))


def test_without_rotary_embedding():
    attention = layer(rope_base=None, head_dim=7)
    x = torch.randn(1, 30, 48)
    q = attention.q_proj(x).view(1, 30, 6, 7)
    k, v = attention.k_proj(x).view(1, 30, 2, 7), attention.v_proj(x).view(1, 30, 2, 7)
    out = moba_attention(q, k, v, block_size=8, topk=3, backend="pytorch")
    assert torch.equal(attention(x), attention.o_proj(out.flatten(2)))


def test_trains():
    attention = layer()
    attention(torch.randn(2, 40, 48)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attention.parameters())


def test_autocast():
    attention = layer()
    x = torch.randn(1, 40, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(x)
    assert out.dtype == torch.bfloat16
    # Routing may differ between the precisions, so only most of the rows can be close.
    error = (out.float() - attention(x)).norm(dim=-1) / attention(x).norm(dim=-1)
    assert error.median() < 0.03


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("hidden_size", {"hidden_size": 0}),
        ("num_heads", {"num_heads": 2.0}),
        ("num_kv_heads", {"num_kv_heads": 4}),
        ("num_kv_heads", {"num_kv_heads": 0}),
        ("head_dim", {"hidden_size": 50}),
        ("head_dim", {"head_dim": -8}),
        ("head_dim", {"head_dim": 7}),
        ("rope_base", {"rope_base": -1.0}),
        ("config", {"config": {"block_size": 8, "topk": 3}}),
        ("full_layers", {"config": MoBAConfig(8, 3, full_layers=2)}),
    ],
)
def test_refuses_bad_arguments(name, changes):
    with pytest.raises(ValueError, match=name):
        layer(**changes)


def test_refuses_bad_inputs():
    attention = layer()
    x = torch.randn(1, 10, 48)
    past = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)
    with pytest.raises(ValueError, match="x must be"):
        attention(torch.randn(1, 10, 47))
    with pytest.raises(ValueError, match="past values must be"):
        attention(x, past=(past[0], past[1].transpose(1, 2)))
    with pytest.raises(ValueError, match="key_start"):
        attention(x, key_start=[0])
    with pytest.raises(ValueError, match="k and v must have one shape"):
        attention(x, past=(past[0], past[1][:, :4]))
