"""A small byte-level BPE vocabulary for small models, whose embeddings would else be most of their weights.

    python recipes/small_tokenizer.py data/bpe-16k --sources manuals,prose,sympy
    python recipes/package_texts.py data/gap --tokenizer data/bpe-16k --sources manuals,prose,sympy

Trained on an eighth of the sources' text, spread evenly, without what is held out. Digits are tokens of their own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from package_texts import Source, choose_sources, read_package

from moba_lab.cli.session import say

END_OF_TEXT = "<|endoftext|>"
# Characters of a sample, of which every eighth is read.
PIECE, EVERY = 20_000, 8


def samples(sources: list[Source]) -> Iterator[str]:
    """Pieces of the sources' training texts."""
    for source in sources:
        with tempfile.TemporaryDirectory() as work:
            _, texts = read_package(source, Path(work))
            whole = "".join(part for text in texts if not text.held_out for part in text.parts)
        say(f"{source.name}: {len(whole):,} characters")
        yield from (whole[start : start + PIECE] for start in range(0, len(whole), EVERY * PIECE))


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> Any:
    """A tokenizer of transformers with so many words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def main(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the tokenizer goes.")],
    sources: Annotated[str, typer.Option(metavar="NAMES", help="As of package_texts.py.")] = "manuals,prose",
    vocabulary: Annotated[int, typer.Option(help="Words.", min=300)] = 16_384,
) -> None:
    """Train a tokenizer on packages' texts."""
    chosen = choose_sources(name.strip() for name in sources.split(","))
    train_tokenizer(samples(chosen), vocabulary).save_pretrained(out)
    typer.echo(out)


if __name__ == "__main__":
    typer.run(main)
