"""Packing: every token once, boundaries respected, one order for one seed."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import assert_close
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model
from tiny_shards import save_shards

from moba import MoBAConfig, register_moba
from moba.files import write_json
from moba.hf import set_moba_config
from moba_lab.data import ShardWriter, open_shards
from moba_lab.data.shards import read_manifest
from moba_lab.train.loss import use_fused_loss
from moba_lab.train.packing import MOST_SKIPS, PackedDataset, by_source, collate, pack, skipped_positions


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
    rows = [PackedDataset(shards, 64, num_rows=30, seed=seed) for seed in (3, 3, 4)]
    read = [[row["input_ids"].tolist() for row in (data[i] for i in range(30))] for data in rows]
    assert read[0] == read[1] != read[2]
    count = len(rows[0].rows)
    assert sorted(read[0][:count]) == sorted(read[0][count : 2 * count]), "each epoch reads every row once"
    assert read[0][:count] != read[0][count : 2 * count], "and shuffles anew"
    assert rows[0][29]["input_ids"].tolist() == read[0][29], "also out of order"
    assert pickle.loads(pickle.dumps(rows[0]))[7]["input_ids"].tolist() == read[0][7]


def test_rows_hold_the_documents_tokens(tmp_path):
    shards = open_shards(save_shards(tmp_path))
    data = PackedDataset(shards, 64, seed=None)
    assert data.num_tokens == 300 + 40 + 7 + 130 + 64 + 64
    for i, pieces in enumerate(data.rows):
        row = data[i]
        parts = row["input_ids"].split([*row["lengths"], row["num_padding"]])
        for part, (document, start, length) in zip(parts, pieces, strict=False):
            assert part.tolist() == shards[document][start : start + length].tolist()
        assert not parts[-1].any()


def test_filters(tmp_path):
    shards = open_shards(save_shards(tmp_path))
    assert PackedDataset(shards, 64, min_length=64).num_documents == 4
    assert PackedDataset(shards, 64, sources=["source 1"]).num_documents == 3
    sets = by_source(lambda shards, sources: PackedDataset(shards, 64, sources=sources), shards)
    assert {name: data.num_documents for name, data in sets.items()} == {"source 0": 3, "source 1": 3}
    whole = PackedDataset(shards, 64, whole_rows=True)
    assert [sum(row["lengths"]) for row in (whole[i] for i in range(len(whole)))] == [64] * (4 + 2 + 1 + 1)
    assert all(len(row) == 1 for row in whole.rows)
    with pytest.raises(ValueError, match="whole_rows: no document"):
        PackedDataset(shards, 512, whole_rows=True)
    with pytest.raises(ValueError, match="no documents of \\['source 9'\\]"):
        PackedDataset(shards, 64, sources=["source 9"])
    with pytest.raises(ValueError, match="no document of at least 999"):
        PackedDataset(shards, 64, min_length=999)


def test_whole_rows_are_not_packed(tmp_path):
    shards = open_shards(save_shards(tmp_path, lengths=(128, 64)))
    batch = collate([PackedDataset(shards, 64, seed=None)[i] for i in range(3)])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (3, 64)


@given(st.integers(2, 300), st.integers(1, 5000), st.integers(0, 99))
def test_positions_skip_within_the_span(length, span, seed):
    positions = skipped_positions(length, span, np.random.default_rng(seed))
    assert (positions.dtype, positions.shape, positions[0]) == (np.int64, (length,), 0)
    steps = np.diff(positions)
    assert steps.min() >= 1
    assert (steps > 1).sum() <= MOST_SKIPS
    assert positions[-1] < max(length, span)


def test_skips_bring_every_distance():
    generator = np.random.default_rng(0)
    drawn = np.stack([skipped_positions(256, 8192, generator) for _ in range(400)])
    distances = (drawn[:, -1:] - drawn).flatten()
    seen = np.histogram(distances, bins=32, range=(0, 8192))[0]
    assert seen.min() > 0.001 * distances.size, "also the farthest"
    assert seen[:2].sum() > 0.1 * distances.size, "and the near ones all the time"
    ends = drawn[:, -1]
    assert abs(ends.mean() - (255 + 8191) / 2) < 5 * (8192 / 12**0.5) / 400**0.5, "evenly from no skip to the span"


def test_a_span_changes_positions_only(tmp_path):
    shards = open_shards(save_shards(tmp_path))
    plain, spread, again = (PackedDataset(shards, 64, num_rows=30, span=span) for span in (None, 4096, 4096))
    for i in (17, 3, 29):
        row = spread[i]
        positions = row.pop("position_ids")
        assert {k: str(v) for k, v in row.items()} == {k: str(v) for k, v in plain[i].items()}
        assert torch.equal(positions, again[i]["position_ids"]), "a resumed run finds the same ones"
        for part in positions.split([*row["lengths"], row["num_padding"]]):
            assert not len(part) or part[0] == 0
    # A row that comes again comes with other skips.
    (first, second) = [i for i in range(30) if torch.equal(plain[i]["input_ids"], plain[0]["input_ids"])][:2]
    assert not torch.equal(spread[first]["position_ids"], spread[second]["position_ids"])


def test_a_tail_is_what_is_learned_of_a_row(tmp_path):
    shards = open_shards(save_shards(tmp_path))
    rows, whole = (PackedDataset(shards, 64, whole_rows=True, tail=tail) for tail in (20, None))
    for i in range(len(rows)):
        labels = rows[i]["labels"]
        assert (labels[:45] == -100).all(), "its first token is predicted by one that is only read"
        assert torch.equal(labels[45:], whole[i]["labels"][45:])
    moved = PackedDataset(shards, 64, num_rows=200, whole_rows=True, span=4096, tail=20)
    batch = collate([moved[i] for i in range(200)])
    assert set(batch) == {"input_ids", "labels", "skipped"}
    assert batch["skipped"].min() >= 0
    assert 3800 < batch["skipped"].max() <= 4096 - 64
    assert (
        moved[7]["skipped"] == PackedDataset(shards, 64, num_rows=9, whole_rows=True, span=4096, tail=20)[7]["skipped"]
    )


def test_rows_with_nothing_to_learn_in_their_tail_are_left_out(tmp_path):
    writer = ShardWriter(tmp_path, "train", 0, "uint16")
    for i, learned in enumerate(([(0, 10)], [(10, 46)], [(44, 45)], [(30, 44), (63, 64)], [(64, 120)])):
        writer.add(np.arange(128), "a", f"{i}", learned)
    manifest = read_manifest(save_shards(tmp_path / "other"))
    write_json(tmp_path / "manifest.json", {**manifest, "shards": writer.close(), "held_out": []})
    shards = open_shards(tmp_path)
    rows = PackedDataset(shards, 64, seed=None, whole_rows=True, tail=20)
    learned = [(rows[i]["labels"] != -100).sum().item() for i in range(len(rows))]
    assert [(row[0].document, row[0].start) for row in rows.rows] == [(1, 0), (3, 0), (4, 64)]
    assert learned == [1, 1, 11]
    with pytest.raises(ValueError, match="to learn in its last 3 of 128 tokens"):
        PackedDataset(shards, 128, whole_rows=True, tail=3)


@pytest.mark.parametrize("span", [None, 512])
@pytest.mark.parametrize("full_layers", [0, 3])
def test_a_packed_batch_has_the_loss_of_its_documents_alone(tmp_path, full_layers, span):
    register_moba(None)
    shards = open_shards(save_shards(tmp_path))
    data = PackedDataset(shards, 64, seed=None, span=span)
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
        total, count, begin = 0.0, 0, 0
        for i in chosen:
            for document, start, length in data.rows[i]:
                tokens = torch.tensor(shards[document][start : start + length].astype("int64"))[None]
                positions = batch["position_ids"][:, begin : begin + length]
                cu = torch.tensor([0, length], dtype=torch.int32)
                alone = {"position_ids": positions, "cu_seq_lens_q": cu, "cu_seq_lens_k": cu} if span else {}
                total += model(tokens, labels=tokens, **alone, use_cache=False).loss * (length - 1)
                count += length - 1
                begin += length
            begin += data[i]["num_padding"]
        plain = collate([PackedDataset(shards, 64, seed=None)[i] for i in chosen])
        assert torch.equal(loss, model(**plain, use_cache=False).loss) == (span is None), "far positions are seen"
    assert (batch["labels"][:, 1:] != -100).sum() == count
    assert_close(loss, total / count, 1e-10)
