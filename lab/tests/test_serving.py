"""Continuous batching with MoBA: every request gets the tokens it would get alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from real_model import smollm2  # noqa: F401
from test_hf_paged import _poisoned as _poisoned
from test_hf_paged import alone, batching, serve, use
from test_hf_paged import model as model


def test_smollm2_serves_concurrent_requests(smollm2):  # noqa: F811
    model, tokenizer = smollm2
    use(model, block_size=32, keep_first=1)
    text = "The committee met on Tuesday to discuss the harvest, the roads and the school. "
    prompts = [tokenizer(text * n + "In short:")["input_ids"] for n in (10, 1, 5)]
    expected = [alone(model, tokens, 20) for tokens in prompts]
    assert serve(model, prompts, 20, batching(64, 16, 128)) == expected


def test_the_serving_example():
    script = Path(__file__).parents[2] / "examples" / "serve_batch.py"
    command = [sys.executable, str(script), "--every", "0.5", "--max-new-tokens", "4"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert sum("arrives with" in line for line in lines) == sum("done after" in line for line in lines) == 5
    assert lines[-1].startswith("20 tokens for 5 requests in ")
