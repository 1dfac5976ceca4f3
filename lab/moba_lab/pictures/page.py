"""A web page of a routing, complete in one file: layer and head pickers, and the tokens with the blocks they chose."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np

from moba.routing import Routing
from moba_lab.pictures.routings import farthest_reaching, layers_and_blocks, shares_by_layer

_PLACE = "__DATA__"


def write_page(
    path: str | Path, routings: Mapping[int, Routing], tokens: Sequence[str], *, title: str = "", row: int = 0
) -> None:
    """Write the page: it needs no other file and no network.

    Every query's choices are inside, one gzip stream a layer, which the browser unpacks when the layer is opened.

    Args:
        path: the file to write.
        routings: layer index -> routing [B, T, H, K] of that layer; all of one shape and block size.
        tokens: the text of each of the T tokens.
        title: what was read, shown in the header.
        row: the sequence of the batch.

    Raises:
        ValueError: if there is no routing, or not one token text per token, or more than 65,535 blocks.
    """
    layers, num_blocks = layers_and_blocks(routings)
    first = routings[layers[0]]
    num_tokens, num_heads = first.indices.shape[1:3]
    if len(tokens) != num_tokens:
        raise ValueError(f"tokens must hold one text for each of the {num_tokens} tokens, got {len(tokens)}")
    if num_blocks >= 2**16:
        raise ValueError(f"a page shows at most {2**16 - 1:,} blocks, got {num_blocks:,}: choose a larger block_size")
    # The largest value means "no block", which -1 becomes when narrowed to an unsigned integer.
    narrow = np.uint8 if num_blocks < 2**8 else np.uint16
    data = {
        "title": title,
        "layers": layers,
        "num_heads": num_heads,
        "num_tokens": num_tokens,
        "num_blocks": num_blocks,
        "block_size": first.block_size,
        "topk": first.topk,
        "bytes": narrow().nbytes,
        "detail": farthest_reaching(shares_by_layer(routings, row))[-1],
        "tokens": list(tokens),
        "choices": [_packed(routings[layer].indices[row].permute(1, 2, 0).cpu().numpy(), narrow) for layer in layers],
    }
    # Inside a script element "</script" ends the data, and behind "<!--" "<script" hides that end.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    template = files("moba_lab.pictures").joinpath("page.html").read_text(encoding="utf-8")
    Path(path).write_text(template.replace(_PLACE, text), encoding="utf-8")


def _packed(indices: np.ndarray, narrow: type[np.unsignedinteger]) -> str:
    """Little-endian unsigned integers, gzipped, in base64; queries run fastest, as neighbours choose alike."""
    raw = np.ascontiguousarray(indices.astype(np.dtype(narrow).newbyteorder("<"))).tobytes()
    return base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode("ascii")
