"""Two processes on a CPU: `accelerate launch`, and the pieces of a step under torch's fully_shard (FSDP2)."""

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
from moba.train import apply_schedule, hybrid
from moba.train.loss import use_fused_loss
from moba.train.model import checkpoint_activations


def test_two_processes_take_the_steps_of_one(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("DATA", str(save_shards(tmp_path / "data"))))
    command = ["-m", "moba", "train", str(recipe), "-s", "training.tokens=1536"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines",
              "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    losses = []
    for name, start in (("one", [sys.executable]), ("two", launch)):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [*start, *command, "--out", str(tmp_path / name)], capture_output=True, text=True, timeout=200,
            env=environment,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("trained:") == 1, "only the first process speaks"
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
        assert (tmp_path / name / "model" / "model.safetensors").is_file()
    assert len(losses[0]) == 12
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


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
    dist.destroy_process_group()


def test_sharded_steps_are_the_steps_of_one():
    register_moba(None)
    model = tiny_model()
    model.set_attn_implementation("moba")
    expected = losses_of_steps(model, random_tokens(2, 64), torch.Tensor.item)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_train_distributed as t; t.sharded_process()"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python", sys.executable]
    result = subprocess.run(
        [sys.executable, *launch, "-c", code, str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == pytest.approx(expected, rel=1e-5)
