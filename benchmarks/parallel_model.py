"""How long one layer's attention takes on many GPUs: the measured rates of one, and of a link, carried to 10M tokens.

    python benchmarks/parallel_model.py

Compute comes from attention-h100.json, the link inside a node from parallel-h200x2.json if that was measured; the rest
are the parameters below. A rank's time is that of the pipeline in moba/parallel/attention.py: the first group of heads'
rows travel while blocks are chosen, each other group's while the one before it is computed. Writes
benchmarks/results/parallel-model.json, .md and .png; where two GPUs were measured, beside what the model says of them.

Letters: S tokens, n ranks, T = S / n, H query heads, G key/value heads, D head dim, N blocks.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer

from moba.parallel.attention import HEAD_GROUPS
from moba.parallel.routing import LENDING_BLOCKS, lent_rows
from moba_lab.bench import machine
from moba_lab.bench.cases import Case, length_name
from moba_lab.bench.report import Records, write

RESULTS = Path(__file__).parent / "results"
M = 1 << 20
SHAPES = (
    Case(10 * M, 16, 16, 128, 512, 8, torch.bfloat16),
    Case(10 * M, 32, 8, 128, 4096, 12, torch.bfloat16),
)
WAYS = {
    "gather": "gather",
    "selective": "selective, all blocks chosen",
    "clustered": "selective, clustered routings",
    "heads": "heads",
    "nodes": "heads in nodes, gather between",
    "nodes, clustered": "heads in nodes, selective between, clustered",
}


@dataclass(frozen=True)
class Links:
    """What GPUs are linked by: bytes a second of one GPU each way, seconds of a message."""

    gpus_per_node: int
    inside: float
    between: float
    latency: float


@dataclass(frozen=True)
class Rates:
    """What one GPU computes: operations a second of attention, its backward beside its forward; seconds of routing a
    query of a head: `choice` + `score` · blocks before it."""

    attention: float
    backward: float
    choice: float
    score: float


class Times(NamedTuple):
    """Seconds of the slowest rank, and of the parts of its forward if each were alone."""

    forward: float
    backward: float
    routing: float
    attention: float
    travel: float


def main(
    between: Annotated[float, typer.Option(help="GB/s of one GPU to other nodes, each way (400 Gb/s cards: 50).")] = 50,
    inside: Annotated[
        float | None, typer.Option(help="GB/s inside a node; what two H200s were measured at, else 360.")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    clustered: Annotated[float, typer.Option(help="Share of remote blocks that clustered routings choose.")] = 0.1,
    out: Annotated[Path, typer.Option(help="PREFIX.json, .md and .png are written.")] = RESULTS / "parallel-model",
) -> None:
    """Write the model's table and picture."""
    measured = _read("parallel-h200x2")
    links = measured_links(measured, gpus_per_node, between * 1e9)
    if inside is not None:
        links = replace(links, inside=inside * 1e9)
    header = {
        **machine.describe(torch.device("cpu")),
        "links": f"{links.inside / 1e9:.0f} GB/s inside a node of {gpus_per_node}, {between:.0f} between nodes, "
        f"{links.latency * 1e6:.0f} µs a message" + ("" if measured else " (assumed; no two GPUs were measured)"),
        "clustered": f"{clustered:.0%} of the remote blocks are chosen",
    }
    records: Records = []
    for shape in SHAPES:
        rates = measured_rates(shape)
        for num_ranks in (1, 2, 4, 8, 16, 32, 64):
            ways = {way: predict(shape, num_ranks, way, rates, links, clustered) for way in WAYS}
            records.append(
                {
                    "case": f"{length_name(shape.tokens)}, {shape.heads}/{shape.kv_heads} heads, "
                    f"{shape.block_size}/{shape.topk}",
                    "ranks": num_ranks, "rates": asdict(rates),
                    "ways": {way: times._asdict() for way, times in ways.items() if times is not None},
                    "memory_bytes": {way: memory(shape, num_ranks, way, links, clustered) for way in ways},
                }
            )  # fmt: skip
    records += [compared for record in measured for compared in compare(record, links)]
    write(header, records, out, rows)
    plot(records, links, out.with_suffix(".png"))


def _read(name: str) -> Records:
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return []
    records: Records = json.loads(path.read_text())["records"]
    return records


def measured_links(measured: Records, gpus_per_node: int, between: float) -> Links:
    """The link of the measured GPUs, or NVLink 4's 450 GB/s each way at four fifths, and 20 µs."""
    ms = next((record["link"]["ms"]["p2p"] for record in measured if "link" in record), None)
    if ms is None:
        return Links(gpus_per_node, 360e9, between, 20e-6)
    sizes = sorted(int(size) for size in ms)
    return Links(gpus_per_node, sizes[-1] / ms[str(sizes[-1])] * 1e3, between, ms[str(sizes[0])] / 1e3)


def measured_rates(shape: Case) -> Rates:
    """Of the longest measurement of this block size and topk; routing fitted to all with heads of this width."""
    records = [record for record in _read("attention-h100") if record["dtype"] == "bfloat16" and "moba" in record]
    alike = [r for r in records if (r["block_size"], r["topk"]) == (shape.block_size, shape.topk)]
    longest = max(alike, key=lambda r: r["tokens"] * r["heads"])
    trained = max((r for r in alike if "train_ms" in r["moba"]), key=lambda r: r["tokens"] * r["heads"])
    attention = longest["moba"]["forward_ms"] - longest["moba"]["routing_ms"]
    moba = trained["moba"]
    backward = (moba["train_ms"] - moba["forward_ms"]) / (moba["forward_ms"] - moba["routing_ms"])
    routed = [r for r in records if r["tokens"] >= 128 << 10 and r["moba"]["routing_ms"] > 0]
    queries = np.array([r["tokens"] * r["heads"] for r in routed], dtype=float)
    blocks = np.array([r["tokens"] / r["block_size"] / 2 for r in routed])
    seconds = np.array([r["moba"]["routing_ms"] for r in routed]) / 1e3 / queries
    (choice, score), *_ = np.linalg.lstsq(np.stack([np.ones_like(blocks), blocks], axis=1), seconds, rcond=None)
    return Rates(longest["moba_flops"] / attention * 1e3, backward, max(float(choice), 0.0), float(score))


def routing_seconds(shape: Case, num_ranks: int, rates: Rates, lends: bool) -> np.ndarray:
    """What each rank takes to choose blocks."""
    share = shape.tokens // num_ranks
    lent = lent_rows((share,) * num_ranks) if lends else [0] * num_ranks

    def cost(start: float, stop: float) -> float:
        blocks = (stop**2 - start**2) / 2 / shape.block_size
        return shape.heads * (rates.choice * (stop - start) + rates.score * blocks)

    times = [cost(rank * share + lent[rank], (rank + 1) * share) for rank in range(num_ranks)]
    for late, rows in enumerate(lent):
        times[num_ranks - 1 - late] += cost(late * share, late * share + rows)
    return np.array(times)


def travel_seconds(shape: Case, num_ranks: int, way: str, links: Links, clustered: float) -> np.ndarray:
    """What each rank's links take for a forward: the larger of what it sends and receives, inside nodes and between."""
    ranks, share = np.arange(num_ranks), shape.tokens / num_ranks
    is_other, is_before = ranks[:, None] != ranks[None, :], ranks[:, None] < ranks[None, :]  # [from, to]
    same_node = ranks[:, None] // links.gpus_per_node == ranks[None, :] // links.gpus_per_node
    everything, keys = 2 * shape.heads + 2 * shape.kv_heads, 2 * shape.kv_heads
    if way == "heads":
        rows = share / num_ranks * everything * is_other
    elif way in ("gather", "selective", "clustered"):
        rows = share * keys * is_before
    else:
        # A rank has its node's tokens of its own heads, and gets those of the ranks of its place in nodes before.
        per_node = min(num_ranks, links.gpus_per_node)
        same_place = ranks[:, None] % per_node == ranks[None, :] % per_node
        rows = share / per_node * everything * (same_node & is_other)
        rows = rows + share * keys * (same_place & is_before & ~same_node) * (clustered if "clustered" in way else 1.0)
    volume = rows * shape.head_dim * shape.dtype.itemsize * (clustered if way == "clustered" else 1.0)
    parts = ((volume * same_node, links.inside), (volume * ~same_node, links.between))
    seconds = [np.maximum(v.sum(axis=0), v.sum(axis=1)) / rate for v, rate in parts]
    return np.maximum(*seconds) + links.latency * (num_ranks > 1)


def predict(shape: Case, num_ranks: int, way: str, rates: Rates, links: Links, clustered: float) -> Times | None:
    """The slowest rank's times; None where the way does not exist."""
    by_nodes = way.startswith("nodes")
    inside = min(num_ranks, links.gpus_per_node) if by_nodes else num_ranks if way == "heads" else 1
    if shape.kv_heads % inside or (by_nodes and num_ranks == inside > 1):
        return None
    lends = way != "heads" and shape.tokens >= LENDING_BLOCKS * shape.block_size
    routing = np.repeat(routing_seconds(shape, num_ranks // inside, rates, lends) / inside, inside)
    attention = np.full(num_ranks, shape.moba_flops / rates.attention / num_ranks)
    travel = travel_seconds(shape, num_ranks, way, links, clustered)
    # A rank's heads are cut into groups; between nodes those of one place may be too few.
    g = min(HEAD_GROUPS, shape.kv_heads // inside)
    back = rates.backward * attention
    if way == "heads" or by_nodes:
        compute = routing + attention
        forward = travel / g + (g - 1) * np.maximum(compute, travel) / g + compute / g
    else:
        first = np.maximum(routing, travel / g) if way == "gather" else routing + travel / g
        forward = first + (g - 1) * np.maximum(attention, travel) / g + attention / g
    backward = back / g + (g - 1) * np.maximum(back, travel) / g + travel / g
    slowest = int(np.argmax(forward))
    return Times(
        float(forward[slowest]), float(backward.max()), float(routing[slowest]), float(attention[slowest]),
        float(travel[slowest]),
    )  # fmt: skip


def memory(shape: Case, num_ranks: int, way: str, links: Links, clustered: float) -> int:
    """Bytes of a forward on a rank: q, k, v, out and the routing, and what came, two groups of heads at a time.

    Without the kernels' workspace; parallel_memory.py counts all.
    """
    share, itemsize = shape.tokens / num_ranks, shape.dtype.itemsize
    own = share * shape.head_dim * itemsize * (2 * shape.heads + 2 * shape.kv_heads)
    routing = share * shape.heads * shape.topk * 4
    keys = shape.tokens * 2 * shape.kv_heads * shape.head_dim * itemsize * (clustered if "clustered" in way else 1)
    inside = min(num_ranks, links.gpus_per_node) if way.startswith("nodes") else 1
    came = own if way == "heads" else keys / inside + (own if inside > 1 else 0)
    groups = min(HEAD_GROUPS, max(1, shape.kv_heads // inside))
    return int(own + routing + (came * min(1, 2 / groups) if num_ranks > 1 else 0))


def compare(record: dict[str, Any], links: Links) -> Records:
    """A measured case beside the model of it, whose compute is the case's own on one GPU."""
    if "ways" not in record or "forward_ms" not in record["ways"]["one"]:
        return []
    one, num_ranks = record["ways"]["one"], record["ranks"]
    shape = Case(
        record["tokens"], record["heads"], record["kv_heads"], record["head_dim"], record["block_size"], record["topk"],
        getattr(torch, record["dtype"]),
    )  # fmt: skip
    rates = measured_rates(shape)
    alone = float(routing_seconds(shape, 1, rates, False)[0])
    attention = one["forward_ms"] / 1e3 - alone
    backward = (one["train_ms"] - one["forward_ms"]) / 1e3 / attention if "train_ms" in one else rates.backward
    rates = replace(rates, attention=shape.moba_flops / attention, backward=backward)
    found: Records = []
    for way, times in record["ways"].items():
        if way not in WAYS or "failed" in times:
            continue
        sent = times["sent"] / max(1, record["ways"]["gather"]["sent"]) if way == "selective" else 1.0
        said = predict(shape, num_ranks, "clustered" if way == "selective" else way, rates, links, sent)
        if said is not None:
            measured = {name: times[name] / 1e3 for name in ("forward_ms", "train_ms") if name in times}
            found.append({"case": record["case"], "ranks": num_ranks, "way": way, "said": said._asdict(),
                          "measured_s": measured})  # fmt: skip
    return found


def rows(records: Records) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells."""
    titles = ["case", "GPUs", "way", "fwd ms", "fwd+bwd ms", "× one", "routing alone", "attention alone",
              "travel alone", "GiB", "measured fwd ms", "measured fwd+bwd ms"]  # fmt: skip
    cells = []
    one: dict[str, float] = {}
    for record in records:
        if "said" in record:
            said, measured = record["said"], record["measured_s"]
            both = said["forward"] + said["backward"] if "train_ms" in measured else None
            cells.append([record["case"], str(record["ranks"]), f"two H200s: {record['way']}", _ms(said["forward"]),
                          _ms(both), "", *(_ms(said[name]) for name in ("routing", "attention", "travel")), "",
                          _ms(measured["forward_ms"]), _ms(measured.get("train_ms"))])  # fmt: skip
            continue
        for way, times in record["ways"].items():
            both = times["forward"] + times["backward"]
            if record["ranks"] == 1:
                one[record["case"]] = both
                if way != "gather":
                    continue
            name = WAYS[way] if record["ranks"] > 1 else "one GPU"
            cells.append([record["case"], str(record["ranks"]), name, _ms(times["forward"]), _ms(both),
                          f"{one[record['case']] / both:.3g}",
                          *(_ms(times[part]) for part in ("routing", "attention", "travel")),
                          f"{record['memory_bytes'][way] / 2**30:.1f}", "", ""])  # fmt: skip
    return titles, cells


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def plot(records: Records, links: Links, path: Path) -> None:
    """Forward and backward against the number of GPUs: a panel for each case, a line for each way."""
    cases = list(dict.fromkeys(record["case"] for record in records if "said" not in record))
    figure, all_axes = plt.subplots(1, len(cases), figsize=(2 + 6 * len(cases), 5), layout="constrained", squeeze=False)
    for axes, case in zip(all_axes[0], cases, strict=True):
        lines: dict[str, dict[int, float]] = {}
        for record in records:
            if record["case"] == case and "said" not in record:
                for way, times in record["ways"].items():
                    lines.setdefault(way, {})[record["ranks"]] = (times["forward"] + times["backward"]) * 1e3
        ranks = sorted(lines["gather"])
        axes.plot(ranks, [lines["gather"][1] / n for n in ranks], "k:", label="one GPU's, divided")
        for way, points in lines.items():
            style = {"linestyle": "--"} if "clustered" in way else {}
            axes.plot(list(points), list(points.values()), marker="o", markersize=4, label=WAYS[way], **style)
        axes.axvline(links.gpus_per_node, color="grey", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="forward + backward, ms", title=case)
        axes.set_xticks(ranks, [str(n) for n in ranks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(
        f"Model: one layer's attention; {links.inside / 1e9:.0f} GB/s inside nodes of {links.gpus_per_node}, "
        f"{links.between / 1e9:.0f} GB/s between"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
