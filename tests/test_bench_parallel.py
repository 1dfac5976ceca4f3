"""`moba bench parallel` as a command, over gloo."""

from __future__ import annotations

import json
import subprocess
import sys

SMALL = ["--tokens", "512", "--heads", "2", "--head-dim", "16", "--block-size", "32", "--topk", "2", "--dtype", "fp32",
         "--repeats", "1"]  # fmt: skip


def launched(out, *options):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "moba", "bench", "parallel", *SMALL, *options, "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_the_command_writes_its_files_and_one_json_line_last(tmp_path):
    result = launched(tmp_path / "result")
    assert result.returncode == 0, result.stderr
    whole = json.loads(result.stdout.splitlines()[-1])
    link, record = whole["records"]
    assert set(link["link"]["ms"]) == {"p2p", "both ways", "all-gather", "all-to-all"}
    assert whole["header"]["ranks"] == "2"
    assert (record["heads"], record["kv_heads"]) == (2, 2)
    ways = record["ways"]
    for way in ("one", "share", "gather", "selective", "heads"):
        assert ways[way]["train_ms"] > 0
    assert ways["gather"]["needed"] == ways["selective"]["needed"] > 0
    assert ways["selective"]["needed"] <= ways["selective"]["sent"] < 1.2 * ways["selective"]["needed"]
    assert json.loads((tmp_path / "result.json").read_text()) == whole
    assert "selective" in (tmp_path / "result.md").read_text()

    # A run that ended in a case goes on behind it.
    whole["records"][1] = {"case": record["case"], "failed": "the run ended in this case"}
    (tmp_path / "result.json").write_text(json.dumps(whole))
    again = launched(tmp_path / "result")
    assert again.returncode == 1
    assert json.loads(again.stdout.splitlines()[-1])["records"] == whole["records"]


def test_it_says_how_to_be_started():
    result = subprocess.run([sys.executable, "-m", "moba", "bench", "parallel"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "torchrun --nproc-per-node 2 -m moba bench parallel" in result.stderr
