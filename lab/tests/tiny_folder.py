"""A small random model with a tokenizer, saved as a folder that the command line can load."""

from __future__ import annotations

import tokenizers
import transformers
from tiny_models import SHAPE, tiny_model

WORDS = [f"w{i}" for i in range(SHAPE["vocab_size"] - 3)]


def save_tiny_model(folder, **changes):
    """One word is one token: "w0" … "w60"; anything else is unknown."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "<unk>", *WORDS])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model = tiny_model(**changes)
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return model


def words(count):
    return " ".join(WORDS[(i * 7) % len(WORDS)] for i in range(count))
