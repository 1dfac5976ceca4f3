import pytest
import torch
from helpers import assert_close, assert_is_rounded
from hypothesis import given, settings
from hypothesis import strategies as st

from moba import merge_partials


def attend(q, k, v):
    scores = q @ k.T
    return torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 1000))
def test_parts_of_the_keys_make_the_whole(lengths, seed):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(n, 8, dtype=torch.float64) for n in (5, sum(lengths), sum(lengths)))
    parts = [attend(q, keys, values) for keys, values in zip(k.split(lengths), v.split(lengths), strict=True)]
    out, lse = merge_partials(torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]))
    expected_out, expected_lse = attend(q, k, v)
    assert_close(out, expected_out, 1e-12)
    assert_close(lse, expected_lse, 1e-12)


def test_parts_without_keys_are_ignored():
    outs = torch.tensor([[[1.0, 2.0], [torch.nan, torch.nan]], [[torch.nan, torch.inf], [torch.nan, 0.0]]])
    lses = torch.tensor([[0.5, -torch.inf], [-torch.inf, -torch.inf]])
    out, lse = merge_partials(outs, lses)
    assert out.tolist() == [[1.0, 2.0], [0.0, 0.0]]
    assert lse.tolist() == [0.5, -torch.inf]


def test_half_inputs_are_summed_in_fp32():
    outs = torch.randn(16, 10, 4).bfloat16()
    lses = torch.randn(16, 10)
    out, lse = merge_partials(outs, lses)
    expected = (torch.softmax(lses.double(), 0)[..., None] * outs.double()).sum(0)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert_is_rounded(out, expected)


def test_gradients():
    outs = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    lses = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(merge_partials, (outs, lses))


def test_gradients_where_no_part_has_a_key():
    outs = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    lses = torch.tensor(
        [[0.5, -torch.inf, -torch.inf], [1.5, 2.0, -torch.inf]], dtype=torch.float64, requires_grad=True
    )
    out, lse = merge_partials(outs, lses)
    d_outs, d_lses = torch.autograd.grad((out, lse), (outs, lses), (torch.ones_like(out), torch.ones_like(lse)))
    assert torch.isfinite(d_outs).all()
    assert torch.isfinite(d_lses).all()
    assert d_lses[0, 1:].tolist() == [0.0, 0.0]
    assert d_lses[1, 1:].tolist() == [1.0, 0.0]
    assert (d_outs[:, 2] == 0).all()


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"got \(3, 4, 2\) and \(3, 5\)"):
        merge_partials(torch.zeros(3, 4, 2), torch.zeros(3, 5))
