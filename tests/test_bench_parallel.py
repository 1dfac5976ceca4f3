"""`moba bench parallel` as a command, over gloo."""

from __future__ import annotations

import json
import subprocess
import sys

SMALL = [
    "--tokens",
    "512",
    "--heads",
    "2",
    "--head-dim",
    "16",
    "--block-size",
    "32",
    "--topk",
    "2",
    "--dtype",
    "fp32",
    "--repeats",
    "1",
]


def test_the_command_writes_its_files_and_one_json_line_last(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "moba", "bench", "parallel", *SMALL, "--out", str(tmp_path / "result")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    whole = json.loads(result.stdout.splitlines()[-1])
    (record,) = whole["records"]
    assert whole["header"]["ranks"] == "2"
    for way in ("one", "gather", "selective", "heads"):
        assert record[way]["train_ms"] > 0
    assert record["gather"]["needed"] == record["selective"]["needed"] > 0
    assert record["selective"]["needed"] <= record["selective"]["sent"] < 1.2 * record["selective"]["needed"]
    assert json.loads((tmp_path / "result.json").read_text()) == whole
    assert "selective" in (tmp_path / "result.md").read_text()


def test_it_says_how_to_be_started():
    result = subprocess.run([sys.executable, "-m", "moba", "bench", "parallel"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "torchrun --nproc-per-node 2 -m moba bench parallel" in result.stderr
