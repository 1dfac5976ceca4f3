"""Rows of equal length from documents of any length, whose boundaries attention respects.

A document longer than a row is cut into rows of its own; what is left of it, and every shorter document, shares a row
with others of fitting length. In a shared row each piece is a sequence of its own: positions count from 0, no token
attends into another piece, and none is predicted from one. A T × T mask never exists: attention gets the boundaries.

The positions of a sequence may be spread over more than it has tokens ("positional skip-wise training", Zhu et al.,
arXiv 2309.10400): short rows then teach a rotary embedding the distances of long texts.

Of rows that one document fills only the last tokens, the tail, may be learned: what precedes it is read as a prompt is.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from moba.config import require_int
from moba_lab.data import Shards
from moba_lab.train.loss import IGNORED

# Where the positions of a sequence are spread: they skip so often at most.
MOST_SKIPS = 8


class Piece(NamedTuple):
    """A part of a document: `length` tokens from `start` on."""

    document: int
    start: int
    length: int


def pack(lengths: Sequence[int], context: int) -> list[list[Piece]]:
    """Lay documents of these lengths into rows of at most `context` tokens, each in the row it fills best.

    Pieces of fewer than two tokens, which predict nothing, are left out. Long pieces are laid first, equal ones in the
    documents' order: the same lengths give the same rows everywhere.
    """
    require_int("context", context, 2)
    pieces = [
        Piece(document, start, min(context, length - start))
        for document, length in enumerate(lengths)
        for start in range(0, length, context)
        if length - start >= 2
    ]
    rows: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for piece in sorted(pieces, key=lambda piece: -piece.length):
        place = bisect.bisect_left(room, (piece.length, -1))
        if place == len(room):
            free, row = context, len(rows)
            rows.append([])
        else:
            free, row = room.pop(place)
        rows[row].append(piece)
        if free - piece.length >= 2:
            bisect.insort(room, (free - piece.length, row))
    return rows


def skipped_positions(length: int, span: int, generator: np.random.Generator) -> np.ndarray:
    """Positions of 2 or more tokens: from 0 on by one, but for 1 to 8 skips at random places.

    How far all skips reach together is drawn evenly from 0 to what `span` leaves, and shared out at random: over many
    sequences every distance below `span` comes up, and the near ones in each.

    Returns:
        int64 [length], ascending, each below the larger of `span` and `length`.
    """
    reach = generator.integers(0, max(0, span - length), endpoint=True)
    count = generator.integers(1, MOST_SKIPS, endpoint=True)
    places = np.sort(generator.integers(1, length, size=count))
    skipped_there = np.sort([*generator.integers(0, reach, size=count - 1, endpoint=True), reach])
    skipped = np.concatenate([[0], skipped_there])[np.searchsorted(places, np.arange(length), side="right")]
    return np.arange(length) + skipped


class PackedDataset(Dataset):
    """The rows that training reads, in the order it reads them: all rows shuffled, then again, until there are enough.

    The order depends on the seed alone, so a resumed run goes on where it was, and runs of the same data, context and
    seed see the same tokens in the same order whatever their attention.

    Args:
        shards: the documents.
        context: tokens of a row.
        num_rows: how many to read in all; None: each row once.
        seed: of the order; None keeps it unshuffled.
        sources: only documents of these; None: of all.
        min_length: documents shorter than this are left out.
        whole_rows: only rows that one document fills; what is left of documents is not read.
        span: spread the positions of each sequence over up to so many; None: they count its tokens.
        tail: only the last so many tokens of a row are learned, of rows that have something to learn there (with
            `whole_rows` only); a span then moves the tail as a whole. None: all tokens.

    Raises:
        ValueError: if no document or row is left, or a source is unknown.
    """

    def __init__(
        self,
        shards: Shards,
        context: int,
        *,
        num_rows: int | None = None,
        seed: int | None = 0,
        sources: Sequence[str] | None = None,
        min_length: int = 0,
        whole_rows: bool = False,
        span: int | None = None,
        tail: int | None = None,
    ) -> None:
        self.shards, self.context, self.seed, self.span, self.tail = shards, context, seed, span, tail
        present = {document.source for document in shards.documents}
        if unknown := sorted(set(sources or ()) - present):
            raise ValueError(f"sources: {shards.folder} has no documents of {unknown}, but of {sorted(present)}")
        chosen = [
            i
            for i, document in enumerate(shards.documents)
            if document.length >= max(min_length, 2) and (sources is None or document.source in sources)
        ]
        if not chosen:
            raise ValueError(f"{shards.folder} holds no document of at least {max(min_length, 2)} tokens to train on")
        rows = pack([shards.documents[i].length for i in chosen], context)
        if whole_rows:
            rows = [row for row in rows if row[0].length == context]
            if not rows:
                raise ValueError(f"whole_rows: no document of {shards.folder} fills a row of {context:,} tokens")
        self.rows = [[piece._replace(document=chosen[piece.document]) for piece in row] for row in rows]
        if tail is not None:
            self.rows = [row for row in self.rows if self._learns(row[0], tail)]
            if not self.rows:
                raise ValueError(
                    f"tail: no row of {shards.folder} has anything to learn in its last {tail:,} of {context:,} tokens"
                )
        self.num_documents = len(chosen)
        self._num_rows = len(self.rows) if num_rows is None else num_rows
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def num_tokens(self) -> int:
        """Tokens of the rows, each counted once, without padding."""
        return sum(piece.length for row in self.rows for piece in row)

    def first(self, count: int) -> PackedDataset:
        """Read only the first rows (unshuffled, the ones with the longest pieces); returns itself."""
        self._num_rows = min(count, len(self.rows))
        return self

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row.

        Returns:
            input_ids int64 [context], padded with 0; labels, the same with -100 for what is not learned; the lengths of
            its sequences; num_padding; with a span also position_ids, int64 [context], or with a tail, too, how many
            positions are skipped before the tail.
        """
        epoch, place = divmod(index, len(self.rows))
        pieces = self.rows[self._row(epoch, place)]
        tokens = np.zeros(self.context, dtype=np.int64)
        labels = np.full(self.context, IGNORED, dtype=np.int64)
        lengths, end = [], 0
        for document, start, length in pieces:
            tokens[end : end + length] = self.shards[document][start : start + length]
            learned = self.shards.documents[document].learned
            for first, stop in [(start, start + length)] if learned is None else learned:
                part = slice(end + max(first - start, 0), end + max(min(stop - start, length), 0))
                labels[part] = tokens[part]
            lengths.append(length)
            end += length
        if self.tail is not None:
            # Its first token is predicted by one that is only read.
            labels[: self.context - self.tail + 1] = IGNORED
        row = {
            "input_ids": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "lengths": lengths,
            "num_padding": self.context - end,
        }
        if self.span is None:
            return row
        generator = np.random.default_rng([self.seed or 0, index])
        if self.tail is not None:
            return {**row, "skipped": int(generator.integers(0, self.span - self.context, endpoint=True))}
        return {**row, "position_ids": self._spread(lengths, self.span, generator)}

    def _learns(self, piece: Piece, tail: int) -> bool:
        """Whether anything is learned in the tail of a row that a piece fills."""
        learned, end = self.shards.documents[piece.document].learned, piece.start + piece.length
        return learned is None or any(first < end and end - tail + 1 < stop for first, stop in learned)

    def _spread(self, lengths: list[int], span: int, generator: np.random.Generator) -> Tensor:
        """Positions of a row of sequences: int64 [context]."""
        parts = [skipped_positions(length, span, generator) for length in lengths]
        return torch.from_numpy(np.concatenate([*parts, np.arange(self.context - sum(lengths))]))

    def _row(self, epoch: int, place: int) -> int:
        if self.seed is None:
            return place
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self.rows), generator=generator).tolist())
        return self._order[1][place]


class SharedRows(Dataset):
    """Rows that processes read in groups of `num_ranks`, each group the same ones: for context parallelism.

    accelerate deals batches out to processes in turn, so every batch stands here `num_ranks` times, one after another.

    Args:
        rows: as many as make whole batches.
        num_ranks: divides the number of processes.
        batch_size: rows that a process reads at a time.
    """

    def __init__(self, rows: PackedDataset, num_ranks: int, batch_size: int) -> None:
        self.rows, self.num_ranks, self.batch_size = rows, num_ranks, batch_size

    def __len__(self) -> int:
        return len(self.rows) * self.num_ranks

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row, as `PackedDataset` makes it."""
        batch, place = divmod(index, self.batch_size)
        return self.rows[batch // self.num_ranks * self.batch_size + place]


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What a causal language model reads: rows side by side if each is one plain sequence, else all packed into one.

    Returns:
        input_ids and labels, int64 [B, T], and of rows with a tail that is moved `skipped`, int64 [B]. If packed:
        [1, B·T], labels -100 where a sequence starts, too, and position_ids of the same shape, cu_seq_lens_q and
        cu_seq_lens_k int32, which may end in empty sequences.
    """
    input_ids = torch.stack([row["input_ids"] for row in rows])
    labels = torch.stack([row["labels"] for row in rows])
    spread = "position_ids" in rows[0]
    if not spread and all(len(row["lengths"]) == 1 and not row["num_padding"] for row in rows):
        skipped = {"skipped": torch.tensor([row["skipped"] for row in rows])} if "skipped" in rows[0] else {}
        return {"input_ids": input_ids, "labels": labels, **skipped}
    lengths: list[int] = []
    for row in rows:
        lengths += row["lengths"]
        if row["num_padding"]:
            lengths.append(row["num_padding"])
    ends = torch.tensor(lengths).cumsum(0)
    starts = ends - torch.tensor(lengths)
    labels = labels.flatten()
    labels[starts] = IGNORED
    if spread:
        positions = torch.cat([row["position_ids"] for row in rows])
    else:
        positions = torch.arange(input_ids.numel()) - torch.repeat_interleave(starts, torch.tensor(lengths))
    # A few different sizes only, so that few graphs are compiled under torch.compile.
    size = max(8, 1 << len(lengths).bit_length())
    bounds = torch.full((size + 1,), input_ids.numel(), dtype=torch.int32)
    bounds[0], bounds[1 : len(lengths) + 1] = 0, ends
    return {
        "input_ids": input_ids.flatten()[None],
        "labels": labels[None],
        "position_ids": positions[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds.clone(),
    }


def by_source(make: Callable[..., PackedDataset], shards: Shards) -> dict[str, PackedDataset]:
    """A data set of each source of `shards`, made by `make(shards, sources=[source])`."""
    sources = sorted({document.source for document in shards.documents})
    return {source: make(shards, sources=[source]) for source in sources}
