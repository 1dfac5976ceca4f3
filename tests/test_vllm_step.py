"""A serving engine's forward passes over random pages: every request gets what its whole sequence gets at once."""

from __future__ import annotations

import random

import pytest
import torch
from helpers import assert_close, make_qkv

from moba import MoBAConfig, moba_attention
from moba.vllm import step

BLOCK, PAGE, HEADS, KV_HEADS, DIM = 4, 8, 4, 2, 16
CONFIG = MoBAConfig(BLOCK, 3, decode="moba", backend="pytorch")


def dense(q, k, v):
    """Full attention of every token."""
    return moba_attention(q, k, v, block_size=q.shape[1], topk=1, backend="reference")


class Request:
    """A sequence of random queries, keys and values, and how far an engine got with it."""

    def __init__(self, length, prompt=None, like=None, shared=0):
        self.length, self.prompt = length, length if prompt is None else prompt
        self.q, self.k, self.v = make_qkv(1, length, length, HEADS, KV_HEADS, DIM, dtype=torch.float64)
        if like is not None:
            for mine, other in ((self.q, like.q), (self.k, like.k), (self.v, like.v)):
                mine[:, :shared] = other[:, :shared]
        self.pages, self.done = [], 0
        self.out = torch.full_like(self.q, torch.nan)

    def expected(self, config):
        """What the paper's attention gives to the whole sequence, and full attention to its answer if asked for."""
        out = moba_attention(self.q, self.k, self.v, backend="reference", **config.selection)
        if config.decode == "full":
            out[:, self.prompt :] = dense(self.q, self.k, self.v)[:, self.prompt :]
        return out


class Engine:
    """What an engine does around MoBA: pages in any order, shared and used again; NaN where nothing was written."""

    def __init__(self, config=CONFIG, num_pages=64, most_keys=50, seed=0):
        self.config, self.most_keys, self.dice = config, most_keys, random.Random(seed)
        # As vLLM lays them: keys and values of a head beside each other.
        cache = torch.full((num_pages, KV_HEADS, PAGE, 2 * DIM), torch.nan, dtype=torch.float64).transpose(1, 2)
        self.k, self.v = cache[..., :DIM], cache[..., DIM:]
        self.means = step.means_beside(None, self.k, BLOCK).fill_(torch.nan)
        self.free = list(range(num_pages))
        self.dice.shuffle(self.free)

    def run(self, batch, padding=0):
        """One forward pass of some more tokens of each request; `padding` empty rows behind them."""
        for request, count in batch:
            while len(request.pages) * PAGE < request.done + count:
                request.pages.append(self.free.pop())
        starts = [0]
        for request, count in batch:
            for position in range(request.done, request.done + count):
                at = request.pages[position // PAGE], position % PAGE
                self.k[at], self.v[at] = request.k[0, position], request.v[0, position]
            starts.append(starts[-1] + count)
            request.done += count
        q = torch.cat([r.q[0, r.done - count : r.done] for r, count in batch] + [torch.zeros(padding, HEADS, DIM)])
        ends = [r.done for r, _ in batch] + [0] * padding
        table = torch.full((len(ends), 20), -7, dtype=torch.int32)
        for row, (request, _) in enumerate(batch):
            table[row, : len(request.pages)] = torch.tensor(request.pages)
        end = torch.tensor(ends, dtype=torch.int32)
        is_decoding = [count == 1 and r.done > r.prompt for r, count in batch]
        if padding or (max(count for _, count in batch) == 1 and self.config.decode == "moba"):
            parts = step.lay_out_single_tokens(table, end, longest=max(ends), page_size=PAGE)
        else:
            is_dense = [d and self.config.decode == "full" for d in is_decoding]
            parts = step.lay_out(starts, ends, table, end, page_size=PAGE, is_dense=is_dense, most_keys=self.most_keys)
        out = torch.full_like(q, torch.nan)
        step.attend(
            parts, q, self.k, self.v, self.means, out, self.config, scale=DIM**-0.5, dense=self._dense_of(batch)
        )
        for (request, count), start in zip(batch, starts, strict=False):
            request.out[0, request.done - count : request.done] = out[start : start + count]
        assert (out[starts[-1] :] == 0).all()

    def _dense_of(self, batch):
        by_end = {r.done: r for r, _ in batch}

        def attend(q, part):
            requests = [by_end[end] for end in part.key_end.tolist()]
            return torch.cat([dense(r.q, r.k, r.v)[0, r.done - 1 : r.done] for r in requests])

        return attend

    def drop(self, request):
        """A preemption: the pages go back, the request is to be read again."""
        self.free += request.pages
        self.dice.shuffle(self.free)
        request.pages, request.done = [], 0


def check(requests, config=CONFIG):
    for request in requests:
        assert_close(request.out, request.expected(config), 1e-12)


@pytest.mark.parametrize("decode", ["moba", "full"])
@pytest.mark.parametrize("seed", range(4))
def test_random_schedules(decode, seed):
    """Requests come, are read in chunks, decode, are preempted and read again, in pages that others had."""
    config = MoBAConfig(BLOCK, 3, decode=decode, backend="pytorch")
    torch.manual_seed(seed)
    engine = Engine(config, num_pages=40, seed=seed)
    dice = engine.dice
    waiting = [Request(dice.randint(1, 70), prompt=dice.randint(1, 70)) for _ in range(14)]
    running, finished, num_dropped = [], [], 0
    while waiting or running:
        if waiting and len(running) < 4 and dice.random() < 0.7:
            running.append(waiting.pop())
        if running and dice.random() < 0.08:
            engine.drop(running[dice.randrange(len(running))])
            num_dropped += 1
        batch, seen = [], set()
        for request in dice.sample(running, len(running)):
            # After a preemption a whole answer would be read as a prompt; here it is decoded again.
            left = request.prompt - request.done
            count = dice.choice([1, 2, 5, 17, left]) if left > 1 else 1
            count = min(count, max(left, 1), request.length - request.done)
            if request.done + count not in seen:  # the test's dense attention tells requests apart by their lengths
                seen.add(request.done + count)
                batch.append((request, count))
        if batch:
            engine.run(batch)
        for request in [r for r in running if r.done == r.length]:
            engine.free += request.pages
            running.remove(request)
            finished.append(request)
    assert num_dropped
    check(finished, config)


def test_a_request_shares_pages_that_another_fills_in_the_same_pass():
    """Its one token reads means that the other's tokens finish, whichever of the two comes first."""
    for order in (1, -1):
        engine = Engine()
        first = Request(33)
        second = Request(33, like=first, shared=32)
        first.pages = [engine.free.pop() for _ in range(5)]
        second.pages, second.done = first.pages[:4], 32
        engine.run([(first, 33), (second, 1)][::order])
        second.out[:, :32] = first.out[:, :32]
        check([first, second])


def test_a_prefix_read_before():
    engine = Engine()
    first = Request(40)
    engine.run([(first, 40)])
    second = Request(60, like=first, shared=40)
    second.pages, second.done = list(first.pages), 40
    engine.run([(second, 13)])
    engine.run([(second, 1)])
    engine.run([(second, 6)])
    second.out[:, :40] = first.out[:, :40]
    check([first, second])


def test_rows_that_pad_a_batch_of_single_tokens_get_zeros():
    engine = Engine()
    requests = [Request(n) for n in (21, 9)]
    engine.run([(r, r.length - 1) for r in requests])
    engine.run([(r, 1) for r in requests], padding=3)
    check(requests)


@pytest.mark.parametrize(("most_keys", "num_parts"), [(1, 4), (50, 3), (10**9, 1)])
def test_chunks_share_a_part_as_far_as_their_keys_permit(most_keys, num_parts):
    engine = Engine(most_keys=most_keys)
    requests = [Request(n) for n in (30, 20, 44, 12)]
    made = []
    lay_out = step.lay_out
    step.lay_out = lambda *args, **kwargs: made.append(lay_out(*args, **kwargs)) or made[-1]
    try:
        engine.run([(r, r.length) for r in requests])
    finally:
        step.lay_out = lay_out
    assert len(made[0]) == num_parts
    check(requests)


def test_tokens_in_order_are_slices():
    """So nothing is copied to the device or gathered."""
    table, end = torch.zeros(4, 9, dtype=torch.int32), torch.tensor([20, 30, 40, 50], dtype=torch.int32)
    common = {"page_size": PAGE, "is_dense": [False] * 4, "most_keys": 1000}
    single, several = step.lay_out([0, 1, 2, 10, 15], [20, 30, 40, 50], table, end, **common)
    assert (single.tokens, several.tokens) == (slice(0, 2), slice(2, 15))
    assert (single.page_table.shape[1], several.page_table.shape[1]) == (4, 7)
    single, several = step.lay_out([0, 1, 9, 10, 15], [20, 30, 40, 50], table, end, **common)
    assert single.tokens.tolist() == [0, 9]
    assert several.tokens.tolist() == [*range(1, 9), *range(10, 15)]
    assert several.keys.cu_q.tolist() == [0, 8, 13]
    assert several.keys.cu_k.tolist() == [0, 30, 80]


def test_means_are_made_anew_beside_other_pages():
    k = torch.zeros(6, PAGE, KV_HEADS, DIM)
    means = step.means_beside(None, k, BLOCK)
    assert means.shape == (6, PAGE // BLOCK, KV_HEADS, DIM)
    assert step.means_beside(means, k, BLOCK) is means
    for other in (k[:5], k.double()):
        assert step.means_beside(means, other, BLOCK) is not means
