"""What commands are given, checked."""

from __future__ import annotations

import pytest

from moba_lab.checks import require_folder


def test_a_folder_to_write_into(tmp_path, monkeypatch):
    require_folder("out", tmp_path / "new" / "newer")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=rf"out='{file}/below': {file} is a file: name a folder"):
        require_folder("out", file / "below")
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # nothing is refused to root
    with pytest.raises(ValueError, match=f"out='{tmp_path}/new': {tmp_path} cannot be written to"):
        require_folder("out", tmp_path / "new")
