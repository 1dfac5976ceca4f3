"""Packing: every token once, boundaries respected, one order for one seed."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest
import torch
from helpers import assert_close
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model
from tiny_shards import save_shards

from moba import MoBAConfig, register_moba
from moba.data import open_shards
from moba.hf import set_moba_config
from moba.train.loss import use_fused_loss
from moba.train.packing import PackedRows, by_source, collate, pack


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(2, 128))
def test_every_token_lies_in_one_row(lengths, context):
    rows = pack(lengths, context)
    assert all(0 < sum(piece.length for piece in row) <= context for row in rows)
    seen = Counter((p.document, t) for row in rows for p in row for t in range(p.start, p.start + p.length))
    assert set(seen.values()) <= {1}
    # One token alone predicts nothing: a document of one, or the one beyond the last full row.
    expected = {(d, t) for d, n in enumerate(lengths) for t in range(n - (n % context == 1))}
    assert set(seen) == expected


@given(st.lists(st.integers(2, 300), min_size=2, max_size=60), st.integers(2, 128))
def test_no_two_rows_could_be_one(lengths, context):
    rows = pack(lengths, context)
    least = sorted(sum(piece.length for piece in row) for row in rows)[:2]
    assert len(rows) == 1 or sum(least) > context - 2


def test_order_is_one_of_the_seed(tmp_path):
    shards = open_shards(save_shards(tmp_path))
    rows = [PackedRows(shards, 64, num_rows=30, seed=seed) for seed in (3, 3, 4)]
    read = [[row["input_ids"].tolist() for row in (data[i] for i in range(30))] for data in rows]
    assert read[0] == read[1] != read[2]
    count = len(rows[0].rows)
    assert sorted(read[0][:count]) == sorted(read[0][count : 2 * count]), "each epoch reads every row once"
    assert read[0][:count] != read[0][count : 2 * count], "and shuffles anew"
    assert rows[0][29]["input_ids"].tolist() == read[0][29], "also out of order"
    assert pickle.loads(pickle.dumps(rows[0]))[7]["input_ids"].tolist() == read[0][7]


def test_rows_hold_the_documents_tokens(tmp_path):
    shards = open_shards(save_shards(tmp_path))
    data = PackedRows(shards, 64, seed=None)
    assert data.num_tokens == 300 + 40 + 7 + 130 + 64 + 64
    for i, pieces in enumerate(data.rows):
        row = data[i]
        parts = row["input_ids"].split([*row["lengths"], row["num_padding"]])
        for part, (document, start, length) in zip(parts, pieces, strict=False):
            assert part.tolist() == shards[document][start : start + length].tolist()
        assert not parts[-1].any()


def test_filters(tmp_path):
    shards = open_shards(save_shards(tmp_path))
    assert PackedRows(shards, 64, min_length=64).num_documents == 4
    assert PackedRows(shards, 64, sources=["source 1"]).num_documents == 3
    sets = by_source(lambda shards, sources: PackedRows(shards, 64, sources=sources), shards)
    assert {name: data.num_documents for name, data in sets.items()} == {"source 0": 3, "source 1": 3}
    whole = PackedRows(shards, 64, whole_rows=True)
    assert [sum(row["lengths"]) for row in (whole[i] for i in range(len(whole)))] == [64] * (4 + 2 + 1 + 1)
    assert all(len(row) == 1 for row in whole.rows)
    with pytest.raises(ValueError, match="whole_rows: no document"):
        PackedRows(shards, 512, whole_rows=True)
    with pytest.raises(ValueError, match="no documents of \\['source 9'\\]"):
        PackedRows(shards, 64, sources=["source 9"])
    with pytest.raises(ValueError, match="no document of at least 999"):
        PackedRows(shards, 64, min_length=999)


def test_whole_rows_are_not_packed(tmp_path):
    shards = open_shards(save_shards(tmp_path, lengths=(128, 64)))
    batch = collate([PackedRows(shards, 64, seed=None)[i] for i in range(3)])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (3, 64)


@pytest.mark.parametrize("full_layers", [0, 3])
def test_a_packed_batch_has_the_loss_of_its_documents_alone(tmp_path, full_layers):
    register_moba(None)
    shards = open_shards(save_shards(tmp_path))
    data = PackedRows(shards, 64, seed=None)
    model = tiny_model(initializer_range=0.1).double()
    set_moba_config(model, MoBAConfig(8, 2, full_layers=full_layers))
    model.set_attn_implementation("moba")
    use_fused_loss(model)
    chosen = [0, len(data) - 2, len(data) - 1]
    batch = collate([data[i] for i in chosen])
    assert batch["cu_seq_lens_q"][-1] == 3 * 64
    assert data[len(data) - 1]["num_padding"]
    with torch.no_grad():
        loss = model(**batch, use_cache=False).loss
        total, count = 0.0, 0
        for document, start, length in (piece for i in chosen for piece in data.rows[i]):
            tokens = torch.tensor(shards[document][start : start + length].astype("int64"))[None]
            total += model(tokens, labels=tokens, use_cache=False).loss * (length - 1)
            count += length - 1
    assert (batch["labels"][:, 1:] != -100).sum() == count
    assert_close(loss, total / count, 1e-10)
