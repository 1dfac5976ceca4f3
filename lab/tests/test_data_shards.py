"""Shards: what was written is read, and what is damaged is named."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from moba.files import write_json
from moba_lab.data.shards import ShardWriter, open_shards, tokenizer_hash

DOCUMENTS = {"a": [5, 6, 7], "b": [60000, 1], "c": list(range(40))}


class Tokenizer:
    def __init__(self, words=("x", "y")):
        self.words = words

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [len(text)]}


@pytest.fixture
def folder(tmp_path):
    writer = ShardWriter(tmp_path, "train", 0, "uint16", max_tokens=5)
    for name, tokens in DOCUMENTS.items():
        writer.add(tokens, "source", name)
    held_out = ShardWriter(tmp_path, "held_out", 0, "uint16")
    held_out.add([9, 9], "other", "d")
    manifest = {
        "tokenizer": "tiny", "tokenizer_hash": tokenizer_hash(Tokenizer()), "vocab_size": 65536, "dtype": "uint16",
        "shards": writer.close(), "held_out": held_out.close(), "sources": [{"name": "source", "licence": "MIT"}],
    }  # fmt: skip
    write_json(tmp_path / "manifest.json", manifest)
    return tmp_path


def change_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_documents_come_back_in_order(folder):
    shards = open_shards(folder)
    assert len(shards) == 3
    assert [document.tolist() for document in shards] == list(DOCUMENTS.values())
    assert shards[1].dtype == np.uint16
    assert shards.documents[2] == (1, 0, 40, "source", "c", None)
    assert shards.num_tokens == 45
    shards.verify()
    assert open_shards(folder, "held_out")[0].tolist() == [9, 9]


def test_shards_reach_worker_processes_without_their_tokens(folder):
    shards = open_shards(folder)
    _ = shards[0]
    data = pickle.dumps(shards)
    assert b"memmap" not in data
    assert pickle.loads(data)[2].tolist() == DOCUMENTS["c"]


def test_large_vocabularies_take_four_bytes(tmp_path):
    writer = ShardWriter(tmp_path, "train", 0, "uint32")
    writer.add([70000, 2], "s", "n")
    manifest = {
        "tokenizer": "t", "tokenizer_hash": "", "vocab_size": 70001, "dtype": "uint32", "shards": writer.close(),
        "held_out": [], "sources": [],
    }  # fmt: skip
    write_json(tmp_path / "manifest.json", manifest)
    assert open_shards(tmp_path)[0].tolist() == [70000, 2]
    with pytest.raises(ValueError, match=r"no documents .*held_out"):
        open_shards(tmp_path, "held_out")


def test_the_tokenizer_must_be_the_one_of_the_shards(folder):
    open_shards(folder, tokenizer=Tokenizer())
    with pytest.raises(ValueError, match="tokenizer of tiny"):
        open_shards(folder, tokenizer=Tokenizer(("x", "z")))


def test_damage_is_named(folder):
    path = folder / "train-00001.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-2])
    with pytest.raises(ValueError, match=r"train-00001.bin is corrupt: 78 bytes, 80"):
        open_shards(folder)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"train-00001.bin is empty"):
        open_shards(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"train-00001.bin is missing"):
        open_shards(folder)
    path.write_bytes(data[:-1] + b"\7")
    with pytest.raises(ValueError, match=r"train-00001.bin is corrupt: .*checksum"):
        open_shards(folder).verify()
    path.write_bytes(data)
    change_manifest(folder, vocab_size=60000)
    with pytest.raises(ValueError, match="token 60000"):
        open_shards(folder).verify()


def test_a_manifest_that_is_none_is_refused(folder, tmp_path_factory):
    with pytest.raises(ValueError, match="split"):
        open_shards(folder, "test")
    change_manifest(folder, shards=[{"file": "train-00000.bin", "tokens": 5}])
    with pytest.raises(ValueError, match="documents"):
        open_shards(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        open_shards(folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks tokenizer"):
        open_shards(folder)
    (folder / "manifest.json").rename(folder / "unfinished.json")
    with pytest.raises(ValueError, match="unfinished"):
        open_shards(folder)
    with pytest.raises(ValueError, match=r"holds no manifest.json"):
        open_shards(tmp_path_factory.mktemp("empty"))


def test_documents_must_lie_in_their_shard(folder):
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[0]["documents"][0][1] = 500
    change_manifest(folder, shards=shards)
    with pytest.raises(ValueError, match=r"manifest.json .* the document 'a' lies outside train-00000.bin"):
        open_shards(folder)


@pytest.mark.parametrize("file", ["../train-00000.bin", "/etc/passwd", "sub/train-00000.bin", ".."])
def test_shards_must_lie_in_their_folder(folder, file):
    (folder.parent / "train-00000.bin").write_bytes((folder / "train-00000.bin").read_bytes())
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[0]["file"] = file
    change_manifest(folder, shards=shards)
    with pytest.raises(ValueError, match=r"outside its folder|\.\. is missing"):
        open_shards(folder)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("dtype",), "object"),
        (("vocab_size",), "many"),
        (("sources",), [3]),
        (("sources",), ["name"]),
        (("shards",), 3),
        (("shards",), ["x"]),
        (("shards", 0), {"file": "train-00000.bin", "tokens": 5, "documents": []}),
        (("shards", 0, "file"), 3),
        (("shards", 0, "tokens"), "5"),
        (("shards", 0, "tokens"), 5.0),
        (("shards", 0, "documents"), 3),
        (("shards", 0, "documents", 0), 3),
        (("shards", 0, "documents", 0, 0), "0"),
        (("shards", 0, "documents", 0, 0), -1),
        (("shards", 0, "documents", 0, 1), 2.0),
        (("shards", 0, "documents", 0, 1), 0),
        (("shards", 0, "documents", 0, 2), 3),
        (("shards", 0, "documents", 0, 3), None),
        (("shards", 0, "documents", 0), [0, 3, "source", "a", [[0]]]),
        (("shards", 0, "documents", 0), [0, 3, "source", "a", [[0, "2"]]]),
        (("shards", 0, "documents", 0), [0, 3, "source", "a", [], []]),
    ],
)
def test_a_manifest_with_a_wrong_value_is_refused(folder, place, value):
    manifest = json.loads((folder / "manifest.json").read_text())
    part = manifest
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest.json is no manifest that `moba data` wrote: ."):
        open_shards(folder)
