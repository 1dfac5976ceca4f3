"""Continuous batching with MoBA: every request gets the tokens it would get alone."""

from __future__ import annotations

import copy
import random
import threading
from collections import Counter

import pytest
import torch
import transformers
from real_model import smollm2  # noqa: F401
from tiny_models import FAMILIES, SHAPE, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import RequestState
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moba import MoBAConfig, register_moba
from moba.hf import enable_paged, set_moba_config
from moba.hf.paged_step import PagedMoBA

BLOCK = 8
SPARSE = {"block_size": BLOCK, "topk": 3, "backend": "pytorch", "decode": "moba"}
NEW = 12
PAGE_SIZE = "page_size" if hasattr(ContinuousBatchingConfig(), "page_size") else "block_size"
OLD = PAGE_SIZE == "block_size"


@pytest.fixture(scope="module", params=["Llama", "Qwen3"])
def any_model(request):
    """In fp64: what is read at once, which rounding depends on, is a matter of time, and scores in fp32 nearly tie."""
    return tiny_model(request.param).double()


@pytest.fixture(scope="module")
def model():
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
def test_a_batch_is_its_requests_alone(any_model, decode, full_layers, page):
    use(any_model, decode=decode, full_layers=full_layers)
    prompts = [prompt(length, length) for length in (45, 7, 60, 16, 1, 33)]
    assert serve(any_model, prompts, config=batching(page)) == [alone(any_model, p) for p in prompts]


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"Llama", "Qwen3"}))
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


def test_without_a_batching_config_the_page_size_fits(model):
    use(model, block_size=24)
    generation = greedy()
    manager = model.init_continuous_batching(generation)
    assert getattr(manager.continuous_batching_config, PAGE_SIZE) == 264
    model.set_attn_implementation("moba")


def test_a_prompt_too_long_for_the_cache_fails_alone(model):
    use(model)
    prompts = [prompt(40, 1), prompt(150, 2), prompt(20, 3), []]
    with Served(model, batching(pages=8)) as served:
        names = [served.add(tokens) for tokens in prompts]
        for name in names:
            if name not in served.errors:
                served.wait(name, 10**9)
    assert served.errors[names[0]] is served.errors[names[2]] is None
    assert "needs room for 161 tokens (150 of prompt, max_new_tokens=12)" in served.errors[names[1]]
    assert "empty prompt" in served.errors[names[3]]
    assert served.tokens[names[0]] == alone(model, prompts[0])
    assert served.tokens[names[2]] == alone(model, prompts[2])


def test_the_largest_request_that_fits(model):
    use(model)
    capacity = 8 * 16 - (2 if OLD else 0)
    tokens = prompt(capacity - 11, 1)
    assert serve(model, [tokens], config=batching(pages=8)) == [alone(model, tokens)]


def test_a_request_without_a_limit_keeps_its_tokens_when_pages_run_out(model):
    use(model)
    tokens = prompt(40, 1)
    with Served(model, batching(pages=6), new=None) as served:
        made = served.wait(served.add(tokens))
    (error,) = served.errors.values()
    assert "No requests can be scheduled" in error
    assert len(made) > 40
    assert made == alone(model, tokens, len(made))


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


def test_other_models_and_other_calls_are_untouched(model):
    other = tiny_model("Qwen2").double()
    tokens = prompt(50, 1)
    before = [other.generate_batch([tokens], greedy(), batching())["req_0"].generated_tokens]
    before.append(alone(other, tokens, attention="sdpa"))
    functions = dict(ALL_ATTENTION_FUNCTIONS.items())
    use(model)
    changed = {name for name, function in ALL_ATTENTION_FUNCTIONS.items() if functions.get(name) is not function}
    assert {name.removeprefix("paged|") for name in changed} <= {"moba", "moba_naive", "moba_flash"}
    other.set_attn_implementation("sdpa")
    after = other.generate_batch([tokens], greedy(), batching())["req_0"].generated_tokens
    assert [after, alone(other, tokens, attention="sdpa")] == before
    model.set_attn_implementation("sdpa")
    assert serve(model, [tokens], config=batching()) == [alone(model, tokens)]
    model.set_attn_implementation("sdpa")
    serve(model, [tokens], config=batching())
    assert model.config._attn_implementation == "sdpa"


def test_a_copied_model_serves_itself(model):
    use(model)
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.lm_head.weight, generator=torch.Generator().manual_seed(9))
    tokens = prompt(50, 1)
    assert serve(other, [tokens]) == [alone(other, tokens)] != serve(model, [tokens])


def test_a_later_call_replaces_the_config(model):
    tokens = prompt(60, 60)
    assert serve(use(model, topk=2), [tokens]) == [alone(model, tokens)]
    assert serve(use(model, topk=5), [tokens]) == [alone(model, tokens)]


def test_the_config_that_the_model_carries(model):
    tokens = prompt(60, 60)
    expected = serve(use(model, topk=2), [tokens])
    set_moba_config(model, MoBAConfig(**{**SPARSE, "topk": 2}))
    try:
        enable_paged(model)
        assert serve(model, [tokens]) == expected
    finally:
        set_moba_config(model, None)


def test_a_persistent_manager_keeps_its_cache_and_its_config(model):
    use(model)
    tokens = prompt(60, 1)
    for _ in range(2):
        output = model.generate_batch([tokens], greedy(), batching(), persistent_manager=True)
        assert [o.generated_tokens for o in output.values()] == [alone(model, tokens)]
    use(model, topk=2)
    with pytest.raises(ValueError, match="destroy_cached_continuous_batching_manager"):
        model.generate_batch([tokens], greedy(), batching())
    model.destroy_cached_continuous_batching_manager()
    assert serve(model, [tokens]) == [alone(model, tokens)]


def test_the_model_cannot_be_called_while_it_serves(model):
    use(model)
    with Served(model, batching()), pytest.raises(ValueError, match="stop it before calling"):
        model(torch.tensor([prompt(5)]))
    model(torch.tensor([prompt(5)]))


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"page": 12}, {}, f"{PAGE_SIZE}=12 must be a multiple of the MoBA block_size 8"),
        ({"page": 4}, {}, f"{PAGE_SIZE}=4 must be a multiple .* ContinuousBatchingConfig.{PAGE_SIZE}=8"),
        ({"page": 12, "allow_block_sharing": False}, {}, "must be a multiple"),
        ({"use_cuda_graph": True}, {}, "use_cuda_graph=True"),
        ({"use_cuda_graph": (False, True)}, {"decode": "full"}, "use_cuda_graph=.False, True."),
        ({"cpu_offload_space": 1.0}, {}, "cpu_offload_space=1.0"),
    ],
    ids=str,
)
def test_batching_configs_that_cannot_be_honoured(model, options, changes, message):
    use(model, **changes)
    with pytest.raises(ValueError, match=message):
        model.generate_batch([prompt(5)], greedy(), batching(**options))
    assert model.config._attn_implementation == "moba"


def test_models_that_cannot_be_served(model, monkeypatch):
    with pytest.raises(ValueError, match="no MoBA config"):
        enable_paged(model)
    with pytest.raises(ValueError, match="model must be a transformers model, got int"):
        enable_paged(3)
    with pytest.raises(ValueError, match="config must be a MoBAConfig or None, got 'moba'"):
        enable_paged(model, "moba")
    with pytest.raises(ValueError, match=r"full_layers must fit the model's 3 layers, got \(3,\)"):
        enable_paged(model, MoBAConfig(8, 3, full_layers=(3,)))
    with pytest.raises(ValueError, match=r"full_attention for MoBA in pages, got \['sliding_attention'\]"):
        enable_paged(tiny_model("Mistral", sliding_window=16), MoBAConfig(**SPARSE))
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(ValueError, match="LlamaForCausalLM does not call its attention through"):
        enable_paged(model, MoBAConfig(**SPARSE))


def test_a_transformers_that_cannot_be_served(model, monkeypatch):
    monkeypatch.delattr(PagedAttentionCache, "copy_cache" if OLD else "perform_cache_copy")
    with pytest.raises(ValueError, match=f"transformers {transformers.__version__} cannot serve MoBA"):
        enable_paged(model, MoBAConfig(**SPARSE))


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
