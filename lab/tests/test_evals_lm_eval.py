"""lm-eval's command with MoBA: what it is given, and the command itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types

import pytest
from tiny_folder import save_tiny_model, words
from transformers import AttentionInterface, AutoTokenizer

from moba_lab.cli import main

IS_INSTALLED = importlib.util.find_spec("lm_eval") is not None


def test_everything_behind_the_dashes_is_lm_evals(monkeypatch):
    seen = {}

    def cli_evaluate():
        seen.update(argv=sys.argv, default=AttentionInterface()["moba"].keywords["default"])

    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    module = types.ModuleType("lm_eval.__main__")
    module.cli_evaluate = cli_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", module)
    before = sys.argv
    with pytest.raises(SystemExit) as stop:
        main(["eval", "lm-eval", "--block-size", "64", "--topk", "4", "--", "--model", "hf", "--topk", "x"])
    assert stop.value.code == 0
    assert seen["argv"] == ["lm-eval", "--model", "hf", "--topk", "x"]
    assert (seen["default"].block_size, seen["default"].topk, seen["default"].keep_first) == (64, 4, 1)
    assert sys.argv is before


@pytest.mark.skipif(IS_INSTALLED, reason="lm-eval is installed")
def test_without_lm_eval_the_command_says_what_to_install(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["eval", "lm-eval", "--", "--tasks", "x"])
    assert stop.value.code == 2
    assert "pip install 'moba-lab[lm-eval]'" in capsys.readouterr().err


@pytest.mark.skipif(not IS_INSTALLED, reason="lm-eval is not installed")
def test_lm_eval_scores_a_tiny_model_with_moba(tmp_path):
    save_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.eos_token = "<pad>"
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [{"question": words(60 + 3 * i), "answer": i % 2} for i in range(4)]
    (tmp_path / "toy.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "toy.yaml").write_text(
        f"task: toy\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/toy.jsonl\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{question}}"\n'
        'doc_to_choice: ["w1", "w2"]\ndoc_to_target: "{{answer}}"\nmetric_list:\n  - metric: acc\n'
    )
    scores = {}
    for attention in ("moba", "sdpa"):
        subprocess.run(
            [
                sys.executable, "-m", "moba_lab", "eval", "lm-eval", "--block-size", "8", "--topk", "3", "--",
                "--model", "hf", "--model_args", f"pretrained={tmp_path}/model,attn_implementation={attention}",
                "--tasks", "toy", "--include_path", tmp_path, "--device", "cpu", "--batch_size", "2",
                "--output_path", tmp_path / attention, "--log_samples",
            ],
            check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        (samples,) = (tmp_path / attention).rglob("samples_toy*.jsonl")
        scores[attention] = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    assert len(scores["moba"]) == 4
    assert scores["moba"] != scores["sdpa"]
