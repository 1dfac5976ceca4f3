"""Tokenised training data: shards on the disk, and how they are built."""

from moba_lab.data.shards import Document, Shards, ShardWriter, open_shards, tokenizer_hash

__all__ = ["Document", "ShardWriter", "Shards", "open_shards", "tokenizer_hash"]
