"""The `moba` command: Ctrl-C, and whoever leaves early."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from test_cli import LICENSE, PROGRAM

from moba_lab.cli import options


def test_control_c_says_nothing(moba, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(options, "choose_config", interrupt)
    code, _, err = moba("generate", "-p", "w1")
    assert (code, err) == (130, "")


@pytest.fixture
def control_c():
    """Commands started by a test receive Ctrl-C; those of a shell's background job would ignore it, as it does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("control_c")
@pytest.mark.parametrize("package", ["torch", "typer"])
def test_control_c_says_nothing_while_packages_are_imported(tmp_path, package):
    # torch swallows the exception while it imports numpy, so that none must be raised.
    interrupted = "    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
    (tmp_path / f"{package}.py").write_text(
        f"import os, signal, time\ntry:\n{interrupted}except KeyboardInterrupt:\n    print('swallowed')\n    raise\n"
    )
    (tmp_path / "moba").write_text("from moba_lab.__main__ import main\nmain()")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{LICENSE.parent}:{LICENSE.parent}/lab"}

    def started(*command):
        result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
        return result.returncode, result.stdout, result.stderr

    assert started("-m", "moba_lab", "doctor") == (-signal.SIGINT, "", ""), "130 in a shell"
    assert started(tmp_path / "moba", "doctor") == (-signal.SIGINT, "", "")
    assert "swallowed" in started("-c", "import moba, typer")[1], "another program decides for itself"


@pytest.mark.usefixtures("control_c")
def test_control_c_is_an_exception_once_the_command_has_begun(tmp_path):
    (tmp_path / "moba").write_text(
        "import signal\nimport moba_lab.__main__\nprint(signal.getsignal(signal.SIGINT))\n"
        "import moba_lab.cli\nmoba_lab.cli.main = lambda: print(signal.getsignal(signal.SIGINT))\n"
        "moba_lab.__main__.main()\n"
    )

    def handlers():
        environment = {**os.environ, "PYTHONPATH": f"{LICENSE.parent}:{LICENSE.parent}/lab"}
        command = [sys.executable, tmp_path / "moba"]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.split("\n")

    first, then, _ = handlers()
    assert "default_int_handler" in first, "importing changes nothing"
    assert "default_int_handler" in then
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert handlers() == [str(signal.SIG_IGN)] * 2 + [""], "a background job goes on ignoring it"


def test_a_reader_that_leaves_is_no_error():
    process = subprocess.Popen([*PROGRAM, "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    process.wait()
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
