"""README and docs: commands that they show exist, their recipe is one, and Python that needs the laboratory runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import typer

from moba_lab.cli import app
from moba_lab.train.recipe import read_recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "recipes" / "README.md"]
TEXT = "\n".join(page.read_text() for page in PAGES)


def commands():
    """The moba commands in shell blocks and in backquotes, without placeholders."""
    blocks = "\n".join(re.findall(r"^ *```(?:bash)?\n(.*?)^ *```", TEXT, re.MULTILINE | re.DOTALL))
    lines = [line.strip().removeprefix("$ ") for line in re.sub(r"\\\n *", "", blocks).splitlines()]
    quoted = [" ".join(code.split()) for code in re.findall(r"`(moba [^`]*)`", TEXT)]
    shown = [line for line in lines + quoted if line.startswith("moba ")]
    return sorted({line for line in shown if not re.search(r"NAME|RECIPE|COMMAND|FOLDER|…", line)})


@pytest.mark.parametrize("line", commands())
def test_command_exists(line):
    words = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
        if command.name == "bench" and words:
            name = words.pop(0).replace("-", "_")
            one = typer.Typer()
            one.command()(getattr(import_module(f"moba_lab.bench.{name}"), name))
            command = typer.main.get_command(one)
    command.make_parser(typer.Context(command)).parse_args(words)


def test_the_recipe_in_docs_is_one(tmp_path):
    (recipe,) = re.findall(r"^```toml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.toml").write_text(recipe)
    assert read_recipe(tmp_path / "mine.toml").num_steps > 0


def test_blocks_run(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    code = "\n".join(block for block in blocks if "moba_lab" in block)
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_messages_in_troubleshooting_are_in_the_code():
    sources = "".join(path.read_text() for folder in ("moba", "lab/moba_lab") for path in (ROOT / folder).rglob("*.py"))
    code = re.sub(r"""["']\s*\n\s*f?["']""", "", sources)
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    for message in re.findall(r"^\| (?:[^|]*the log says )?`([^`]* [^`]*)`[^`|]*\|", page, re.MULTILINE):
        parts = [part.strip() for part in re.split(r"…|\d+|=|'", message)]
        assert any(len(part) > 8 and part in code for part in parts), message
