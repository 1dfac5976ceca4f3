"""README and docs: their Python runs as it stands, their links lead somewhere, and README stays short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")


def library_blocks(page):
    return [block for block in BLOCK.findall(page.read_text()) if "moba_lab" not in block]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short():
    assert len(README.read_bytes()) <= 6 * 1024


@pytest.mark.parametrize("page", [page for page in PAGES if library_blocks(page)], ids=lambda page: page.stem)
def test_blocks_run(page, tmp_path):
    code = "\n".join(library_blocks(page))
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(page.read_text()):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_every_page_is_listed():
    listed = {path for path, _ in LINK.findall((ROOT / "docs" / "README.md").read_text())}
    assert {page.name for page in (ROOT / "docs").glob("*.*")} - {"README.md"} <= listed


def test_readme_runs_both_ways_in():
    """The function and the transformers call are among the README's blocks."""
    text = "".join(library_blocks(README))
    assert "moba_attention(" in text
    assert "register_moba(" in text
