"""vLLM with the plugin, started once as its users start it: tokens equal transformers', whatever the engine does.

`make test-vllm` installs what this needs into an environment of its own.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moba import MoBAConfig, register_moba
from moba_lab.models.load import load_model

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

CONFIG = MoBAConfig(32, 4, keep_first=1, full_layers=(1,), decode="moba")
VOCAB, NEW = 64, 24
# 53 pages of 128 tokens (one is never used): what a prompt of 6,000 tokens needs, and less than many at once do.
PAGES = 53


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model of three layers, its config with `moba`, and a tokenizer of as many words as tokens."""
    path = tmp_path_factory.mktemp("model")
    model = tiny_model(hidden_size=64, head_dim=32, max_position_embeddings=8192, vocab_size=VOCAB)
    model.config.moba = CONFIG.to_dict()
    model.save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    register_moba()
    return tiny_model(hidden_size=64, head_dim=32, max_position_embeddings=8192, vocab_size=VOCAB)


class Server:
    """An OpenAI-compatible server, and what a client asks of it."""

    def __init__(self, folder, log, *options):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = log
        command = (
            f"{sys.executable} -m vllm.entrypoints.openai.api_server --model {folder} --served-model-name m "
            f"--dtype float32 --enforce-eager --max-num-batched-tokens 512 --port {self.port}"
        )
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
        self.process = subprocess.Popen(
            [*command.split(), *options], stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment
        )
        for _ in range(600):
            assert self.process.poll() is None, log.read_text()[-4000:]
            try:
                if self.get("/health")[0] == 200:
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError("the server did not start")

    def stop(self):
        self.process.terminate()
        self.process.wait(60)

    def get(self, path):
        connection = HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()

    def post(self, path="/v1/completions", **values):
        connection = HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.request("POST", path, json.dumps(values), {"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def ask(self, tokens, new=NEW, **options):
        return self.post(
            model="m", prompt=tokens, max_tokens=new, temperature=0, ignore_eos=True, return_token_ids=True, **options
        )

    def complete(self, tokens, new=NEW):
        """The tokens that follow."""
        _, response = self.ask(tokens, new)
        assert response.status == 200, response.read()
        return json.loads(response.read())["choices"][0]["token_ids"]

    def together(self, prompts, new=NEW):
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda tokens: self.complete(tokens, new), prompts))

    def count(self, metric):
        """The value of one of the engine's counters."""
        lines = [line for line in self.get("/metrics")[1].splitlines() if line.startswith(f"vllm:{metric}_total")]
        return sum(float(line.split()[-1]) for line in lines)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    server = Server(folder, log, "--max-model-len", "6400", "--num-gpu-blocks-override", str(PAGES))
    yield server
    server.stop()


def prompt(length, seed=0):
    return torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model, tokens, new=NEW, attention="moba"):
    """The tokens that transformers writes."""
    model.set_attn_implementation(attention)
    model.config.moba = CONFIG.to_dict()
    made = model.generate(
        torch.tensor([tokens]), max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None
    )
    return made[0, len(tokens) :].tolist()


def test_the_log_says_what_is_served(server):
    text = server.log.read_text()
    assert "MoBA: 2 of 3 layers attend to 4 blocks of 32 tokens (decode='moba'), in pages of 128 tokens" in text


@pytest.mark.parametrize("length", [1, 10, 127, 128, 129, 700, 2900, 6000])
def test_one_prompt(server, model, length):
    """In chunks of 512 tokens, where it is longer."""
    tokens = prompt(length, length)
    assert server.complete(tokens) == alone(model, tokens)


def test_the_attention_that_is_tested_is_not_the_dense_one(server, model):
    tokens = prompt(700, 700)
    assert server.complete(tokens) != alone(model, tokens, attention="sdpa")


def test_concurrent_prompts(server, model):
    prompts = [prompt(length, length) for length in (300, 5, 900, 1, 64, 1300, 33)]
    assert server.together(prompts) == [alone(model, tokens) for tokens in prompts]


def test_shared_prefixes(server, model):
    """Read before, or read at the same time by another; whole or up to the last token; and an answer gone on with."""
    start = prompt(640, 99)
    prompts = [start, start, [*start, 5], start[:513], start + prompt(200, 1), start[:300] + prompt(300, 2)]
    expected = [alone(model, tokens) for tokens in prompts]
    assert server.together(prompts) == expected
    before = server.count("prefix_cache_hits")
    assert server.together(prompts) == expected
    turn = start + expected[0] + prompt(150, 3)
    assert server.complete(turn) == alone(model, turn)
    assert server.count("prefix_cache_hits") > before + 6 * 500


def test_preempted_requests_go_on(server, model):
    """Pages run out while all write: some requests lose theirs, and are read again in others."""
    prompts = [prompt(600 + length, length) for length in range(10)]
    assert server.together(prompts, 120) == [alone(model, tokens, 120) for tokens in prompts]
    assert server.count("num_preemptions") > 0


def test_streaming(server, model):
    tokens = prompt(400, 7)
    _, response = server.ask(tokens, stream=True)
    lines = [line[6:] for line in response.read().decode().splitlines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    assert len(choices) > NEW // 2
    assert [token for choice in choices for token in choice["token_ids"] or []] == alone(model, tokens)


def test_what_goes_wrong_with_a_request_leaves_the_others(server, model):
    """A client that goes away while its answer is written, a prompt that is too long, requests that mean nothing."""
    expected = alone(model, prompt(333, 3))
    connection, response = server.ask(prompt(800, 8), 3000, stream=True)
    response.read(10)
    connection.close()
    for values in (
        {"model": "m", "prompt": prompt(6500), "max_tokens": 4},
        {"model": "m", "prompt": [VOCAB + 1000], "max_tokens": 4},
        {"model": "other", "prompt": [1]},
        {"model": "m", "prompt": [1], "temperature": -1},
    ):
        assert server.post(**values)[1].status in (400, 404), values
    assert server.complete(prompt(333, 3)) == expected
    for _ in range(100):
        running = [
            line for line in server.get("/metrics")[1].splitlines() if line.startswith("vllm:num_requests_running")
        ]
        if all(line.endswith(" 0.0") for line in running):
            break
        time.sleep(0.2)
    assert all(line.endswith(" 0.0") for line in running), "the answer is still written to a client that has gone"


def test_a_real_model_and_a_config_from_the_command_line(tmp_path):
    """SmolLM2, to which `--hf-overrides` gives MoBA: every layer, blocks that are part of a page."""
    config = MoBAConfig(64, 6, keep_first=1, decode="moba")
    real, tokenizer = load_model()
    text = (Path(__file__).parent.parent / "README.md").read_text()
    prompts = [tokenizer(text).input_ids[:length] for length in (12, 500, 1700)]
    register_moba(config)
    real.set_attn_implementation("moba")
    expected = [
        real.generate(
            torch.tensor([tokens]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
        for tokens in prompts
    ]
    overrides = json.dumps({"moba": config.to_dict()})
    server = Server(real.config._name_or_path, tmp_path / "log", "--max-model-len", "2048", "--hf-overrides", overrides)
    try:
        made = server.together(prompts)
    finally:
        server.stop()
    assert made == [all_of[0, len(tokens) :].tolist() for all_of, tokens in zip(expected, prompts, strict=True)]
