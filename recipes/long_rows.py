"""Whole rows of long documents, chosen from other shards: what recipes/long.toml trains on.

    python recipes/package_texts.py data/gap --tokenizer data/bpe-16k --sources …   # as recipes/gap.toml says
    python recipes/package_texts.py data/code --tokenizer data/bpe-16k --sources pandas,statsmodels,scikit-image,astropy,distributed,twisted,mypy,sphinx,numba,jax,nltk,ipython,pygments
    python recipes/long_rows.py data/long data/gap data/code

Sources with many rows give fewer of them, so that none is most of the data. Held out are the sources that the shards
hold out, and some rows of training documents, as a source of its own.
"""  # noqa: E501

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

from moba.files import write_json
from moba_lab.data import Shards, ShardWriter, open_shards
from moba_lab.data.shards import MANIFEST

OTHER_ROWS = "rows set aside"


class Row(NamedTuple):
    """Tokens of a document from `start` on."""

    shards: Shards
    document: int
    start: int

    @property
    def source(self) -> str:
        """The name of the document's source."""
        return self.shards.documents[self.document].source


def rows_of(shards: Shards, length: int) -> list[Row]:
    """All rows that one document fills."""
    return [
        Row(shards, i, start)
        for i, document in enumerate(shards.documents)
        for start in range(0, document.length - length + 1, length)
    ]


def spread(rows: list[Row], count: int) -> list[Row]:
    """So many rows, at equal distances."""
    return rows if count >= len(rows) else [rows[(2 * i + 1) * len(rows) // (2 * count)] for i in range(count)]


def most_each(sizes: list[int], total: int) -> int:
    """The largest limit for each size with which all together stay within `total`."""
    limit = 0
    while limit < max(sizes) and sum(min(size, limit + 1) for size in sizes) <= total:
        limit += 1
    return limit


def choose(rows: list[Row], total: int) -> list[Row]:
    """Rows of all sources, at most `total`."""
    by_source: dict[str, list[Row]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(row)
    limit = most_each([len(some) for some in by_source.values()], total)
    return [row for some in by_source.values() for row in spread(some, limit)]


def write(folder: Path, split: str, rows: list[tuple[str, Row]], length: int, dtype: str) -> list[dict[str, Any]]:
    """Write rows, each with the name of its source, as documents."""
    writer = ShardWriter(folder, split, 0, dtype)
    for source, (shards, document, start) in rows:
        name = f"{shards.documents[document].name} from {start}"
        writer.add(np.asarray(shards[document][start : start + length]), source, name)
    return writer.close()


def main(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the shards go.")],
    folders: Annotated[list[Path], typer.Argument(help="Of shards made with one tokenizer.")],
    length: Annotated[int, typer.Option(help="Tokens of a row.", min=2)] = 65_536,
    tokens: Annotated[int, typer.Option(help="Of training, at most.")] = 36_000_000,
    aside: Annotated[int, typer.Option(help="Rows of training documents that are held out.", min=0)] = 12,
) -> None:
    """Choose rows."""
    manifests = [open_shards(folder).manifest for folder in folders]
    if len({manifest["tokenizer_hash"] for manifest in manifests}) > 1:
        raise typer.BadParameter("the folders were made with different tokenizers")
    train = [row for folder in folders for row in rows_of(open_shards(folder), length)]
    held_out = [
        row
        for folder, manifest in zip(folders, manifests, strict=True)
        if manifest["held_out"]
        for row in rows_of(open_shards(folder, "held_out"), length)
    ]
    chosen = choose(train, tokens // length + aside)
    set_aside = spread(chosen, aside)
    chosen = [row for row in chosen if row not in set_aside]
    out.mkdir(parents=True, exist_ok=True)
    first = manifests[0]
    named = [*((row.source, row) for row in held_out), *((OTHER_ROWS, row) for row in set_aside)]
    sources = [source for manifest in manifests for source in manifest["sources"]]
    used = {row.source for row in [*chosen, *held_out]}
    about = {"name": OTHER_ROWS, "licence": "those of the other sources"}
    write_json(
        out / MANIFEST,
        {
            **{key: first[key] for key in ("tokenizer", "tokenizer_hash", "vocab_size", "dtype")},
            "shards": write(out, "train", [(row.source, row) for row in chosen], length, first["dtype"]),
            "held_out": write(out, "held_out", named, length, first["dtype"]),
            "sources": [*(source for source in sources if source["name"] in used), about],
        },
    )
    for title, all_rows, taken in (("training", train, chosen), ("held out", held_out, held_out)):
        for source in dict.fromkeys(row.source for row in all_rows):
            there, here = (sum(row.source == source for row in some) for some in (all_rows, taken))
            typer.echo(f"{title:9} {source:20} {there:5} rows, {here:5} taken")
    typer.echo(f"{len(chosen):,} rows, {len(chosen) * length:,} tokens; {len(named)} held-out rows")


if __name__ == "__main__":
    typer.run(main)
