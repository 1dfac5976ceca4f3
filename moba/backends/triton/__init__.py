"""MoBA in Triton kernels, for NVIDIA GPUs of compute capability 8.0 and newer; on CPU tensors in Triton's interpreter.

Reading order: device.py (letters, where sequences and blocks lie); select.py (the choice); by_block.py (each block's
queries); forward.py (`_attend_past_kernel`, then the merge with the own block); dkv.py and dq.py (the backward);
decode_select.py and decode_attend.py (a step of decoding). launch.py, workspace.py, tuning.py and variants.py say how
kernels are launched, and can wait. See `moba.backends` for the contract.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

MIN_TRITON = (3, 6)  # PyTorch 2.10 brings it
if tuple(map(int, triton.__version__.split(".")[:2])) < MIN_TRITON:
    # Before the kernels, which import what older versions lack.
    needed = ".".join(map(str, MIN_TRITON))
    raise ImportError(f"needs Triton {needed} or newer, as PyTorch 2.10 brings it, this is {triton.__version__}")

from moba.backends.triton.attention import attend as attend  # noqa: E402
from moba.backends.triton.block_scores import largest_products as largest_products  # noqa: E402
from moba.backends.triton.block_scores import log_masses as log_masses  # noqa: E402
from moba.backends.triton.decoding import append_means as append_means  # noqa: E402
from moba.backends.triton.decoding import attend_step as attend_step  # noqa: E402
from moba.backends.triton.decoding import decode as decode  # noqa: E402
from moba.backends.triton.launch import IS_INTERPRETED  # noqa: E402
from moba.backends.triton.routing import route as route  # noqa: E402

MIN_CAPABILITY = (8, 0)
MAX_HEAD_DIM = 256
if IS_INTERPRETED:
    # Not above: it needs NumPy, which kernels on a GPU do not.
    from moba.backends.triton.interpreter import repair

    repair()


def unsupported(q: Tensor, k: Tensor, *, own_block: bool = True) -> str | None:
    """Why this backend cannot run on these tensors and as asked, or None if it can."""
    if not own_block:
        return "its kernels always read the own block, so own_block must be True"
    if q.dtype == torch.float64:
        return "Triton kernels take float16, bfloat16 and float32, not float64"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head dim must be at most {MAX_HEAD_DIM}, got {q.shape[-1]}"
    if IS_INTERPRETED:
        return None if q.device.type in ("cpu", "cuda") else f"tensors are on {q.device}, not on a CPU or a CUDA device"
    if q.device.type != "cuda" or torch.version.cuda is None:
        return f"needs a CUDA device, or Triton's interpreter (TRITON_INTERPRET=1); tensors are on {q.device}"
    capability = torch.cuda.get_device_capability(q.device)
    if capability < MIN_CAPABILITY:
        return f"needs compute capability {MIN_CAPABILITY} or newer, {q.device} has {capability}"
    return None
