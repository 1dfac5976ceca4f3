"""One long sequence on several GPUs, or on several CPU processes.

torchrun --nproc-per-node 8 examples/context_parallel.py --tokens 1048576
torchrun --nproc-per-node 2 examples/context_parallel.py --tokens 4096      # anywhere
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist

from moba.parallel import TRANSPORTS, context_parallel_attention
from moba.parallel.process import end_process

BLOCK = 128
parser = argparse.ArgumentParser()
parser.add_argument("--tokens", type=int, default=4096, help="length of the whole sequence")
parser.add_argument("--transport", choices=TRANSPORTS, default="gather")
options = parser.parse_args()
if "RANK" not in os.environ:
    parser.error("start it with torchrun: torchrun --nproc-per-node 2 examples/context_parallel.py")
if options.tokens < 1:
    parser.error(f"--tokens must be at least 1, got {options.tokens}")

on_gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
rank, num_ranks = dist.get_rank(), dist.get_world_size()

# Each rank holds its own tokens' queries, keys and values; only the ranks together know the whole sequence. Shards
# begin where a block does, and may be empty.
starts = [options.tokens * i // num_ranks // BLOCK * BLOCK for i in range(num_ranks)]
first, behind = starts[rank], [*starts, options.tokens][rank + 1]
dtype = torch.bfloat16 if on_gpu else torch.float32
q, k, v = (
    torch.randn(1, behind - first, heads, 64, device=device, dtype=dtype, requires_grad=True) for heads in (16, 8, 8)
)

out, routing = context_parallel_attention(
    q, k, v, block_size=BLOCK, topk=8, transport=options.transport, return_routing=True
)
out.sum().backward()  # gradients of keys that travelled come back to the rank that holds them

said = "no tokens"
if first < behind:
    blocks = routing.indices[0, -1, 0]
    said = f"tokens {first} to {behind - 1} of {options.tokens}; its last query, head 0, reads blocks "
    said += f"{blocks[blocks >= 0].tolist()}"
# A whole line in one write: torchrun's processes share a terminal, and do not buffer.
sys.stdout.write(f"rank {rank}: {said}\n")
end_process()  # in the place of dist.destroy_process_group(), after which gloo's threads may abort a process
