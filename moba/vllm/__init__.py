"""vLLM: a plugin that serves models with MoBA in vLLM's engine.

vLLM finds `register` by the entry point group `vllm.general_plugins`; there is nothing to import or call. A model is
served with MoBA if its config has `moba` (a dict, as `MoBAConfig.to_dict` makes it), or is given one:

vllm serve MODEL --hf-overrides '{"moba": {"block_size": 512, "topk": 8, "decode": "moba"}}'

Models without it are served as before. docs/serving.md says more.
"""

from __future__ import annotations


def register() -> None:
    """Make MoBA known to vLLM. vLLM calls this in each of its processes, at times more than once."""
    from vllm.config import VllmConfig
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from moba.vllm.config import check_at_start

    check_at_start(VllmConfig)
    if current_platform.is_cpu():
        # vLLM has one attention on a CPU, so MoBA's takes its name; for models without MoBA it does the same.
        register_backend(AttentionBackendEnum.CPU_ATTN, "moba.vllm.cpu.MoBACPUBackend")
    elif current_platform.is_cuda():
        register_backend(AttentionBackendEnum.CUSTOM, "moba.vllm.cuda.MoBATritonBackend")
