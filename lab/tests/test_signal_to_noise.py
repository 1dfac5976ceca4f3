"""The signal-to-noise formula against the model it describes, simulated with vectors."""

from __future__ import annotations

import math

import pytest
import torch

from moba_lab.signal_to_noise import retrieval_rate, snr

TRIALS = 4000


def scores(head_dim, block_size, num_blocks, gaps):
    """Scores [TRIALS, num_blocks] of mean keys for one query; the first block's first keys agree with it by `gaps`."""
    generator = torch.Generator().manual_seed(0)
    query = torch.zeros(head_dim)
    query[0] = 1.0
    rows = []
    for _ in range(TRIALS // 100):
        keys = torch.randn(100, num_blocks, block_size, head_dim, generator=generator)
        keys /= keys.norm(dim=-1, keepdim=True)
        for i, gap in enumerate(gaps):
            keys[:, 0, i] += gap * query
        rows.append(keys.mean(dim=2) @ query)
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("head_dim", "block_size", "gaps"), [(64, 16, [0.5]), (32, 32, [0.9, 0.4, 0.4]), (128, 8, [0.3, 0.3])]
)
def test_snr_is_that_of_the_simulated_model(head_dim, block_size, gaps):
    right, wrong = scores(head_dim, block_size, 2, gaps).double().unbind(dim=1)
    measured = ((right - wrong).mean() / (right - wrong).std()).item()
    expected = snr(head_dim, block_size, gap=gaps[0], num_related=len(gaps), related_gap=gaps[-1])
    standard_error = math.sqrt((1 + expected**2 / 2) / TRIALS)
    assert abs(measured - expected) < 4 * standard_error


@pytest.mark.parametrize("topk", [2, 3, 6])
def test_retrieval_rate_is_that_of_the_simulated_model(topk):
    row = scores(32, 16, 12, [0.8])
    found = ((row[:, 1:] > row[:, :1]).sum(dim=1) < topk - 1).double().mean().item()
    expected = retrieval_rate(snr(32, 16, gap=0.8), 12, topk)
    assert 0.2 < expected < 0.95
    assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / TRIALS)


def test_what_follows_from_the_formulas():
    assert snr(64, 128) == pytest.approx(0.5)
    assert snr(64, 64, gap=0.3) / snr(64, 128, gap=0.3) == pytest.approx(math.sqrt(2))
    # Two blocks and one place: the wrong one wins with probability Φ(−SNR).
    ratio = snr(64, 32, gap=0.6)
    assert retrieval_rate(ratio, 2, 2) == pytest.approx(0.5 * math.erfc(-ratio / math.sqrt(2)), abs=1e-8)
    # No signal is chance, no place finds nothing, places for all find all.
    assert retrieval_rate(0.0, 10, 4) == pytest.approx(0.3, abs=1e-8)
    assert retrieval_rate(1.0, 10, 1) == 0.0
    assert retrieval_rate(-1.0, 10, 11) == 1.0
    # What docs/routing.md says.
    assert retrieval_rate(snr(64, 128, gap=0.8, num_related=4), 64, 8) == pytest.approx(0.84, abs=0.005)
    assert retrieval_rate(snr(64, 64, gap=0.8, num_related=4), 128, 16) == pytest.approx(0.98, abs=0.005)
    assert retrieval_rate(2.0, 100_000, 9) < retrieval_rate(2.0, 1000, 9) < 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"head_dim": 0},
        {"block_size": 0},
        {"gap": 1.5},
        {"gap": math.nan},
        {"related_gap": -0.1},
        {"num_related": 0},
        {"num_related": 17},
    ],
)
def test_refusals(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        snr(**{"head_dim": 64, "block_size": 16, **options})


def test_refusals_of_the_rate():
    for name, values in (("ratio", (math.inf, 8, 2)), ("num_blocks", (1.0, 0, 2)), ("topk", (1.0, 8, 0))):
        with pytest.raises(ValueError, match=name):
            retrieval_rate(*values)
