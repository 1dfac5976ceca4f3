"""Write docs/models.md: what becomes of every causal decoder of the installed transformers under MoBA.

    python tools/models_page.py [class ...]

Run it once with each tested version: it rewrites the installed one's column, of the named classes or all, and keeps the
others.
"""

from __future__ import annotations

import sys
from pathlib import Path

import transformers

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
NO_SUCH_CLASS = "–"

HEAD = """# Which models have MoBA

The causal decoders of transformers, and what becomes of them with `attn_implementation="moba"`. `make models` writes
this page: for every class it builds a tiny random model from the class's own default config and compares, in fp32 and
within 30 times the rounding error that the model's own attention shows against fp64:

- MoBA that may read every block with the model's own (eager) attention, and MoBA with two blocks with the reference
  backend; the latter must differ from full attention, and no token may see a later one;
- a row that is padded on the left with the row alone, and a text that is read in steps with the same text read at once,
  wherever the model's own attention gives equal logits in both.

What the table says:

- **works**: in every layer.
- **works in the full layers**: MoBA serves the layers that read everything. Layers that read a sliding window or a
  chunk, and recurrent or convolutional ones, run as the model defines them.
- **works with …**: by its default config every layer reads a window, so nothing is left to MoBA, and
  `set_attn_implementation` raises. With this change of the config the model works.
- **refused: …**: a ValueError that begins so, when the attention is set or in the first forward pass. The way out is to
  leave the model's `attn_implementation` as it is.
- **not tried: …**: no config of its own alone makes the model run.

"""


def read_page() -> dict[str, dict[str, str]]:
    """Version -> class -> what the page says of it."""
    if not PAGE.exists():
        return {}
    rows = [line.strip("| \n").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    start = next(i for i, row in enumerate(rows) if row[0] == "class")
    versions = rows[start][1:]
    return {
        version: {row[0]: row[column] for row in rows[start + 1 :] if row[column] != NO_SUCH_CLASS}
        for column, version in enumerate(versions, start=1)
    }


def write_page(found: dict[str, dict[str, str]]) -> None:
    """Write the page of version -> class -> what becomes of it."""
    versions = sorted(found, key=lambda version: [int(part) for part in version.split(".")], reverse=True)
    names = sorted({name for verdicts in found.values() for name in verdicts})
    counts = []
    for version in versions:
        num_working = sum(verdict.startswith("works") for verdict in found[version].values())
        counts.append(f"{num_working} of {len(found[version])} with transformers {version}")
    lines = [f"{', '.join(counts)}.".replace(" of ", " of the ", 1), "", "| class | " + " | ".join(versions) + " |"]
    lines.append("|---" * (1 + len(versions)) + "|")
    for name in names:
        lines.append(f"| {name} | " + " | ".join(found[v].get(name, NO_SUCH_CLASS) for v in versions) + " |")
    PAGE.write_text(HEAD + "\n".join(lines) + "\n")


def main() -> None:
    """Walk over the installed version's classes, or those named."""
    sys.path[:0] = [str(ROOT / "tests")]
    from all_decoders import decoder_classes, verdict

    found = read_page()
    verdicts = {name: verdict(name) for name in sys.argv[1:] or decoder_classes()}
    found[transformers.__version__] = (
        {**found.get(transformers.__version__, {}), **verdicts} if sys.argv[1:] else verdicts
    )
    write_page(found)


if __name__ == "__main__":
    main()
