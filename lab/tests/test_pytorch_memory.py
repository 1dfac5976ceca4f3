"""What is the pytorch backend's own: passes and steps, memory, and the path of devices without a flash kernel."""

from __future__ import annotations

from helpers import make_qkv

from moba import moba_attention
from moba_lab.bench.measure import measure_call


def test_memory_grows_with_the_sequence_not_its_square():
    def peak(tokens):
        q, k, v = make_qkv(1, tokens, tokens, 1, 1, 64)
        return measure_call(
            lambda: moba_attention(q, k, v, block_size=64, topk=4, backend="pytorch"), q.device, warmups=1, repeats=1
        ).peak_bytes

    peak(4096)
    bytes_of_a_mask = 65536 * 65536 // 8
    assert peak(65536) < bytes_of_a_mask / 2
