"""Do routers still differ once a model was trained with them? A task of recall that a laptop trains in minutes.

    python benchmarks/recall.py run recall/ --seeds 2
    python benchmarks/recall.py report recall/ --out benchmarks/results/recall-cpu

In a document of 511 words, names are followed by values among other words; whenever a name comes again, so does its
value. Only the model that finds the name's earlier place knows it: 48 values, 4.7 names between two of one kind. Words
more than 64 tokens after their name's last place count: beyond the blocks nearest to the query.

Every setting reads a model that was trained with full attention, then is trained from there for a third of its tokens,
then from random weights. `run` goes on where it was stopped.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer

from moba import MoBAConfig, register_moba
from moba.bench.machine import describe
from moba.bench.report import Records, write
from moba.evals.records import open_records, record_of
from moba.hf import set_moba_config
from moba.models import load_model
from moba.train.recipe import read_recipe

app = typer.Typer(add_completion=False, help=__doc__)
LENGTH = 512
FAR = 64
WORDS, NAMES, VALUES = ([f"{kind}{i}" for i in range(count)] for kind, count in (("w", 64), ("n", 48), ("v", 48)))
VOCABULARY = {word: i for i, word in enumerate(["<eos>", "<unk>", *WORDS, *NAMES, *VALUES])}
RECIPE = f"""
[data]
folder = "data"
context = {LENGTH}

[model]

[attention]
block_size = 16
topk = 3

[training]
tokens = 1_500_000
rows_per_step = 8
rows_at_once = 8
learning_rate = 4e-3
warmup = 0.05
precision = "fp32"
checkpoint_activations = false
save_every = 1000
keep = 1
"""
SHAPE = (
    "{hidden_size = 128, intermediate_size = 256, num_hidden_layers = 2, num_attention_heads = 4, "
    "num_key_value_heads = 2, initializer_range = 0.1}"
)
FROM_FULL = ["training.tokens=500_000", "training.learning_rate=1e-3"]
# What each setting changes of the recipe.
SETTINGS: dict[str, list[str]] = {
    "16x3": [],
    "16x32, every block": ["attention.topk=32"],
    "16x6": ["attention.topk=6"],
    "8x6": ["attention.block_size=8", "attention.topk=6"],
    "16x3, first block kept": ["attention.keep_first=1"],
    "16x3, block before kept": ["attention.keep_recent=1"],
    "16x3, shared": ['attention.router="shared"'],
    "16x3, unrotated": ['attention.router="unrotated"'],
    "16x6, top_p=0.5": ['attention.router="top_p=0.5"', "attention.topk=6"],
    "16x3, key convolution": ["model.key_convolution=3"],
    "16x3, first layer full": ["attention.full_layers=[0]"],
    "16x3, last layer full": ["attention.full_layers=[1]"],
}
STAGES = ("untrained", "trained from full", "from scratch")
FULL = "full attention"


def make_document(generator: random.Random, length: int = LENGTH - 1) -> list[str]:
    """Words, with names of a dozen among them, each followed by the value that it has in this document."""
    names, values, words = generator.sample(NAMES, 12), {}, []
    word = generator.randrange(len(WORDS))
    while len(words) < length:
        if generator.random() < 0.2 and len(words) < length - 1:
            name = generator.choice(names)
            words += [name, values.setdefault(name, generator.choice(VALUES))]
        else:
            word = (word * 5 + 1 + generator.randrange(4)) % len(WORDS)
            words.append(WORDS[word])
    return words


def find_far(words: list[str]) -> list[bool]:
    """Whether a word is a value whose name last came more than FAR words before."""
    last: dict[str, int] = {}
    far = [False] * len(words)
    for place, word in enumerate(words):
        if word.startswith("n"):
            far[min(place + 1, len(words) - 1)] = word in last and place - last[word] > FAR
            last[word] = place
    return far


def make_data(folder: Path) -> None:
    """Shards of 12,000 documents."""
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    tokenizer.save_pretrained(folder / "tokenizer")
    generator = random.Random(0)
    documents = (json.dumps({"text": " ".join(make_document(generator))}) for _ in range(12_000))
    (folder / "texts.jsonl").write_text("\n".join(documents))
    moba("data", folder / "data", "--from", folder / "texts.jsonl", "--tokenizer", folder / "tokenizer")


def moba(*words: object) -> None:
    """One of moba's commands."""
    subprocess.run([sys.executable, "-m", "moba", *map(str, words)], check=True)


def train(folder: Path, out: Path, changes: list[str]) -> Path:
    """The model of a training, which is made unless it is there."""
    if not (out / "model" / "config.json").is_file():
        options = [option for change in changes for option in ("-s", change)]
        moba("train", folder / "recipe.toml", "--data", folder / "data", "--out", out, *options)
    return out / "model"


@torch.no_grad()
def recall(path: Path, config: MoBAConfig | None = None) -> dict[str, float]:
    """Loss in nats and share found of the far values of 64 documents, read with a config (None: the model's own)."""
    model, _ = load_model(str(path), dtype=torch.float32)
    model.set_attn_implementation("moba")
    if config is not None:
        set_moba_config(model, config)
    generator = random.Random(1)
    documents = [make_document(generator) for _ in range(64)]
    tokens = torch.tensor([[VOCABULARY[word] for word in words] for words in documents])
    far = torch.tensor([find_far(words) for words in documents])[:, 1:]
    logits, values = model.eval()(tokens, use_cache=False).logits[:, :-1][far], tokens[:, 1:][far]
    found = (logits.argmax(-1) == values).float().mean()
    return {"loss": F.cross_entropy(logits, values).item(), "found": found.item(), "values": values.numel()}


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(help="Data, models and records.")],
    seeds: Annotated[int, typer.Option(help="Trainings of each setting.")] = 2,
) -> None:
    """Train and measure."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(RECIPE)
    if not (folder / "data" / "manifest.json").is_file():
        make_data(folder)
    register_moba(None)
    with open_records(folder / "records.jsonl", {"recipe": RECIPE}, describe(torch.device("cpu"))) as lines:
        for seed in range(seeds):
            new = ['model.architecture="llama"', f"model.shape={SHAPE}", f"training.seed={seed}"]
            runs = folder / "runs" / str(seed)
            full = train(folder, runs / FULL, [*new, 'attention.schedule="full"'])
            on = [f"model.base={json.dumps(str(full))}", f"training.seed={seed}", *FROM_FULL]
            cell: dict[str, Any] = {"attention": FULL, "stage": STAGES[2], "seed": seed}
            if record_of(lines, cell) is None:
                lines.add({**cell, **recall(full)})
            for setting, changes in SETTINGS.items():
                for stage in STAGES:
                    cell = {"attention": setting, "stage": stage, "seed": seed}
                    if record_of(lines, cell) is not None:
                        continue
                    if stage == STAGES[0]:
                        result = recall(full, read_recipe(folder / "recipe.toml", [*on, *changes]).attention.config())
                    else:
                        start = on if stage == STAGES[1] else new
                        result = recall(train(folder, runs / f"{setting}, {stage}", [*start, *changes]))
                    lines.add({**cell, **result})
                    print(json.dumps(lines.rows[-1]), flush=True)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Of `run`.")],
    out: Annotated[Path, typer.Option(help="Write PREFIX.json and PREFIX.md.")],
) -> None:
    """Make the table."""
    first, *records = map(json.loads, (folder / "records.jsonl").read_text().splitlines())
    write(first["made_on"], records, out, rows)


def rows(records: Records) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells: of each setting and stage, the mean over seeds and what lies between them."""
    titles = ["attention", *(f"{stage}: {what}" for stage in STAGES for what in ("loss", "found"))]
    cells = []
    for setting in dict.fromkeys(record["attention"] for record in records):
        line = [setting]
        for stage in STAGES:
            here = [record for record in records if (record["attention"], record["stage"]) == (setting, stage)]
            losses, found = [record["loss"] for record in here], [record["found"] for record in here]
            spread = f" ± {(max(losses) - min(losses)) / 2:.2f}" if len(here) > 1 else ""
            line += [f"{mean(losses):.2f}{spread}", f"{mean(found):.0%}"] if here else ["", ""]
        cells.append(line)
    return titles, cells


if __name__ == "__main__":
    app()
