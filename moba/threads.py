"""Run parts of a problem on several threads, each with torch's operators on one core.

torch cuts every operator into one piece for each core and waits for the slowest piece. If another process uses a core,
every short operator waits for that core. Threads that take whole parts do not wait for each other: a slow thread takes
fewer parts.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TypeVar

import torch

X = TypeVar("X")


def for_each(work: Callable[[X], None], items: Sequence[X], device: torch.device) -> None:
    """Call `work` on every item, on a CPU with as many threads as torch uses.

    Threads take the items in order. The calling thread does all the work, with operators on all cores, if there are few
    items, on another device, while autograd records, and while a dispatch mode is active. A profiler that follows one
    thread sees that thread only.

    Args:
        work: called without gradients. Item n starts before item n + 1, so work on an item may wait for earlier items.
        items: parts of about the same size.
        device: where `work` computes.

    Raises:
        The error that `work` raised, after the running calls have ended. No further call starts.
    """
    num_threads = min(torch.get_num_threads(), len(items))
    is_shared = device.type == "cpu" and torch.backends.openmp.is_available()
    # With few items, half the threads would be idle in the last round. Within an operator, many threads gain little.
    is_shared = is_shared and num_threads > 1 and len(items) >= min(2 * num_threads, 8)
    if not is_shared or torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() or not _start(num_threads):
        for item in items:
            work(item)
        return
    waiting, ended, errors = deque(items), threading.Condition(), []
    num_running = num_threads
    is_inference = torch.is_inference_mode_enabled()

    def step() -> bool:
        nonlocal num_running
        try:
            item = waiting.popleft()
        except IndexError:
            with ended:
                num_running -= 1
                ended.notify()
            return False
        try:
            with torch.inference_mode(is_inference), torch.no_grad():
                work(item)
        except BaseException as error:
            errors.append(error)
            waiting.clear()
        return True

    def wait() -> None:
        with ended:
            ended.wait_for(lambda: num_running == 0)

    for _ in range(num_threads):
        _pool().steps.put(step)
    try:
        wait()
    except BaseException:  # such as Ctrl-C, which only the main thread gets
        waiting.clear()
        wait()
        raise
    if errors:
        raise errors[0]


class Turn:
    """When a pass may add to the gradients of its keys: behind the pass before it, block by block, so that every sum
    is taken in the same order whichever thread is faster.
    """

    def __init__(self, before: Turn | None) -> None:
        self._before = before
        self._num_done: float = 0
        self._changed = threading.Condition()

    def wait(self, num_blocks: float) -> None:
        """Until the pass before has added all that it adds to blocks 0 … num_blocks - 1."""
        if (before := self._before) is not None:
            with before._changed:
                before._changed.wait_for(lambda: before._num_done >= num_blocks)

    def done(self, num_blocks: float) -> None:
        """This pass adds no more to blocks 0 … num_blocks - 1, nor does one before it."""
        with self._changed:
            self._num_done = num_blocks
            self._changed.notify_all()

    def end(self) -> None:
        """This pass adds nothing more."""
        self.wait(math.inf)
        self._before = None
        self.done(math.inf)


class _Pool:
    """The threads of this process, shared by all callers in turn, so that their working memory does not add up."""

    def __init__(self) -> None:
        self.steps: SimpleQueue[Callable[[], bool]] = SimpleQueue()
        self.num_threads = 0
        self.lock = threading.Lock()


# By process id: a forked process has none of its parent's threads.
_pools: dict[int, _Pool] = {}


def _pool() -> _Pool:
    return _pools.get(os.getpid()) or _pools.setdefault(os.getpid(), _Pool())


def _start(num_threads: int) -> bool:
    """Start threads up to `num_threads`; False if the system, or an interpreter shutting down, allows no more."""
    pool = _pool()
    with pool.lock:
        try:
            while pool.num_threads < num_threads:
                threading.Thread(target=_serve, args=(pool.steps,), name="moba", daemon=True).start()
                pool.num_threads += 1
        except RuntimeError:
            return False
    return True


def _serve(steps: SimpleQueue[Callable[[], bool]]) -> None:
    """Run steps of the waiting calls, and take turns between calls."""
    _use_one_core()
    while True:
        step = steps.get()
        while step():
            if not steps.empty():
                steps.put(step)
                break
        del step  # it holds the caller's tensors


def _use_one_core() -> None:
    """Make torch's operators in this new thread run on this thread only."""
    num_threads = torch.get_num_threads()
    # This sets it for this thread and for later threads. A short-lived thread resets it for the later ones.
    torch.set_num_threads(1)
    try:
        other = threading.Thread(target=torch.set_num_threads, args=(num_threads,), daemon=True)
        other.start()
        other.join()
    except RuntimeError:  # no more threads
        torch.set_num_threads(num_threads)
