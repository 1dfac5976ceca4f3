"""Shared fixtures. `--backend NAME` (repeatable) chooses the backends that the semantics tests run over."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples in every run, and no limit that a busy machine could reach. Other examples, in every run others:
# --hypothesis-profile search.
settings.register_profile(
    "kernels",
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
# A kernel takes a hundred times longer in the interpreter.
settings.register_profile("interpreter", settings.get_profile("kernels"), max_examples=12)
settings.register_profile("search", settings.get_profile("kernels"), max_examples=1000, derandomize=False)
settings.load_profile("kernels")

if os.environ.get("TRITON_INTERPRET") == "1":
    settings.load_profile("interpreter")

CPU_BACKENDS = ("reference", "pytorch")


def pytest_addoption(parser):
    parser.addoption("--backend", action="append", help="backend for the semantics tests; may be given more than once")
    parser.addoption("--device", default="cpu", help="device of the semantics tests' tensors")


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", metafunc.config.getoption("--backend") or CPU_BACKENDS)


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned(request, monkeypatch):
    """Memory that a backend should write begins as NaN, integers as -7: what is left unwritten fails."""
    if "backend" not in request.fixturenames and not request.module.__name__.startswith("test_triton_"):
        return
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poison(x):
        if x.device.type == "meta":
            return x
        return x.detach().fill_(torch.nan if x.is_floating_point() else 255 if x.dtype == torch.uint8 else -7)

    monkeypatch.setattr(torch, "empty", lambda *size, **options: poison(empty(*size, **options)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size, **o: poison(new_empty(self, *size, **o)))


_skipped_without_reason = []


def pytest_runtest_logreport(report):
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped:").strip()
        if reason in ("", "unconditional skip"):
            _skipped_without_reason.append(report.nodeid)


def pytest_sessionfinish(session):
    if _skipped_without_reason:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    for nodeid in _skipped_without_reason:
        terminalreporter.write_line(f"FAILED {nodeid}: skipped without a stated reason", red=True)
