"""A folder of training shards for the tiny vocabulary, written as `moba data` writes it."""

from __future__ import annotations

import numpy as np

from moba.files import write_json
from moba_lab.data.shards import ShardWriter

VOCABULARY = 64


def save_shards(
    folder, lengths=(300, 40, 7, 130, 64, 65, 1), held_out=(200, 50), tokenizer_hash="none", vocab=VOCABULARY
):
    """Documents of the given lengths; each counts up from its own number with its own step, so it can be learned."""
    folder.mkdir(exist_ok=True)
    splits = {}
    for split, sizes in (("train", lengths), ("held_out", held_out)):
        writer = ShardWriter(folder, split, 0, "uint16", max_tokens=400)
        for i, length in enumerate(sizes):
            writer.add((i + np.arange(length) * (1 + i % 3)) % (vocab - 3) + 3, f"source {i % 2}", f"document {i}")
        splits[split] = writer.close()
    manifest = {"tokenizer": "tiny", "tokenizer_hash": tokenizer_hash, "vocab_size": vocab, "dtype": "uint16"}
    sources = [{"name": f"source {i}", "licence": "public domain"} for i in range(2)]
    write_json(
        folder / "manifest.json",
        {**manifest, "shards": splits["train"], "held_out": splits["held_out"], "sources": sources},
    )
    return folder
