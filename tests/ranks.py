"""Processes of one gloo group that run functions for tests."""

from __future__ import annotations

import tempfile
import traceback
from datetime import timedelta
from functools import cache
from pathlib import Path
from queue import Empty

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Far more than ranks need which do not wait for each other forever.
COLLECTIVE_S, RESULT_S = 120, 600


def _serve(rank, num_ranks, store, tasks, results, together):
    torch.set_num_threads(1)
    together.wait()  # imports may end many seconds apart
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=COLLECTIVE_S)
    )
    while True:
        function, arguments = tasks.get()  # a file's first function imports that file
        together.wait()
        try:
            results.put((True, function(rank, *arguments)))
        except Exception as error:
            results.put((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


class Ranks:
    """A group of processes; `run` calls a function (rank, *arguments) on all of them."""

    def __init__(self, num_ranks, folder):
        context = mp.get_context("spawn")
        self.num_ranks = num_ranks
        self._tasks = [context.Queue() for _ in range(num_ranks)]
        self._results = [context.Queue() for _ in range(num_ranks)]
        self._together = context.Barrier(num_ranks)  # held: its semaphores end with it
        self._processes = [
            context.Process(
                target=_serve,
                args=(rank, num_ranks, folder / "store", self._tasks[rank], self._results[rank], self._together),
                daemon=True,
            )
            for rank in range(num_ranks)
        ]
        for process in self._processes:
            process.start()

    def run(self, function, *arguments):
        """What the function returned on each rank; an AssertionError with the first rank's message if it raised."""
        outcomes = self.outcomes(function, *arguments)
        for rank, (is_right, value) in enumerate(outcomes):
            assert is_right, f"rank {rank}: {value}"
        return [value for _, value in outcomes]

    def outcomes(self, function, *arguments):
        """For each rank whether the function returned, and its value or what it raised."""
        for tasks in self._tasks:
            tasks.put((function, arguments))
        return [self._result(results) for results in self._results]

    def _result(self, results):
        for _ in range(RESULT_S):
            try:
                return results.get(timeout=1)
            except Empty:
                assert all(process.is_alive() for process in self._processes), "a rank has died"
        raise AssertionError(f"no result for {RESULT_S} s")


@cache
def group_of(num_ranks):
    """A group that all tests of this process share: starting one takes seconds. It ends with this process."""
    return Ranks(num_ranks, Path(tempfile.mkdtemp()))
