"""One long sequence on several GPUs, or on several CPU processes.

torchrun --nproc-per-node 8 examples/context_parallel.py --tokens 1048576
torchrun --nproc-per-node 2 examples/context_parallel.py --tokens 4096      # anywhere
"""

import argparse
import os

import torch
import torch.distributed as dist

from moba.parallel import TRANSPORTS, context_parallel_attention

parser = argparse.ArgumentParser()
parser.add_argument("--tokens", type=int, default=4096, help="length of the whole sequence")
parser.add_argument("--transport", choices=TRANSPORTS, default="gather")
options = parser.parse_args()

on_gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
rank, num_ranks = dist.get_rank(), dist.get_world_size()

# Each rank holds its own tokens' queries, keys and values; only the ranks together know the whole sequence.
local = options.tokens // num_ranks // 128 * 128
dtype = torch.bfloat16 if on_gpu else torch.float32
q = torch.randn(1, local, 16, 64, device=device, dtype=dtype, requires_grad=True)
k, v = (torch.randn(1, local, 8, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(2))

out, routing = context_parallel_attention(
    q, k, v, block_size=128, topk=8, transport=options.transport, return_routing=True
)
out.sum().backward()  # gradients of keys that travelled come back to the rank that holds them

blocks = routing.indices[0, -1, 0]
print(f"rank {rank}: tokens {rank * local} to {(rank + 1) * local - 1}; its last query, head 0, reads blocks", end=" ")
print(f"{blocks[blocks >= 0].tolist()} of {num_ranks * local // 128}", flush=True)
dist.destroy_process_group()
