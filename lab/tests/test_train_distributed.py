"""Two processes on a CPU: torchrun, and the pieces of a step under torch's fully_shard (FSDP2)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_train import RECIPE
from tiny_models import random_tokens, tiny_model
from tiny_shards import save_shards
from torch.distributed.fsdp import fully_shard

from moba import MoBAConfig, register_moba
from moba.hf.schedule import apply_schedule, hybrid
from moba.parallel.process import end_process
from moba_lab.train.loss import use_fused_loss
from moba_lab.train.model import checkpoint_activations
from moba_lab.train.packing import SharedRows


def test_two_processes_take_the_steps_of_one(tmp_path):
    """Each with rows of its own, and each with half of every row."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("DATA", str(save_shards(tmp_path / "data"))))
    command = ["-m", "moba_lab", "train", str(recipe), "-s", "training.tokens=1536", "-s", "training.evaluate_every=6"]
    # accelerate's own launcher starts one process on a CPU, whatever it is told.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    across = ["--context-parallel", "2"]
    logs = []
    for name, start, options in (("one", [sys.executable], []), ("two", launch, []), ("across", launch, across)):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [*start, *command, *options, "--out", str(tmp_path / name)], capture_output=True, text=True,
            env=environment,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("trained:") == 1, "only the first process speaks"
        logs.append([json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()])
        assert (tmp_path / name / "model" / "model.safetensors").is_file()
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in logs]
    assert len(losses[0]) == 12
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    norms = [[line["grad_norm"] for line in lines if "loss" in line] for lines in (logs[0], logs[2])]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    held_out = [[line for line in lines if any(name.endswith("_loss") for name in line)] for lines in logs]
    assert len(held_out[0]) == len(held_out[2]) > 0
    for one, two in zip(held_out[0], held_out[2], strict=True):
        for name in one:
            if name.endswith("_loss"):
                assert two[name] == pytest.approx(one[name], rel=1e-5)


def test_rows_shared_by_processes_come_in_the_same_order():
    rows = list(range(8))
    for num_ranks, batch_size, num_processes in ((2, 1, 4), (2, 2, 4), (4, 2, 4)):
        shared = SharedRows(rows, num_ranks, batch_size)
        everything = [shared[i] for i in range(len(shared))]
        dealt = [everything[i : i + batch_size] for i in range(0, len(everything), batch_size)]
        by_process = [[row for batch in dealt[i::num_processes] for row in batch] for i in range(num_processes)]
        groups = [by_process[i : i + num_ranks] for i in range(0, num_processes, num_ranks)]
        assert all(process == group[0] for group in groups for process in group)
        assert sorted(row for group in groups for row in group[0]) == rows


def losses_of_steps(model, tokens, average):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(6):
        apply_schedule(model, hybrid(MoBAConfig(8, 2)), step / 6)
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(average(loss.detach()))
    return losses


def sharded_process():
    """One of the two processes; the first prints its losses."""
    dist.init_process_group("gloo")
    register_moba(None)
    model = tiny_model()
    model.set_attn_implementation("moba")
    use_fused_loss(model)
    checkpoint_activations(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)

    def average(loss):
        dist.all_reduce(loss)
        return loss.item() / 2

    rank = dist.get_rank()
    losses = losses_of_steps(model, random_tokens(2, 64)[rank : rank + 1], average)
    if rank == 0:
        print(json.dumps(losses))
    end_process()


def test_sharded_steps_are_the_steps_of_one():
    register_moba(None)
    model = tiny_model()
    model.set_attn_implementation("moba")
    expected = losses_of_steps(model, random_tokens(2, 64), torch.Tensor.item)
    code = "import sys; sys.path[:0] = sys.argv[1:]; import test_train_distributed as t; t.sharded_process()"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python", sys.executable]
    result = subprocess.run(
        [sys.executable, *launch, "-c", code, str(Path(__file__).parent), str(Path(__file__).parents[2] / "tests")],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == pytest.approx(expected, rel=1e-5)
