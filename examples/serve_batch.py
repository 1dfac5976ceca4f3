"""Serve several prompts at once: they arrive one after another, share one cache of pages, and decode with MoBA.

python examples/serve_batch.py
python examples/serve_batch.py --model meta-llama/Llama-3.2-1B-Instruct --dtype bfloat16 --every 0.2
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from moba import MoBAConfig
from moba.hf import enable_paged
from moba_lab.cli.demo import demo_prompt
from moba_lab.models.load import load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="folder or name of the model; without it the embedded SmolLM2-135M-Instruct")
parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between two arrivals")
parser.add_argument("--max-new-tokens", type=int, default=40)
parser.add_argument("--block-size", type=int, default=64)
parser.add_argument("--topk", type=int, default=6, help="blocks a token attends to, its own included")
args = parser.parse_args()

speech = demo_prompt()
QUESTIONS = [
    "Name three primary colours.",
    f"{speech[:1500]}\n\nWho is speaking?",
    f"{speech[:6000]}\n\nIn one sentence, what does he ask for?",
    "Write a line about the sea.",
    f"{speech[:3000]}\n\nWhat year is it?",
]

model, tokenizer = load_model(args.model, dtype=getattr(torch, args.dtype))
model.to("cuda" if torch.cuda.is_available() else "cpu")
enable_paged(model, MoBAConfig(args.block_size, args.topk, keep_first=1, decode="moba"))
prompts = [
    tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    for question in QUESTIONS
]
generation = GenerationConfig(
    max_new_tokens=args.max_new_tokens,
    do_sample=False,
    eos_token_id=model.generation_config.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
)
# 64 pages of 256 tokens; prompts are read in chunks of 512 tokens, so that nobody's answer waits long for them.
batching = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512)

start = time.perf_counter()
num_made, num_arrived, running = 0, 0, {}


def say(name: str, text: str) -> None:
    """One line of progress."""
    print(f"{time.perf_counter() - start:6.1f} s  {name}  {text}", flush=True)


with model.continuous_batching_context_manager(generation, continuous_batching_config=batching) as manager:
    while running or num_arrived < len(prompts):
        if num_arrived < len(prompts) and time.perf_counter() - start >= num_arrived * args.every:
            name = manager.add_request(prompts[num_arrived], streaming=True)
            say(name, f"arrives with {len(prompts[num_arrived]):,} tokens, {len(running)} others at work")
            running[name] = 0
            num_arrived += 1
        output = manager.get_result(timeout=0.05)
        if output is None:
            if not manager.is_running():
                raise SystemExit("the server stopped")
            continue
        name, num_tokens = output.request_id, len(output.generated_tokens)
        num_made += num_tokens - running[name]
        if output.error:
            say(name, f"failed: {output.error}")
        elif output.is_finished():
            answer = tokenizer.decode(output.generated_tokens, skip_special_tokens=True)
            say(name, f"done after {num_tokens} tokens: {' '.join(answer.split())}")
        elif not running[name]:
            say(name, "first token")
        running[name] = num_tokens
        if output.is_finished():
            del running[name]
print(f"{num_made} tokens for {len(prompts)} requests in {time.perf_counter() - start:.1f} s")
