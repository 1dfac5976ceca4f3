"""Kernels compile ahead of time for every architecture, within its shared memory. Needs no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the triton backend needs Triton")

import aot
import aot_cases
from triton.backends.compiler import GPUTarget

from moba.backends.triton import ahead
from moba.backends.triton.device import Rows
from moba.backends.triton.tuning import ARCHITECTURES, TABLE, Row, lookup
from moba.backends.triton.variants import variant

AOT = Path(aot.__file__)


def compile_all(*arguments):
    """The command's output, in a process whose kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, AOT, *arguments], capture_output=True, text=True, env=environment)


def test_representative_kernels_compile():
    result = compile_all()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 failed" in result.stdout
    for arch in (86, 90):
        for kernel in ("_select_kernel bfloat16 D128 128/8", "_block_scores_kernel bfloat16 D128 128/16 indexer"):
            assert re.search(rf"{kernel} +{arch} ", result.stdout)


def test_a_kernel_that_needs_too_much_shared_memory_fails(monkeypatch, capsys):
    case = next(case for case in aot_cases.cases(90) if case.name.startswith("_select_kernel bfloat16 D16 80/3"))
    monkeypatch.setattr(aot, "cases", lambda arch, full: iter([case]))
    monkeypatch.setattr(aot.triton.knobs.runtime, "interpret", False)
    assert aot.main(["--arch", "90"]) == 0
    monkeypatch.setitem(aot.SHARED_LIMIT_BYTES, 90, 16)
    assert aot.main(["--arch", "90"]) == 1
    assert re.search(r"failed: needs \d+ bytes of shared memory, sm_90 has 16", capsys.readouterr().out)


def variants(plans):
    return {variant for plan in plans for variant in plan.variants()}


CALL = (90, torch.bfloat16, 128, 128, 8)


@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 127, 511, 1025, 9000, 32768, 200_000])
def test_another_length_compiles_nothing(num_tokens):
    known = variants(aot_cases.call_plans(*CALL))
    assert variants(aot_cases.call_plans(*CALL, num_tokens=num_tokens)) <= known


@pytest.mark.parametrize("num_rows", [1, 3, 16])
def test_another_batch_compiles_nothing(num_rows):
    for layout in ("plain", "padded"):
        known = variants(aot_cases.call_plans(*CALL, layout))
        assert variants(aot_cases.call_plans(*CALL, layout, num_rows=num_rows)) <= known


@pytest.mark.parametrize("num_sequences", [1, 2, 16, 1000])
def test_another_number_of_documents_compiles_nothing(num_sequences):
    known = variants(aot_cases.call_plans(*CALL, "packed"))
    assert variants(aot_cases.call_plans(*CALL, "packed", num_sequences=num_sequences)) <= known


@pytest.mark.parametrize("num_tokens", [1024, 32768, 1 << 20])
def test_what_is_compiled_first_serves_every_length(num_tokens):
    """Fused or not, in chunks of query rows or not: of a length's own workspace, whatever another one chooses."""

    def backward(num_tokens, workspace_bytes):
        return variants(aot_cases.call_plans(*CALL, num_tokens=num_tokens, workspaces=(workspace_bytes,)))

    known = backward(4096, 1 << 40)
    for workspace_bytes in (1 << 40, 64 * num_tokens):
        assert backward(num_tokens, workspace_bytes) <= known
    assert backward(4096, 64 * 4096) == known


@pytest.mark.parametrize("layout", ["plain", "pages"])
def test_another_context_compiles_nothing_in_a_step(layout):
    step = (90, torch.bfloat16, 128, 128, 16, layout)
    known = variants(aot_cases.step_plans(*step, num_keys=100_000 // 256 * 256))
    for num_keys in (256 * 260, 256 * 512):
        assert variants(aot_cases.step_plans(*step, num_keys=num_keys, num_rows=5)) <= known


@pytest.mark.parametrize("layout", ["plain", "padded", "packed"])
@pytest.mark.parametrize("by_tokens", [False, True])
def test_another_length_compiles_nothing_in_a_learned_router(by_tokens, layout):
    """One query, and chunks of scores, which only a long text needs."""
    options = {"num_heads": 8, "by_tokens": by_tokens}
    known = set(ahead.index_variants_of(90, torch.bfloat16, 128, 8, 0, (8, 64), by_tokens=by_tokens))
    others = {"_block_scores_kernel"} if by_tokens else {"_block_means_kernel", "_select_once_kernel"}
    assert {v.kernel.__name__ for v in known} == {"_select_kernel", *others}
    for num_tokens in (1, 9 * 128, 9 * 128 + 1, 32768, 200_000):
        plans = ahead.index_plans(90, torch.bfloat16, 64, 128, 8, layout, num_tokens=num_tokens, **options)
        assert variants(plans) <= known


def test_warming_up_knows_what_calls_and_steps_of_any_length_launch():
    heads = (4, 2, 128, 128)
    known = set(ahead.variants_of(*CALL[:2], 128, 8, 1, heads, softcap=None, training=True, max_tokens=131072))
    options = {"num_heads": 4, "num_kv_heads": 2, "num_kept": 1}
    for num_tokens in (1, 300, 9000, 200_000):
        for layout, num_rows in (("plain", 1), ("plain", 3), ("padded", 2), ("packed", 1)):
            call = ahead.call_plans(*CALL, layout, num_tokens=num_tokens, num_rows=num_rows, **options)
            assert variants(call) <= known
    for num_keys in (700, 5000, 50_000, 131072):
        for layout in ("plain", "padded"):
            assert variants(ahead.step_plans(*CALL, layout, num_keys=num_keys, **options)) <= known
    serving = ahead.variants_of(*CALL[:2], 128, 8, 1, heads, softcap=None, training=False, max_tokens=131072)
    assert {v.kernel.__name__ for v in known - set(serving)} >= {"_dkv_kernel", "_dq_past_kernel", "_dq_own_kernel"}


def test_one_sequence_compiles():
    (case,) = {
        variant
        for plan in aot_cases.call_plans(90, torch.bfloat16, 128, 128, 3, "packed", num_tokens=512, num_sequences=1)
        for variant in plan.variants()
        if variant.kernel.__name__ == "_block_means_kernel"
    }
    assert aot.compile_variant(case, 90).shared_bytes > 0


def dkv_variants(arch, dtype=torch.bfloat16, head_dim=128, block_size=512, **options):
    plans = ahead.call_plans(arch, dtype, head_dim, block_size, 3, **options)
    return {v.kernel.__name__: v for v in variants(plans) if "dkv" in v.kernel.__name__}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_the_hopper_kernel_run_asynchronously(dtype, head_dim):
    """ptxas waits for each one where registers are short, and says so only in a note."""
    (case,) = dkv_variants(90, dtype, head_dim).values()
    assert case.kernel.__name__ == "_dkv_hopper_kernel"
    assert aot.compile_variant(case, 90).spill_bytes <= 96
    machine_code = case.compile(GPUTarget("cuda", 90, 32)).asm["sass"]
    products, waits = (len(re.findall(name, machine_code)) for name in ("HGMMA", r"WARPGROUP\.DEPBAR"))
    assert products >= 16
    assert waits <= 4


@pytest.mark.parametrize(
    ("arch", "setting"),
    [
        (80, {}),
        (100, {}),
        (90, {"dtype": torch.float32}),
        (90, {"head_dim": 32}),
        (90, {"head_dim": 128, "value_dim": 64}),
        (90, {"head_dim": 256}),
        (90, {"block_size": 384}),
        (90, {"block_size": 576}),
        (90, {"softcap": 30.0}),
    ],
)
def test_others_than_the_hopper_kernel_are_for_everything_else(arch, setting):
    assert set(dkv_variants(arch, **setting)) == {"_dkv_kernel"}


def test_a_variant_says_nothing_of_numbers():
    """Not whether one is 1 or a multiple of 16, nor how many bits it needs, but that strides are multiples of 16."""
    params = [SimpleNamespace(is_constexpr=name == "SIZE") for name in ("x", "number", "SIZE")]
    kernel = SimpleNamespace(params=params, arg_names=("x", "number", "SIZE"))
    x = torch.empty(4, 32, device="meta")

    def of(rows, number, is_aligned=True):
        return variant(kernel, (rows, number, 8), {"num_warps": 4}, lambda tensor: is_aligned)

    known = of(Rows(x, 64, 32, 16), 7)
    assert known.signature == (Rows("*fp32", "i64", "i32", "i32"), "i32", "constexpr")
    assert known.aligned == ((0, 0), (0, 1), (0, 2), (0, 3))
    assert known.constants == (((2,), 8),)
    for number in (0, 1, 16, 2**31 - 1):
        assert of(Rows(x, 64, 32, 16), number) == known
    assert of(Rows(x, 2**35, 32, 16), 7) == known
    assert of(Rows(x, 64, 2**35, 16), 7).signature[0] == Rows("*fp32", "i64", "i64", "i32")
    assert of(Rows(x, 64, 33, 16), 7).aligned == ((0, 0),)
    assert of(Rows(x, 64, 32, 16), 7, is_aligned=False).aligned == ()
    assert of(Rows(x.int(), 64, 32, 16), 7).aligned == ()
    assert of(Rows(x, 64, 32, 16), 0.5).signature[1] == "fp32"
    assert of(Rows(None, None, None, None), 7).constants[:1] == (((0, 0), None),)


@pytest.mark.parametrize("kernel", TABLE)
def test_every_launch_has_a_configuration(kernel):
    for arch in ARCHITECTURES:
        for head_dim in (16, 64, 256):
            for block_size in (1, 128, 4096):
                for element_bytes in (2, 4):
                    options = {"head_dim": head_dim, "block_size": block_size, "element_bytes": element_bytes}
                    # Not every chip has the kernels that others may do without.
                    assert lookup(kernel, arch, **options) or kernel in ("select_once", "dkv_hopper")


def test_the_first_row_that_fits_is_taken():
    row = Row({}, arch=(90,), max_head_dim=64, max_block_size=128, element_bytes=2)
    assert row.fits(90, 64, 128, 2)
    assert not row.fits(80, 64, 128, 2)
    assert not row.fits(90, 128, 128, 2)
    assert not row.fits(90, 64, 256, 2)
    assert not row.fits(90, 64, 128, 4)
