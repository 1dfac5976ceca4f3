"""Generate text with any causal language model of transformers, with MoBA or with torch's own attention.

python examples/llama.py --attn moba --prompt "The capital of France is"
python examples/llama.py --model meta-llama/Llama-3.1-8B --attn moba --block-size 4096 --topk 12
"""

from __future__ import annotations

import argparse

import torch

from moba import MoBAConfig, register_moba
from moba_lab.models.load import load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="folder or name of the model; without it the embedded SmolLM2-135M-Instruct")
parser.add_argument("--attn", choices=["moba", "moba_naive", "sdpa"], default="moba")
parser.add_argument("--prompt", default="Once upon a time, in a village by the sea,")
parser.add_argument("--max-new-tokens", type=int, default=32)
parser.add_argument("--block-size", type=int, default=64)
parser.add_argument("--topk", type=int, default=4, help="blocks a token attends to, its own included")
parser.add_argument("--keep-first", type=int, default=1, help="first blocks always attended to; 0 is the paper's rule")
parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
args = parser.parse_args()

register_moba(MoBAConfig(args.block_size, args.topk, keep_first=args.keep_first))
model, tokenizer = load_model(args.model, dtype=getattr(torch, args.dtype), attn_implementation=args.attn)
inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))
