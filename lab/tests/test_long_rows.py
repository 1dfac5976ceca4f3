"""recipes/long_rows.py: whole rows, none twice, no source most of the data."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import long_rows
import numpy as np
import pytest
import typer
from tiny_shards import save_shards
from typer.testing import CliRunner

from moba_lab.data import open_shards


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(long_rows.main)
    return lambda *given: CliRunner().invoke(app, [str(word) for word in given])


def test_rows_are_whole_and_none_is_read_twice(tmp_path, run):
    one = save_shards(tmp_path / "one", lengths=(645, 130, 63, 64), held_out=(200, 50))
    two = save_shards(tmp_path / "two", lengths=(1, 1, 1, 1, 1, 70), held_out=(20,))
    options = ("--length", 64, "--tokens", 6 * 64, "--aside", 2)
    done = run(tmp_path / "long", one, two, *options)
    assert done.exit_code == 0, done.output
    train, held_out = open_shards(tmp_path / "long"), open_shards(tmp_path / "long", "held_out")
    train.verify()
    held_out.verify()
    assert all(document.length == 64 for document in [*train.documents, *held_out.documents])
    # Of "source 0" there are ten rows, of "source 1" four: both give four.
    assert Counter(document.source for document in held_out.documents) == {"source 0": 3, long_rows.OTHER_ROWS: 2}
    assert len(train) == 6
    rows = {(document.source, document.name) for document in train.documents}
    aside = {document.name for document in held_out.documents if document.source == long_rows.OTHER_ROWS}
    assert len(rows) == 6
    assert not aside & {name for _, name in rows}
    origin = open_shards(one)
    place = next(i for i, document in enumerate(train.documents) if document.source == "source 0")
    start = int(train.documents[place].name.rpartition(" ")[2])
    np.testing.assert_array_equal(train[place], origin[0][start : start + 64])


def test_other_vocabularies_are_refused(tmp_path, run):
    one, two = (save_shards(tmp_path / name, tokenizer_hash=name) for name in ("one", "two"))
    assert "different tokenizers" in run(tmp_path / "long", one, two, "--length", 16).output


def test_limits_and_distances():
    assert long_rows.most_each([10, 2, 1], 8) == 5
    assert long_rows.most_each([10, 2, 1], 100) == 10
    places = long_rows.spread(list(range(10)), 5)
    assert places == [1, 3, 5, 7, 9]
    assert {b - a for a, b in pairwise(long_rows.spread(list(range(100)), 7))} <= {14, 15}
