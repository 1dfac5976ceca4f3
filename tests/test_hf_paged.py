"""Continuous batching with MoBA: every request gets the tokens it would get alone."""

from __future__ import annotations

import copy
import random
import threading
from collections import Counter

import pytest
import torch
from real_model import smollm2  # noqa: F401
from tiny_models import FAMILIES, SHAPE, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import RequestState

from moba import MoBAConfig, register_moba
from moba.hf import enable_paged
from moba.hf.paged_step import PagedMoBA

BLOCK = 8
SPARSE = {"block_size": BLOCK, "topk": 3, "backend": "pytorch", "decode": "moba"}
NEW = 12
PAGE_SIZE = "page_size" if hasattr(ContinuousBatchingConfig(), "page_size") else "block_size"


@pytest.fixture(scope="module")
def model():
    """In fp64: what is read at once, which rounding depends on, is a matter of time, and scores in fp32 nearly tie."""
    return tiny_model().double()


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Pages and block means start as NaN, so that one read before it is written shows."""
    init = PagedMoBA.__init__

    def poisoned(self, *args):
        init(self, *args)
        for tensor in [x for pages in self._pages for x in pages] + self._means:
            if tensor is not None:
                tensor.fill_(torch.nan)

    monkeypatch.setattr(PagedMoBA, "__init__", poisoned)


def batching(page=16, pages=40, tokens=32, **options):
    return ContinuousBatchingConfig(**{PAGE_SIZE: page, "num_blocks": pages, "max_batch_tokens": tokens, **options})


def greedy(new=NEW, **options):
    return GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0, **options)


def prompt(length, seed=0):
    return torch.randint(2, SHAPE["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model, tokens, new=NEW, attention="moba"):
    """The tokens that one request gets from `generate`."""
    model.set_attn_implementation(attention)
    tokens = torch.tensor([tokens], device=model.device)
    made = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=greedy(new))
    return made[0, tokens.shape[1] :].tolist()


def serve(model, prompts, new=NEW, config=None):
    config = config or batching()
    outputs = model.generate_batch(prompts, generation_config=greedy(new), continuous_batching_config=config)
    assert [output.error for output in outputs.values()] == [None] * len(prompts)
    return [output.generated_tokens for output in outputs.values()]


def use(model, **changes):
    """Serve the model with a config, which `generate` uses too."""
    config = MoBAConfig(**{**SPARSE, **changes})
    register_moba(config)
    enable_paged(model, config)
    model.set_attn_implementation("moba")
    return model


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of methods that it is told to watch."""
    count = Counter()

    def watch(owner, name, value=lambda result: 1):
        method = getattr(owner, name)

        def watched(*args, **kwargs):
            result = method(*args, **kwargs)
            count[name] += value(result)
            return result

        monkeypatch.setattr(owner, name, watched)

    count.watch = watch
    return count


class Served:
    """A running manager whose requests may arrive at any time."""

    def __init__(self, model, config, **options):
        self.model, self.manager = model, model.init_continuous_batching(greedy(**options), config)
        self.tokens, self.errors = {}, {}

    def __enter__(self):
        self.manager.start()
        return self

    def __exit__(self, *_):
        self.manager.stop(block=True)

    def add(self, tokens, **options):
        return self.manager.add_request(tokens, streaming=True, **options)

    def result(self):
        """What the manager says next, however long that takes it."""
        while (output := self.manager.get_result(timeout=1)) is None:
            assert self.manager.is_running(), "the manager has stopped"
        return output

    def wait(self, name, num_tokens=None):
        """Until a request has made so many tokens, or finished; what is heard of the others is kept."""
        while name not in self.errors and len(self.tokens.get(name, ())) < (num_tokens or 10**9):
            output = self.result()
            self.tokens[output.request_id] = output.generated_tokens
            if output.is_finished():
                self.errors[output.request_id] = output.error
        return self.tokens[name]


@pytest.mark.parametrize("page", [8, 24, 64])
@pytest.mark.parametrize("full_layers", [0, 1])
@pytest.mark.parametrize("decode", ["moba", "full"])
def test_a_batch_is_its_requests_alone(model, decode, full_layers, page):
    use(model, decode=decode, full_layers=full_layers)
    prompts = [prompt(length, length) for length in (45, 7, 60, 16, 1, 33)]
    assert serve(model, prompts, config=batching(page)) == [alone(model, p) for p in prompts]


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"Llama"}))
def test_other_families(family):
    other = use(tiny_model(family).double(), full_layers=1)
    prompts = [prompt(length, length) for length in (45, 20)]
    assert serve(other, prompts) == [alone(other, p) for p in prompts]


def test_both_decode_modes_and_dense_attention_differ(model):
    """Otherwise the tests here could not tell one attention from another."""
    tokens = prompt(60, 60)
    made = [alone(model, tokens, attention="sdpa")]
    for decode in ("moba", "full"):
        made += serve(use(model, decode=decode), [tokens])
    assert made[0] != made[1] != made[2] != made[0]


@pytest.mark.parametrize(
    "router", ["sink", lambda q, means: -torch.einsum("rhd,nhd->rhn", q[:, ::2], means).repeat(1, 2, 1)]
)
def test_other_routers_and_kept_blocks(model, router):
    use(model, topk=4, keep_first=1, router=router)
    prompts = [prompt(50, 1), prompt(20, 2)]
    assert serve(model, prompts) == [alone(model, p) for p in prompts]


@pytest.mark.parametrize("decode", ["moba", "full"])
@pytest.mark.parametrize("scheduler", ["fifo", "prefill_first"])
def test_requests_arrive_at_any_time(model, decode, scheduler):
    """Random lengths join a running batch at random moments; more than the batch or the pages hold at a time."""
    use(model, decode=decode)
    dice = random.Random(5)
    requests = {}
    with Served(model, batching(pages=20, max_requests_per_batch=5, scheduler_type=scheduler)) as served:
        for seed in range(12):
            tokens, new = prompt(dice.randint(1, 70), seed), dice.randint(1, 25)
            name = served.add(tokens, max_new_tokens=new)
            requests[name] = (tokens, new)
            if dice.random() < 0.7:
                served.wait(name, dice.randint(1, new))
            if seed in (4, 8):
                served.manager.cancel_request(name)
                del requests[name]
        for name, (tokens, new) in requests.items():
            assert served.wait(name) == alone_while_serving(model, tokens, new), name
    assert set(served.errors.values()) == {None}
    assert model.config._attn_implementation == "moba"


def alone_while_serving(model, tokens, new):
    """As `alone`, on a copy: the model itself is serving."""
    other = copy.deepcopy(model)
    other.config._attn_implementation = "moba"
    return alone(other, tokens, new)


@pytest.mark.parametrize("decode", ["moba", "full"])
@pytest.mark.parametrize("sharing", [True, False])
def test_evicted_requests_go_on(model, calls, decode, sharing):
    """Pages run out while all decode: some are evicted, read again, and their pages given to others meanwhile."""
    calls.watch(RequestState, "create_equivalent_initial_request")
    use(model, decode=decode)
    prompts = [prompt(30 + length, length) for length in range(5)]
    expected = [alone(model, p, 40) for p in prompts]
    for _ in range(2):
        assert serve(model, prompts, 40, batching(pages=12, allow_block_sharing=sharing)) == expected
    assert calls["create_equivalent_initial_request"] >= 4


@pytest.mark.parametrize("decode", ["moba", "full"])
def test_shared_prefixes(model, calls, decode):
    """Also a prompt of which one token is left to read, and prompts that go on with an earlier output."""
    calls.watch(PagedAttentionCache, "search_prefix_match")
    use(model, decode=decode)
    start = prompt(64, 1)
    with Served(model, batching(pages=80, tokens=64)) as served:
        requests, output = {}, []
        for tokens in (
            start,
            start + prompt(9, 2),
            start[:49],
            start + prompt(1, 3),
            start,
            start[:40] + prompt(30, 4),
        ):
            name = served.add(tokens)
            requests[name] = tokens
            output = served.wait(name)
        first = served.tokens[next(iter(requests))]
        turn = start + first + prompt(20, 5)
        requests[served.add(turn)] = turn
        turn = requests[name] + output + prompt(3, 6)
        requests[served.add(turn)] = turn
        for name, tokens in requests.items():
            assert served.wait(name) == alone_while_serving(model, tokens, NEW)
    assert calls["search_prefix_match"] == 8


@pytest.mark.parametrize("decode", ["moba", "full"])
@pytest.mark.parametrize("sharing", [True, False])
def test_several_answers_to_a_prompt(model, decode, sharing):
    """transformers reads the prompt once and copies its last page, or all of them, for each answer."""
    use(model, decode=decode)
    tokens = prompt(45, 3)
    served = Served(model, batching(32, allow_block_sharing=sharing))
    served.manager.num_return_sequences = 3
    with served:
        name = served.manager.add_request(tokens)
        outputs = [served.result() for _ in range(3)]
    assert sorted(output.request_id for output in outputs)[0] == name
    assert [output.generated_tokens for output in outputs] == [alone(model, tokens)] * 3


@pytest.mark.parametrize("decode", ["moba", "full"])
def test_equal_prompts_at_once(model, decode):
    """Each reads its prompt into pages of its own, which transformers then finds to be the same."""
    use(model, decode=decode)
    tokens = prompt(50, 1)
    assert serve(model, [tokens] * 4) == [alone(model, tokens)] * 4


@pytest.mark.parametrize("most_pages", [0, 3])
def test_requests_longer_than_a_page_table(model, calls, most_pages):
    """Steps of such a request, and of all that share its batch, come without page tables."""
    calls.watch(PagedMoBA, "_lay_out")
    use(model)
    prompts = [prompt(length, length) for length in (40, 30)]
    config = batching(max_blocks_per_request=most_pages)
    assert serve(model, prompts, 20, config) == [alone(model, p, 20) for p in prompts]
    assert (calls["_lay_out"] > 15) == (most_pages == 0)


@pytest.mark.parametrize("full_layers", [0, 1])
@pytest.mark.parametrize("decode", ["moba", "full"])
def test_padded_batches(model, monkeypatch, calls, decode, full_layers):
    """As CUDA graphs ask for: prompts padded with tokens and decode steps with requests, after a warm-up."""
    init = ModelRunner.__init__

    def padding(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.pad_inputs = True

    monkeypatch.setattr(ModelRunner, "__init__", padding)
    calls.watch(ModelRunner, "run_one_warmup", lambda seconds: 1 if seconds > 0 else -100)  # 0 if it failed
    use(model, decode=decode, full_layers=full_layers)
    prompts = [prompt(length, length) for length in (45, 7, 60)]
    config = batching(tokens=64, max_requests_per_batch=8)
    assert serve(model, prompts, config=config) == [alone(model, p) for p in prompts]
    assert calls["run_one_warmup"] == (5 if decode == "moba" else 1)


@pytest.mark.parametrize("decode", ["moba", "full"])
def test_blocks_of_several_pages(model, decode):
    use(model, decode=decode, block_size=24)
    prompts = [prompt(length, length) for length in (100, 24, 5)]
    config = batching(8, allow_block_sharing=False)
    assert serve(model, prompts, 30, config) == [alone(model, p, 30) for p in prompts]


def test_a_batch_of_decode_steps_allocates_nothing_of_the_length_of_the_context(monkeypatch):
    long = tiny_model(max_position_embeddings=8192)
    use(long, block_size=64)
    largest = Counter()
    attend, start_step = PagedMoBA.attend, PagedMoBA.start_step
    decoding = threading.local()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            given = {id(x.untyped_storage()) for x in args if isinstance(x, torch.Tensor)}
            given |= {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                    largest[str(func)] = max(largest[str(func)], x.untyped_storage().nbytes())
            return result

    def start(self, num_tokens, block_table, cu_seq_lens_k):
        decoding.now = block_table is not None
        return start_step(self, num_tokens, block_table, cu_seq_lens_k)

    def watched(self, *args):
        if not decoding.now:
            return attend(self, *args)
        with Sizes():
            return attend(self, *args)

    monkeypatch.setattr(PagedMoBA, "start_step", start)
    monkeypatch.setattr(PagedMoBA, "attend", watched)
    sizes = []
    shares = []
    init = PagedMoBA.__init__

    def weighed(self, *args):
        init(self, *args)
        keys, means = sum(k.numel() for k, _ in self._pages), sum(x.numel() for x in self._means)
        shares.append(means / keys)

    monkeypatch.setattr(PagedMoBA, "__init__", weighed)
    for length in (600, 6000):
        largest.clear()
        serve(long, [prompt(length, 1)], 3, batching(64, 120, 2048))
        sizes.append(max(largest.values()))
    # Ten times the keys: what is as long as a list of blocks may grow, and stays far below one number a key.
    assert sizes[1] < 2 * sizes[0]
    assert sizes[1] < 6000 * 4
    assert shares == [1 / 64] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs and asynchronous batching need a GPU")
@pytest.mark.parametrize("options", [{}, {"use_async_batching": True}, {"use_cuda_graph": (False, True)}], ids=str)
@pytest.mark.parametrize("full_layers", [0, 1])
@pytest.mark.parametrize("decode", ["moba", "full"])
def test_on_a_gpu(decode, full_layers, options):
    if decode == "full" and "use_cuda_graph" in options:
        pytest.skip("refused, see test_batching_configs_that_cannot_be_honoured")
    gpu = use(tiny_model(head_dim=16).cuda(), decode=decode, full_layers=full_layers, backend="triton")
    prompts = [prompt(length, length) for length in (45, 7, 60, 16, 1, 33)]
    config = batching(max_requests_per_batch=8, **options)
    expected = [alone(gpu, p, 30) for p in prompts]
    assert serve(gpu, prompts, 30, config) == expected
    with Served(gpu, config) as served:
        names = []
        for tokens in prompts:
            names.append(served.add(tokens, max_new_tokens=30))
            served.wait(names[-1], 5)
        assert [served.wait(name) for name in names] == expected
