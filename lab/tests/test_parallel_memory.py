"""How much memory context parallelism takes of each GPU, counted at full size without one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def memory():
    path = Path(__file__).parents[2] / "benchmarks" / "parallel_memory.py"
    spec = importlib.util.spec_from_file_location("parallel_memory", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_storages_are_counted_from_their_making_to_their_end(memory):
    with memory.Allocations() as counted:
        x = torch.empty(100, dtype=torch.float32)
        y = x[10:].view(9, 10)
        assert counted.now == 400
        z = x + 1
        del x
        assert counted.now == 800
        del y
        assert counted.now == 400
    assert (counted.peak, z.numel()) == (800, 100)


def test_the_count_is_what_gpus_measured(memory):
    records = memory.measured()
    assert len(records) > 5
    for record in records:
        assert record["counted"] == pytest.approx(record["measured"], rel=0.005), record["case"]


def test_two_million_tokens_take_each_of_two_gpus_less_than_65_percent_of_one(memory):
    found = memory.count(memory.CASES[0], 2)
    for way in ("gather", "selective, 100% of the remote blocks chosen", "selective, 10% of the remote blocks chosen"):
        assert max(found["ways"][way]) <= 0.65 * found["one"], way


def test_what_is_selected_takes_memory_by_the_rank(memory):
    """Where routings are clustered: a quarter on four times as many."""
    case = memory.CASES[0]
    two, eight = (max(memory.on_rank(case, n, rank, "selective", 0.1) for rank in range(n)) for n in (2, 8))
    assert eight <= 1.1 * two / 4
    gathered = max(memory.on_rank(case, 8, rank, "gather") for rank in range(8))
    assert gathered > 1.3 * eight
