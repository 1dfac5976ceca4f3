"""`moba bench parallel` as a command, over gloo."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from moba_lab.bench.parallel import in_one_line

SMALL = ["--tokens", "512", "--heads", "2", "--head-dim", "16", "--block-size", "32", "--topk", "2", "--dtype", "fp32",
         "--repeats", "1"]  # fmt: skip


def launched(out, *options):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "moba_lab", "bench", "parallel", *SMALL, *options, "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_writes_its_files_and_one_json_line_last(tmp_path):
    result = launched(tmp_path / "result")
    assert result.returncode == 0, result.stderr
    whole = json.loads(result.stdout.splitlines()[-1])
    link, record = whole["records"]
    assert set(link["link"]["ms"]) == {"p2p", "both ways", "all-gather", "all-to-all"}
    assert whole["header"]["ranks"] == "2"
    assert (record["heads"], record["kv_heads"]) == (2, 2)
    ways = record["ways"]
    for way in ("one", "share", "gather", "heads"):
        assert ways[way]["train_ms"] > 0
        # Where the run stands.
        assert len(re.findall(rf"^\d\d:\d\d:\d\d   {way}( \.\.\.|: forward [\d.]+ ms)$", result.stderr, re.M)) == 2
    keys = 2 * 256 * 2 * 16 * 4  # k and v of the first rank, fp32; means, and what the ranks compare, are less
    assert keys <= ways["gather"]["sent"] < 1.1 * keys
    assert json.loads((tmp_path / "result.json").read_text()) == whole
    assert "gather" in (tmp_path / "result.md").read_text()

    # A run that ended in a case goes on behind it.
    whole["records"][1] = {"case": record["case"], "failed": "the run ended in this case"}
    (tmp_path / "result.json").write_text(json.dumps(whole))
    again = launched(tmp_path / "result")
    assert again.returncode == 1
    assert json.loads(again.stdout.splitlines()[-1])["records"] == whole["records"]


def test_a_failure_is_named_by_its_first_cause():
    error = RuntimeError("at 37:8:\n    keys = source.load(place)")
    error.__cause__ = AssertionError("places need 32 bits\nat all times")
    assert in_one_line(error) == "AssertionError: places need 32 bits"
    assert in_one_line(MemoryError()) == "MemoryError: "


ALONE = """
import os, sys, time
from datetime import timedelta
import torch.distributed as dist
from moba_lab.bench.link import on_first
from moba.parallel.process import end_process

folder, rank, what = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=2)
on_first(lambda: None)
dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
print(on_first(lambda: os._exit(3) if what == "end" else time.sleep(3) or "measured"))
dist.distributed_c10d._set_pg_timeout(timedelta(minutes=10))
end_process()
"""


@pytest.mark.parametrize(("what", "codes"), [("take long", [0, 0]), ("end", [3, 1])])
def test_a_rank_that_measures_alone_is_waited_for_as_long_as_it_lives(tmp_path, what, codes):
    command = [sys.executable, "-c", ALONE, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([*command, str(rank), what], **pipes) for rank in (0, 1)]
    said = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == codes, said
    assert [out for out, _ in said] == ["measured\n" if what == "take long" else ""] * 2


@pytest.fixture
def as_rank(monkeypatch):
    """Make this process a rank of two, as torchrun would."""

    def become(rank):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    return become


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topk", "0"], "Invalid value for '--topk'"),
        (["--tokens", "-512"], "Invalid value for '--tokens'"),
        (["--dtype", "fp8"], "dtype must be one of fp32, bf16, fp16, got 'fp8'"),
        (["--heads", "3", "--kv-heads", "2"], "key/value heads must divide query heads, got 3 query and 2"),
        (["--head-dim", "257"], "--head-dim must be at most 256, got 257"),
        (["--tokens", "500"], "--tokens must be a multiple of 64, 2 ranks times --block-size 32, got 500"),
        (["--backend", "nope"], "backend must be one of 'auto', 'reference', 'pytorch', 'triton', got 'nope'"),
        (["--backend", "triton"], "backend='triton' cannot run here: needs a CUDA device"),
        (["--out", "{folder}/file/result"], "File exists"),
        (["--out", "{folder}/taken"], "taken.json cannot be written"),
        (["--out", "{folder}/other"], "other.json is no result of this command"),
    ],
)
def test_what_is_not_valid_is_said_before_ranks_wait_for_each_other(moba, as_rank, tmp_path, options, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.json").mkdir()
    (tmp_path / "other.json").write_text("[1, 2]")
    as_rank(0)
    code, out, err = moba("bench", "parallel", *SMALL, *(option.format(folder=tmp_path) for option in options))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err


def test_every_rank_says_at_once_what_is_wrong(moba, as_rank):
    for rank in (0, 1):
        as_rank(rank)
        code, _, err = moba("bench", "parallel", *SMALL, "--topk", "0")
        assert code == 2
        assert err.startswith(f"moba: error: rank {rank}: Invalid value for '--topk'")


def test_a_mistake_is_one_line_of_a_rank(tmp_path):
    result = launched(tmp_path / "result", "--tokens", "500")
    assert result.returncode != 0
    assert 1 <= result.stderr.count("moba: error: rank ") <= 2
    assert "bench/parallel.py" not in result.stderr


def test_it_says_how_to_be_started(moba):
    code, _, err = moba("bench", "parallel")
    assert code == 2
    assert "torchrun --nproc-per-node 2 -m moba_lab bench parallel" in err
