"""The blocks that a trained model chooses: how many a tile of queries chooses together, and how popular they are.

    python benchmarks/routings.py --tokens 131072

SmolLM2 as trained with MoBA at 32K tokens reads State of the Union addresses; random choices of the same shape stand
beside it. `moba bench attention --routing model` times attention over such choices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from moba import MoBAConfig, moba_attention
from moba.hf.record import record_routings
from moba_lab.bench.inputs import trained_model
from moba_lab.bench.machine import describe
from moba_lab.bench.report import Records, write
from moba_lab.evals.reader import chunk_tokens_for
from moba_lab.models.generation import prefill

RESULTS = Path(__file__).parent / "results"
WINDOWS = (16, 32, 64, 128)


def main(
    tokens: Annotated[int, typer.Option(help="Tokens to read.", min=256)] = 32768,
    block_size: Annotated[int, typer.Option(min=1)] = 128,
    topk: Annotated[int, typer.Option(min=2)] = 8,
    out: Annotated[Path, typer.Option(help="PREFIX.json and PREFIX.md are written.")] = RESULTS / "routings",
) -> None:
    """Count what every layer chooses in the second half of a text."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, ids = trained_model(tokens, MoBAConfig(block_size, topk), device)
    with torch.no_grad(), record_routings(model) as record:
        progress = lambda read: print(f"{read:,} of {tokens:,} tokens", flush=True)  # noqa: E731
        prefill(model, ids, chunk_tokens=chunk_tokens_for(device), on_progress=progress)
    routings = record.joined()
    records: Records = []
    for layer, routing in routings.items():
        records.append({"layer": layer, **count(routing.indices[0].to(device), block_size)})
    numbers = [name for name in records[0] if name != "layer"]
    mean = {name: round(sum(record[name] for record in records) / len(records), 2) for name in numbers}
    records += [
        {"layer": "mean", **mean},
        {"layer": "random", **count(random_choice(tokens, block_size, topk), block_size)},
    ]
    header = describe(device)
    header["model"] = (
        f"SmolLM2-135M trained with MoBA, {tokens:,} tokens, {block_size} × {topk}; queries of the second half"
    )
    write(header, records, out, rows)


def count(indices: Tensor, block_size: int) -> dict[str, float]:
    """Of choices [T, H, K]: distinct blocks of consecutive queries of a head, and entries of the fullest block.

    Returns:
        means over heads and windows of the second half of the queries; the entries of all queries' past blocks, as a
        multiple of a block's mean.
    """
    num_queries = indices.shape[0]
    num_blocks = -(-num_queries // block_size)
    own = torch.arange(num_queries, device=indices.device)[:, None, None] // block_size
    is_chosen = torch.zeros(*indices.shape[:2], num_blocks + 1, dtype=torch.bool, device=indices.device)
    is_chosen.scatter_(2, torch.where(indices >= 0, indices, num_blocks).long(), True)
    record: dict[str, float] = {}
    for window in WINDOWS:
        late = is_chosen[num_queries // 2 :, :, :-1]
        late = late[: len(late) // window * window].unflatten(0, (-1, window))
        record[f"distinct of {window}"] = round(late.any(1).sum(-1).double().mean().item(), 1)
    past = is_chosen.scatter(2, own.expand(-1, indices.shape[1], -1), False)[
        ..., :-2
    ]  # all but the last block, which has none
    entries = past.sum(0).double()
    ratio = (entries / entries.mean(1, keepdim=True)).amax(1)
    return {**record, "fullest block": round(ratio.mean().item(), 1), "of any head": round(ratio.amax().item(), 1)}


def random_choice(tokens: int, block_size: int, topk: int) -> Tensor:
    """What normal queries and keys of a head choose: [T, 1, K]."""
    q, k, v = (torch.randn(1, tokens, 1, dim) for dim in (64, 64, 16))
    _, routing = moba_attention(q, k, v, block_size=block_size, topk=topk, return_routing=True)
    indices: Tensor = routing.indices[0]
    return indices


def rows(records: Records) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells."""
    return list(records[0]), [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in r.values()] for r in records]


if __name__ == "__main__":
    typer.run(main)
