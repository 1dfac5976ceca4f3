"""Records of an evaluation in a file of JSON lines: a killed run loses none, and goes on where it was.

The first line has the settings, and what the first run was made on; then there is one record a line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moba_lab.lines import NOT_OURS, Lines, open_lines


@contextmanager
def open_records(path: Path, settings: Mapping[str, Any], made_on: Mapping[str, Any]) -> Iterator[Lines]:
    """Open or make a file of records, for this process alone.

    Args:
        path: of the file; its folder is made.
        settings: everything that changes all records; a file with records of others is refused.
        made_on: machine, versions and the like, for a new file's first line.

    Raises:
        ValueError: if it holds something else, or another process is writing to it.
        OSError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_lines(path, begins=("settings", "attention"), advice="choose another --out, or remove it") as lines:
        now = json.loads(json.dumps(settings))
        before = lines.rows[0].get("settings") if lines.rows else now
        if not isinstance(before, dict):
            raise lines.error(1, NOT_OURS)
        # A run that failed before its first record does not stand in the way of the next one.
        if len(lines.rows) <= 1 and (not lines.rows or before != now):
            lines.clear()
            lines.add({"settings": now, "made_on": made_on})
            before = now
        if differing := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
            raise lines.error(1, f"made with another {', '.join(differing)}")
        yield lines


def record_of(lines: Lines, cell: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record with these values, or None."""
    return next((row for row in lines.rows[1:] if cell.items() <= row.items()), None)
