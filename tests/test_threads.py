"""Parts shared among threads: the same bits for any number of threads, and no trace of them in the caller's process."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import make_qkv
from torch.utils._python_dispatch import TorchDispatchMode

from moba import moba_attention, routing
from moba.backends.pytorch import attention as pytorch_attention
from moba.threads import for_each

CPU = torch.device("cpu")
OPTIONS = {"block_size": 32, "topk": 4, "backend": "pytorch"}


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(pytorch_attention, "CPU_PASS_BYTES", 1 << 18)
    monkeypatch.setattr(pytorch_attention, "CPU_STEP_BYTES", 1 << 17)
    monkeypatch.setattr(routing, "_CHUNK_SIZE", 1 << 12)


@pytest.fixture
def used(monkeypatch):
    """Names of the threads that ran a pass or scored a chunk."""
    names = set()

    def watch(module, name):
        function = getattr(module, name)

        def call(*args):
            names.add((name, threading.current_thread().name))
            return function(*args)

        monkeypatch.setattr(module, name, call)

    watch(pytorch_attention, "_forward_pass")
    watch(pytorch_attention, "_backward_pass")
    watch(routing, "select_blocks")
    return names


def results(q, k, v, d_out, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse, chosen = moba_attention(*leaves, **OPTIONS | options, return_lse=True, return_routing=True)
    return out.detach(), lse.detach(), chosen.indices, *torch.autograd.grad(out, leaves, d_out)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("router", ["mean", "shared", "top_p=0.9"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1000, 1000, 6, 2, 64), torch.float32),
        ((2, 1000, 1111, 3, 1, 32), torch.float32),
        ((1, 1000, 1000, 4, 4, 64), torch.bfloat16),
    ],
    ids=str,
)
def test_any_number_of_threads_gives_the_same_bits(used, shape, dtype, router):
    q, k, v = make_qkv(*shape, dtype=dtype)
    d_out = torch.randn_like(q)
    torch.set_num_threads(1)
    alone = results(q, k, v, d_out, router=router)
    assert {thread for _, thread in used} == {threading.current_thread().name}
    for num_threads in (2, 3, 2):
        used.clear()
        torch.set_num_threads(num_threads)
        shared = results(q, k, v, d_out, router=router)
        assert used == {(name, "moba") for name in ("_forward_pass", "_backward_pass", "select_blocks")}
        assert all(map(torch.equal, shared, alone))
        assert torch.get_num_threads() == num_threads


@pytest.mark.usefixtures("small_parts")
def test_six_callers_at_once(used):
    """Each gets the bits that it gets alone, and neither it nor a thread that begins later loses a core."""
    problems = [make_qkv(1, 600 + 50 * i, 600 + 50 * i, 4, 2, 32) for i in range(6)]
    torch.set_num_threads(1)
    alone = [results(*problem, problem[0]) for problem in problems]
    torch.set_num_threads(2)
    used.clear()

    def run(problem):
        return [results(*problem, problem[0]) for _ in range(3)], torch.get_num_threads()

    with ThreadPoolExecutor(6) as callers:
        for (repeats, num_threads), expected in zip(callers.map(run, problems), alone, strict=True):
            assert all(all(map(torch.equal, repeat, expected)) for repeat in repeats)
            assert num_threads == 2
    assert {thread for _, thread in used} == {"moba"}
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 2


@pytest.mark.usefixtures("small_parts")
def test_inference_mode(used):
    q, k, v = make_qkv(1, 1000, 1000, 4, 2, 32)
    expected = moba_attention(q, k, v, **OPTIONS)
    with torch.inference_mode():
        assert torch.equal(moba_attention(q, k, v, **OPTIONS), expected)
    assert {thread for _, thread in used} == {"moba"}


@pytest.mark.usefixtures("small_parts")
def test_a_users_router_is_called_by_the_callers_thread(used):
    threads = set()

    def router(q, means):
        threads.add(threading.current_thread())
        return torch.zeros(*q.shape[:2], means.shape[0])

    moba_attention(*make_qkv(1, 1000, 1000, 4, 2, 32), **OPTIONS, router=router)
    assert threads == {threading.current_thread()}
    assert ("_forward_pass", "moba") in used


@pytest.mark.usefixtures("small_parts")
def test_a_dispatch_mode_sees_every_operator(used):
    class Count(TorchDispatchMode):
        num_kernels = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.num_kernels += "flash" in str(func)
            return func(*args, **kwargs or {})

    with Count() as count:
        moba_attention(*make_qkv(1, 1000, 1000, 4, 2, 32), **OPTIONS)
    assert count.num_kernels > 8
    assert {thread for _, thread in used} == {threading.current_thread().name}


@torch.no_grad()
def test_an_error_ends_the_call_and_not_the_threads():
    done = []

    def work(item):
        if item == 5:
            raise ValueError("five")
        done.append(item)

    for _ in range(3):
        with pytest.raises(ValueError, match="five"):
            for_each(work, range(1000), CPU)
    assert len(done) < 3000
    done.clear()
    for_each(lambda item: done.append((item, torch.get_num_threads())), range(100), CPU)
    assert sorted(done) == [(item, 1) for item in range(100)]


def test_an_error_in_a_backward_pass_frees_the_passes_behind_it(small_parts, monkeypatch):
    q, k, v = make_qkv(1, 1000, 1000, 3, 1, 32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = moba_attention(*leaves, **OPTIONS)
    backward, calls = pytorch_attention.dense.backward, []

    def fail(*args, **options):
        calls.append(args)
        if len(calls) == 5:
            raise RuntimeError("no room")
        return backward(*args, **options)

    monkeypatch.setattr(pytorch_attention.dense, "backward", fail)
    with pytest.raises(RuntimeError, match="no room"):
        out.sum().backward()


@torch.no_grad()
def test_calls_take_turns():
    """A short call does not wait for the end of a long one."""
    order, begun = [], threading.Event()

    def work(item):
        begun.set()
        time.sleep(0.002)
        order.append("long")

    with ThreadPoolExecutor(1) as other:
        long = other.submit(torch.no_grad()(for_each), work, range(400), CPU)
        begun.wait()
        for_each(lambda item: order.append("short"), range(8), CPU)
        assert order.count("short") == 8
        assert order.count("long") < 200
        long.result()
    assert order.count("long") == 400


@torch.no_grad()
def test_nothing_of_a_call_is_kept():
    x = torch.zeros(1)
    gone = weakref.ref(x)
    for_each(lambda item, x=x: None, range(10), CPU)
    del x
    gc.collect()
    assert gone() is None


def run_script(script, **options):
    """Standard output of a Python process, which must end well and say nothing else."""
    header = "import os, signal, sys, threading, time\nimport torch\nfrom moba.threads import for_each\n"
    header += "torch.set_num_threads(2)\ntorch.set_grad_enabled(False)\nCPU = torch.device('cpu')\n"
    done = subprocess.run(
        [sys.executable, "-c", header + script], capture_output=True, text=True, timeout=300, **options
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_threads_of_its_own():
    assert run_script("""
done = []
for_each(done.append, range(10), CPU)
child = os.fork()
if child == 0:
    for_each(done.append, range(10), CPU)
    print(len(done), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
for_each(done.append, range(10), CPU)
print(len(done))
""") == ["20", "20"]  # fmt: skip


def test_an_interrupt_ends_a_call():
    assert run_script("""
begun, seconds = [], 0.05
def work(item):
    begun.append(item)
    time.sleep(seconds)
    if item == 5:
        os.kill(os.getpid(), signal.SIGINT)
try:
    for_each(work, range(10_000), CPU)
except KeyboardInterrupt:
    print("interrupted", len(begun) < 1000)
at_end = len(begun)
time.sleep(0.2)
print(len(begun) == at_end)
seconds = 0
done = []
for_each(done.append, range(10), CPU)
print(len(done))
""") == ["interrupted", "True", "True", "10"]  # fmt: skip


def test_the_interpreter_ends_with_threads_at_rest_and_calls_under_way():
    """A thread that outlives the main thread, and an exit handler, may still call."""
    assert run_script("""
import atexit
def call(name, num_calls=1):
    torch.set_grad_enabled(False)
    done = []
    for _ in range(num_calls):
        for_each(lambda item: (time.sleep(0.001), done.append(item)), range(20), CPU)
    print(name, len(done), flush=True)
atexit.register(call, "handler")
threading.Thread(target=call, args=("thread", 10)).start()
""") == ["thread", "200", "handler", "20"]  # fmt: skip
