"""Evaluations of `moba eval` over documents: their loss, and the recall of a passage that is read twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import exp, log
from typing import TYPE_CHECKING, Annotated, Any

from moba_lab.cli.eval_setup import (
    DataOption,
    DocumentsOption,
    LengthOption,
    Setup,
    TextOption,
    evaluation,
    of_text,
    parse_lengths,
    setting_name,
)

if TYPE_CHECKING:
    from moba_lab.evals.reader import Reader

# How far above full attention's perplexity a setting may lie to be recommended.
TOLERANCE = 0.05
Record = dict[str, Any]
CopiedOption = Annotated[int, of_text("Tokens of the passage.", min=2)]


@evaluation
def loss(
    setup: Setup,
    length: LengthOption = 8192,
    documents: DocumentsOption = 4,
    last: Annotated[int, of_text("Tokens of the end, and of each range.", min=1)] = 1024,
    data: DataOption = None,
    text: TextOption = None,
) -> None:
    """The loss by position, and at the end of long texts (the trailing loss of the paper).

    moba eval loss --length 32768 --data data/permissive --compare -m path/to/model
    """
    from moba_lab.evals.language import perplexity
    from moba_lab.pictures.evaluations import plot_curves

    attentions = setup.attentions()
    run = setup.begin("loss", length, length=length, last=last, data=data)
    if length < 2:
        raise ValueError(f"length must be at least 2 tokens, of which the last are predicted, got {length}")
    tokens = run.documents(length, documents, data, text)

    def measure(reader: Reader, document: str) -> Record:
        return perplexity(reader, tokens[document], last=last)

    cells = [{"document": name} for name in tokens]
    curves, table = {}, {}
    for name, part in run.measure(attentions, cells, measure, lambda r: f"perplexity {r['perplexity']:.2f}").items():
        starts = [position["start"] for position in part[0]["positions"]]
        losses = [_mean(log(r["positions"][i]["perplexity"]) for r in part) for i in range(len(starts))]
        curves[name] = ([start + last / 2 for start in starts], losses)
        total, end = _mean(r["loss"] for r in part), _mean(log(r["perplexity_last"]) for r in part)
        table[name] = {"loss": f"{total:.4f}", f"last {last:,}": f"{end:.4f}", "perplexity": f"{exp(total):.2f}"}
        table[name] |= {"documents": str(len(part))}
    title = f"Loss by position · {setup.model_name}"
    figure = plot_curves(curves, title, x_label="position", y_label="loss (nats)")
    run.write(title, figure, {f"{length:,} tokens": table})


@evaluation
def sparsity(
    setup: Setup,
    length: LengthOption = 8192,
    documents: DocumentsOption = 2,
    data: DataOption = None,
    text: TextOption = None,
) -> None:
    """Perplexity, and recall of a repeated passage, against the share of keys that is read, beside full attention.

    The last sixteenth of each text repeats a passage from three eighths of its length before.

        moba eval sparsity --settings "128x4, 128x8, 128x8 router=shared, 512x3" --length 8192
    """
    from moba_lab.evals.sparsity import evaluate_sparsity
    from moba_lab.pictures.evaluations import plot_sparsity

    attentions = {"full": None, **setup.attentions("128x4, 128x6, 128x8, 128x16, 512x3, 512x8")}
    run = setup.begin("sparsity", length, length=length, data=data)
    if length < 32:
        raise ValueError(f"length must be at least 32 tokens, of which the last sixteenth is a copy, got {length}")
    copied = length // 16
    tokens = run.documents(length - copied, documents, data, text)

    def measure(reader: Reader, document: str) -> Record:
        return evaluate_sparsity(reader, tokens[document], num_copied=copied, distance=3 * length // 8)

    def told(row: Record) -> str:
        return f"perplexity {row['perplexity']:.2f}, copy {row['perplexity_second']:.2f}"

    means = {}
    for name, part in run.measure(attentions, [{"document": name} for name in tokens], measure, told).items():
        keys = ("perplexity", "perplexity_last", "perplexity_first", "perplexity_second")
        means[name] = {key: _geometric(r[key] for r in part) for key in keys}
        means[name]["keys_read"] = _mean(r["keys_read"] for r in part)
    full = means["full"]
    table = {
        name: {
            "keys read": f"{v['keys_read']:.1%}",
            "perplexity": f"{v['perplexity']:.2f}",
            "last 1K": f"{v['perplexity_last']:.2f}",
            "above full": f"{v['perplexity'] / full['perplexity'] - 1:+.1%}",
            "copy": f"{v['perplexity_second']:.2f}",
        }
        for name, v in means.items()
    }
    within = [name for name, v in means.items() if v["perplexity"] <= full["perplexity"] * (1 + TOLERANCE)]
    sparsest = min(within, key=lambda name: means[name]["keys_read"])
    notes = [
        f"Perplexity of {length - copied:,} tokens of {', '.join(tokens)} (geometric mean), and of the second copy of "
        f"{copied:,} of their tokens, {3 * length // 8:,} tokens after the first (of the first copy with full "
        f"attention: {full['perplexity_first']:.2f}).",
        f"The sparsest setting whose perplexity is at most {TOLERANCE:.0%} above full attention's: {sparsest}.",
    ]
    title = f"Perplexity against keys read · {setup.model_name}"
    run.write(title, plot_sparsity(means, title), {"block size x top-k": table}, notes)


@evaluation
def copy(
    setup: Setup,
    length: LengthOption = 8192,
    distances: Annotated[str, of_text("Tokens from a passage to its copy.", metavar="LIST")] = "1K,2K,4K",
    copied: CopiedOption = 256,
    documents: DocumentsOption = 2,
    data: DataOption = None,
    text: TextOption = None,
) -> None:
    """Perplexity of a passage that is read a second time: low only if its first copy is found.

    moba eval copy --length 32768 --distances 4K,16K --compare
    """
    from moba_lab.evals.language import copy_recall
    from moba_lab.pictures.evaluations import plot_curves

    attentions, gaps = setup.attentions(), parse_lengths(distances)
    run = setup.begin("copy", length, length=length, copied=copied, data=data)
    if not copied <= min(gaps) <= max(gaps) <= length - copied:
        raise ValueError(
            "copied <= distances <= length - copied must hold, "
            f"got copied={copied}, distances={distances}, length={length}"
        )
    tokens = run.documents(length - copied, documents, data, text)

    def measure(reader: Reader, document: str, distance: int) -> Record:
        return copy_recall(reader, tokens[document], num_copied=copied, distance=distance)

    def at(part: list[Record], distance: int, key: str) -> float:
        return _geometric(r[key] for r in part if r["distance"] == distance)

    cells = [{"document": name, "distance": distance} for name in tokens for distance in gaps]
    parts = run.measure(attentions, cells, measure, lambda r: f"copy {r['perplexity_second']:.2f}")
    curves = {name: (gaps, [at(part, gap, "perplexity_second") for gap in gaps]) for name, part in parts.items()}
    title = f"A passage read twice · {setup.model_name}"
    figure = plot_curves(
        curves, title, x_label="tokens between the copies", y_label="perplexity of the second copy", is_log=True
    )
    columns = {"first copy": "perplexity_first", "second copy": "perplexity_second"}
    tables = {
        name: {f"{gap:,} tokens": {c: f"{at(part, gap, key):.2f}" for c, key in columns.items()} for gap in gaps}
        for name, part in parts.items()
    }
    run.write(title, figure, tables)


@evaluation
def layers(
    setup: Setup,
    length: LengthOption = 4096,
    copied: CopiedOption = 256,
    choose: Annotated[int, of_text("Layers to keep full.", min=1)] = 3,
    documents: DocumentsOption = 2,
    data: DataOption = None,
    text: TextOption = None,
) -> None:
    """Which layers to keep full: those without which a passage that is read a second time is not found.

    One layer after another is chosen, each time the one that lowers the passage's perplexity most; after the first,
    only layers that alone were among the best are tried.

        moba eval layers -m path/to/model --block-size 128 --topk 4
    """
    from moba_lab.evals.language import copy_recall
    from moba_lab.evals.layers import choose_layers
    from moba_lab.pictures.evaluations import plot_curves

    given = [config for config in setup.attentions().values() if config is not None]
    if len(given) != 1:
        raise ValueError(f"settings: layers are chosen for one setting of MoBA, got {setup.listed!r}")
    run = setup.begin("layers", length, length=length, copied=copied, data=data)
    num_layers = run.session.num_layers
    if choose >= num_layers:
        raise ValueError(f"choose must be below the model's {num_layers} layers, got {choose}")
    if copied > length // 4:
        raise ValueError(f"copied must be at most a quarter of length={length}, got {copied}")
    tokens = run.documents(length - copied, documents, data, text)

    def measure(reader: Reader, document: str) -> Record:
        return copy_recall(reader, tokens[document], num_copied=copied, distance=3 * length // 4)

    def copies(full_layers: Sequence[tuple[int, ...] | int]) -> list[float]:
        """The perplexity of the copy with each choice of full layers."""
        configs = {setting_name(c): c for c in (replace(given[0], full_layers=layers) for layers in full_layers)}
        cells = [{"document": name} for name in tokens]
        parts = run.measure(configs, cells, measure, lambda r: f"copy {r['perplexity_second']:.2f}")
        return [_geometric(r["perplexity_second"] for r in part) for part in parts.values()]

    counts = list(range(choose + 1))
    full, *lasts = copies([num_layers, *counts])
    best = choose_layers(copies, num_layers, choose)
    chosen = [lasts[0], *best.values]
    title = f"Layers to keep full · {setup.model_name}"
    figure = plot_curves(
        {"chosen layers": (counts, chosen), "the last layers": (counts, lasts)}, title, x_label="full layers",
        y_label="perplexity of the second copy", is_log=True, marks={"all layers full": full},
    )  # fmt: skip
    copy_of = {f"{n} full": {"chosen": f"{chosen[n]:.2f}", "the last": f"{lasts[n]:.2f}"} for n in counts}
    copy_of["all full"] = {"chosen": f"{full:.2f}", "the last": f"{full:.2f}"}
    single = {f"{layer}": {"perplexity": f"{value:.2f}"} for layer, value in best.alone.items()}
    listed = ",".join(map(str, best.layers)) + ("," if choose == 1 else "")
    notes = [
        f"Perplexity of the second copy of {copied} tokens, {3 * length // 4:,} tokens after the first, at the end of "
        f"{', '.join(tokens)}, with {setting_name(replace(given[0], full_layers=0))} in all other layers.",
        f"Best {choose}: `--full-layers {listed}`",
    ]
    run.write(title, figure, {"second copy": copy_of, "layer that alone is full": single}, notes)
    print(f"--full-layers {listed}")


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _geometric(perplexities: Iterable[float]) -> float:
    """The perplexity of the mean loss."""
    return exp(_mean(map(log, perplexities)))
