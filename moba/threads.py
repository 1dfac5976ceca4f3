"""Parts of a problem, shared among threads that each run torch's operators alone.

torch cuts every operator into a piece for each core and waits for the slowest. While another process takes a core away,
each of many short operators waits for it. A thread with parts of its own holds up nobody: others take what is left.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TypeVar

import torch

X = TypeVar("X")


def for_each(work: Callable[[X], None], items: Sequence[X], device: torch.device) -> None:
    """Call `work` on every item: on a CPU by as many threads as torch uses here, which take the items in order.

    The calling thread does it alone, with its operators on all cores, where items are few, on another device, where
    autograd records, and where a dispatch mode follows the operators. (A profiler of one thread sees only that one.)

    Args:
        work: called without gradients by the threads. The n-th item is begun before the n + 1st, so it may wait for
            what the work on earlier items does.
        items: parts of about the same size.

    Raises:
        What `work` raises, once the calls under way have ended; no other is begun then.
    """
    num_threads = min(torch.get_num_threads(), len(items))
    is_shared = device.type == "cpu" and torch.backends.openmp.is_available()
    # Half the threads would rest in the last round of few items. Many threads gain little within an operator.
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


class _Pool:
    """The threads of this process. They serve all callers by turns, so their working memory does not add up."""

    def __init__(self) -> None:
        self.steps: SimpleQueue[Callable[[], bool]] = SimpleQueue()
        self.num_threads = 0
        self.lock = threading.Lock()


# By process id: a forked process has none of its parent's threads.
_pools: dict[int, _Pool] = {}


def _pool() -> _Pool:
    return _pools.get(os.getpid()) or _pools.setdefault(os.getpid(), _Pool())


def _start(num_threads: int) -> bool:
    """Have at least so many threads; False if the system, or the ending interpreter, gives no more."""
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
    """Do steps of the calls that wait, one of each call at a time."""
    _use_one_core()
    while True:
        step = steps.get()
        while step():
            if not steps.empty():
                steps.put(step)
                break
        del step  # it holds the caller's tensors


def _use_one_core() -> None:
    """Have torch's operators in this new thread use this thread only."""
    num_threads = torch.get_num_threads()
    # Sets it for this thread and for threads that are yet to come. For those a short-lived one takes it back.
    torch.set_num_threads(1)
    try:
        other = threading.Thread(target=torch.set_num_threads, args=(num_threads,), daemon=True)
        other.start()
        other.join()
    except RuntimeError:  # no more threads
        torch.set_num_threads(num_threads)
