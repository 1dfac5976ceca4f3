"""Files that are written whole, whatever happens meanwhile."""

from __future__ import annotations

import os
import stat

import pytest

from moba.files import replacing


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_at_the_end(tmp_path):
    path = tmp_path / "file"
    for data in (b"one", b"2"):
        before = path.read_bytes() if path.exists() else None
        with replacing(path) as file:
            file.write(data)
            file.flush()
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == data
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_after_an_error_it_is_what_it_was(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail():
        with replacing(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_two_writers_at_once_leave_one_whole_file(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as first:
        first.write(b"first" * 1000)
        with replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first" * 1000


def test_modes_and_links_are_kept(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "new"):
            pass
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    finally:
        os.umask(before)
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"old")
    path.chmod(0o600)
    link.symlink_to(path)
    with replacing(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_errors_name_the_file_that_was_asked_for(tmp_path):
    for path in (tmp_path / "nowhere" / "file", tmp_path):
        with pytest.raises(OSError, match=r"No such file|Is a directory") as caught, replacing(path):
            pass
        assert caught.value.filename == str(path)
    with pytest.raises(OSError, match="No space") as caught, replacing("/dev/full") as file:
        file.write(b"x")
    assert caught.value.filename == "/dev/full"
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
