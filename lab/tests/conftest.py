"""Fixtures of the laboratory's tests."""

from __future__ import annotations

import pytest


@pytest.fixture
def moba(capsys):
    """Run the command line in this process: exit code, standard output, standard error."""

    from moba_lab.cli import main

    def run(*args):
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        return (stop.value.code, *capsys.readouterr())

    return run
