"""What `from_scratch.py report` writes: which runs belong together (runs), tables of them, and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from from_scratch_report.pictures import pictures
from from_scratch_report.runs import Result, compact, families
from from_scratch_report.tables import tables


def write_report(results: Sequence[Result], out: Path) -> None:
    """Write PREFIX.md, PREFIX.json and the pictures of the largest runs.

    Args:
        results: what `measure` made of each run, and of runs that did not end what `read_stopped` did.
        out: the prefix.

    Raises:
        ValueError: if runs that are of one recipe and seed have the same name, or there is no dense one that ended
            among them.
    """
    kept = []
    for i, family in enumerate(families(results)):
        kept += [compact(result, is_large=not i) for runs in family.runs.values() for result in runs.values()]
        kept += [result for runs in family.stopped.values() for result in runs.values()]
    found = families(kept)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(tables(found))
    out.with_suffix(".json").write_text("[\n" + ",\n".join(json.dumps(result) for result in kept) + "\n]\n")
    for name, figure in pictures(found[0].of_first_seed(), found[0].stopped_of_first_seed()).items():
        figure.savefig(f"{out}-{name}.png")
