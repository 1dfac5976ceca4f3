"""The `moba` command: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_folder import save_tiny_model, words

from moba import MoBAConfig
from moba_lab.cli.session import Session
from moba_lab.models import generation

PROGRAM = [sys.executable, "-m", "moba_lab"]
LICENSE = Path(__file__).parents[2] / "LICENSE"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_model(path)
    return str(path)


def in_subprocess(*args, **options):
    return subprocess.run([*PROGRAM, *args], capture_output=True, text=True, **options)


def test_generate_reads_a_file_with_the_embedded_model(tmp_path):
    result = in_subprocess(
        "generate", "--prompt-file", str(LICENSE), "--prompt", "What is the capital of France?",
        "--block-size", "32", "--topk", "4", "--max-new-tokens", "12", "--compare",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout.splitlines()[0]
    assert "time to first token" in result.stdout
    assert "The texts agree" in result.stdout
    assert "not trained with MoBA" in result.stderr
    assert "Converting" not in result.stderr
    assert "Warning" not in result.stderr


def test_inspect_draws_the_embedded_model(moba, tmp_path):
    code, _, err = moba("inspect", "--prompt-file", LICENSE, "--block-size", 32, "--topk", 3, "--out", tmp_path)
    assert code == 0, err
    saved = np.load(tmp_path / "routing.npz")
    layers, tokens, heads, topk = saved["indices"].shape
    assert (layers, heads, topk) == (30, 9, 3)
    assert tokens == saved["token_ids"].size
    position = np.arange(tokens)
    assert (saved["indices"].max(axis=-1) == (position // 32)[None, :, None]).all()
    assert (saved["indices"][..., 0] == 0).all(), "the first block is kept by default"
    mask = np.unpackbits(saved["mask_bits"], axis=-1, count=int(saved["num_blocks"]))
    assert (mask.sum(axis=-1) == (saved["indices"] >= 0).sum(axis=-1)).all()
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")
    assert "Permission" in (tmp_path / "routing.html").read_text(encoding="utf-8")


def test_enough_blocks_write_what_full_attention_writes(moba, folder):
    code, out, _ = moba(
        "generate", "-m", folder, "-p", words(100), "-n", 20, "--block-size", 16, "--topk", 8, "--compare"
    )
    assert code == 0
    assert "all 20 tokens are the same" in out
    assert "100.0%" in out


def test_backends_write_the_same(moba, folder):
    args = ("generate", "-m", folder, "-p", words(100), "-n", 20, "--block-size", 8, "--topk", 3)
    texts = {moba(*args, "--attn", attention)[1] for attention in ("moba", "moba_naive")}
    assert len(texts) == 1
    assert moba(*args, "--attn", "sdpa")[1] not in texts, "eight of nine blocks left out must show"


def test_drawn_tokens_repeat_with_their_seed(moba, folder):
    args = ("generate", "-m", folder, "-p", words(30), "-n", 20, "--temperature", 1.5, "--block-size", 8, "--topk", 3)
    assert moba(*args, "--seed", 1)[1] == moba(*args, "--seed", 1)[1] != moba(*args, "--seed", 2)[1]


@pytest.fixture
def events(monkeypatch):
    """What is done, in order: the attentions switched to and the numbers of tokens read."""
    events, use, read = [], Session.use, generation.prefill
    monkeypatch.setattr(Session, "use", lambda self, attention: events.append(attention.value) or use(self, attention))
    monkeypatch.setattr(
        generation, "prefill", lambda model, ids, **options: events.append(ids.numel()) or read(model, ids, **options)
    )
    return events


def test_both_attentions_are_warm_when_they_are_compared(moba, folder, monkeypatch, events):
    monkeypatch.setattr(sys.modules["moba_lab.cli.generate"], "WARM_TOKENS", 40)
    moba("generate", "-m", folder, "-p", words(100), "-n", 2, "--block-size", 16, "--topk", 3, "--compare")
    assert events == ["sdpa", 40, "moba", 40, "moba", 100, "sdpa", 100]
    events.clear()
    moba("generate", "-m", folder, "-p", words(100), "-n", 2, "--block-size", 16, "--topk", 3)
    assert events == ["moba", 100]


def test_the_demo_reads_with_both_attentions_in_turns(moba, folder, tmp_path, monkeypatch, events):
    monkeypatch.chdir(tmp_path)
    settings = ("-m", folder, "-n", 5, "--block-size", 16, "--topk", 3, "--prefill-chunk", 40)
    texts = [moba("generate", *settings, "-p", words(100), "--attn", name)[1] for name in ("moba", "sdpa")]
    monkeypatch.setattr(sys.modules["moba_lab.cli.generate"], "demo_prompt", lambda: words(100))
    events.clear()
    code, out, err = moba("generate", *settings, "--demo")
    assert code == 0, err
    turns = [("moba", length, "sdpa", length) for length in (40, 40, 19)]
    assert events == ["sdpa", 100, "moba", 100, *sum(turns, ()), "moba", 1, "sdpa", 1]
    assert out.startswith("".join(texts))
    assert "time to first token" in out
    assert np.load("moba-inspect/routing.npz")["indices"].shape == (3, 100, 4, 3)
    assert err.count("100 tokens read in ") == 2
    assert err.index("expect") < err.index("loading")


@pytest.mark.parametrize("option", ["--out", "--output", "-o"])
def test_commands_that_write_say_where_alike(moba, folder, tmp_path, option):
    source = tmp_path / "text.txt"
    source.write_text(words(200))
    case = shlex.split("--tokens 64 --heads 1 --head-dim 16 --block-size 16 --dtype fp32 --repeats 1")
    for name, command in {
        "inspect": ["inspect", "-m", folder, "-p", words(20)],
        "eval": ["eval", "loss", "-m", folder, "--length", 64, "--documents", 1, "--last", 32, "--text", source],
        "data": ["data", "--from", source, "--tokenizer", folder, "--end-of-text", "<pad>"],
        "attention": ["bench", "attention", *case],
        "decode": ["bench", "decode", *case, "--kv-heads", 1],
    }.items():
        code, _, err = moba(*command, option, tmp_path / name)
        assert code == 0, err
        assert list(tmp_path.glob(f"{name}*")), name
    assert "say the same" in moba("data", tmp_path / "data", option, tmp_path / "other", "--from", source)[2]
    assert option in moba("train", "--help")[1]
    assert option in moba("bench", "parallel", "--help")[1]


def test_standard_input_is_a_prompt(moba, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(words(20).encode())))
    code, _, err = moba("generate", "-m", folder, "-n", 3)
    assert code == 0, err
    assert "20 tokens read" in err


def test_keep_first_depends_on_the_model(moba, folder, tmp_path):
    asked = ("-p", words(20), "-n", 2)
    assert "keep first 1" in moba("generate", "-m", folder, *asked)[2]
    plain = moba("generate", "-m", folder, *asked, "--keep-first", 0)[2]
    assert "keep first" not in plain
    assert "not trained with MoBA" not in plain
    trained = save_tiny_model(tmp_path)
    trained.config.moba = MoBAConfig(4, 2).to_dict()
    trained.config.save_pretrained(tmp_path)
    said = moba("generate", "-m", tmp_path, *asked)[2]
    assert "block size 4, top-k 2" in said
    assert "keep first" not in said
    assert "block size 8, top-k 2" in moba("generate", "-m", tmp_path, *asked, "--block-size", 8)[2]


def test_positions_are_stretched(moba, folder, tmp_path):
    args = ("-m", folder, "-p", words(300), "--block-size", 8, "--topk", 3, "--yarn", 2)
    code, out, err = moba("generate", *args, "-n", 5)
    assert code == 0, err
    assert "300 tokens read" in err
    assert "top-k 3, keep first 1 · positions stretched 2 times\n" in err
    assert moba("inspect", *args, "--out", tmp_path)[0] == 0
    model = save_tiny_model(tmp_path / "yarn")
    model.config.rope_parameters = {
        **model.config.rope_parameters, "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256
    }  # fmt: skip
    model.config.max_position_embeddings = 512
    model.config.save_pretrained(tmp_path / "yarn")
    args = ("-m", tmp_path / "yarn", *args[2:-2])
    assert moba("generate", *args, "-n", 5)[1] == out, "as transformers stretches it"
    err = moba("generate", *args, "-n", 500)[2]
    assert err.endswith("context is 512 tokens\n"), "a stretched model is not stretched again"


def test_inspect_records_only_layers_with_moba(moba, folder, tmp_path):
    args = ("inspect", "-m", folder, "-p", words(50), "--block-size", 8, "--topk", 3, "--out", tmp_path)
    assert moba(*args, "--full-layers", "1,")[0] == 0
    assert np.load(tmp_path / "routing.npz")["layers"].tolist() == [0, 2]
    code, _, err = moba(*args, "--full-layers", "3")
    assert code == 2
    assert "no layer with MoBA" in err


def test_help_is_quick_and_complete(moba):
    code, out, _ = moba("--help")
    assert code == 0
    assert all(command in out for command in ("generate", "inspect", "doctor", "bench"))
    slow = "import sys, moba_lab.cli; print([m for m in ('transformers', 'matplotlib', 'triton') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", slow], capture_output=True, text=True).stdout == "[]\n"
    assert moba("generate", "--help")[0] == 0
    assert moba("bench", "--help")[0] == 0
    assert moba("eval", "lm-eval", "--help")[0] == 0


@pytest.mark.parametrize("args", [[], ["eval"], ["bench"]])
def test_a_command_without_its_part_shows_its_help_alone(moba, args):
    code, out, err = moba(*args)
    assert (code, err) == (2, "")
    assert "--help" in out


def test_doctor(moba):
    code, out, _ = moba("doctor")
    assert code == 0
    assert torch.__version__ in out
    assert "pytorch" in out
    assert "taken" in out


def test_selftest_passes_here_and_fails_where_a_backend_is_wrong(moba, monkeypatch):
    assert moba("doctor", "--selftest")[0] == 0
    from moba.backends import pytorch

    attend = pytorch.attend

    def wrong(q, k, v, *args, **options):
        out, lse = attend(q, k, v, *args, **options)
        return out * 1.01 if q.dtype == torch.float32 else out, lse

    monkeypatch.setattr(pytorch, "attend", wrong)
    code, out, _ = moba("doctor", "--selftest")
    assert code == 1
    assert "pytorch float32, prefill: output error" in " ".join(out.split())


def test_routers_are_those_that_a_config_takes(moba, folder):
    command = ("generate", "-m", folder, "-p", "w1 w2 w3", "--no-chat", "-n", "1", "--router")
    code, _, err = moba(*command, "top_p=0.5")
    assert code == 0
    assert "router top_p=0.5" in err
    assert moba(*command, "top_p=2") == (2, "", "moba: error: top_p must lie between 0 and 1, both excluded, got 2.0\n")
    assert "router must be one of 'mean'" in moba(*command, "nearest")[2]
