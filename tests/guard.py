"""Tensors in memory of their own, with nothing mapped before or behind it: touching a byte outside ends the process.

On a CPU pages of mmap, on a GPU pages of the driver's virtual memory. A tensor lies at the very end of its pages, or at
their very beginning.
"""

from __future__ import annotations

import ctypes
import mmap

import torch

_kept = []


def guarded(x: torch.Tensor, at_end: bool = True) -> torch.Tensor:
    """A copy of x, with the same strides, that ends (or begins) where mapped memory does."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    num_bytes = max(extent, 1) * x.element_size()
    place = (_on_gpu if x.is_cuda else _on_cpu)(num_bytes, x.device)
    offset = (place.numel() - num_bytes) // 16 * 16 if at_end else 0
    memory = place[offset : offset + num_bytes].view(x.dtype)
    copy = memory.as_strided(x.shape, x.stride())
    copy.copy_(x)
    return copy.detach().requires_grad_(x.requires_grad)


def _on_cpu(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Mapped bytes between two pages that may not be touched; uint8."""
    page = mmap.PAGESIZE
    size = -(-num_bytes // page) * page
    pages = mmap.mmap(-1, size + 2 * page)
    _kept.append(pages)
    libc = ctypes.CDLL(None, use_errno=True)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for address in (start, start + page + size):
        if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(page), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    return torch.frombuffer(pages, dtype=torch.uint8, offset=page, count=size)


class _AllocationProp(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location_type", ctypes.c_int),
        ("location_id", ctypes.c_int),
        ("security", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _AccessDesc(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location_type", ctypes.c_int), ("location_id", ctypes.c_int), ("flags", ctypes.c_int))


class Bytes:
    """Device memory as `torch.as_tensor` takes it."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def _on_gpu(num_bytes: int, device: torch.device) -> torch.Tensor:
    torch.cuda.init()
    torch.zeros(1, device=device)
    cuda = ctypes.CDLL("libcuda.so.1")

    def call(name, *arguments):
        if error := getattr(cuda, name)(*arguments):
            raise RuntimeError(f"{name} failed with error {error}")

    index = torch.cuda.current_device() if device.index is None else device.index
    pinned, on_device, read_write = 1, 1, 3
    prop = _AllocationProp(pinned, 0, on_device, index)
    granularity = ctypes.c_size_t()
    call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(prop), 0)
    page = granularity.value
    size = -(-num_bytes // page) * page
    address, handle = ctypes.c_uint64(), ctypes.c_uint64()
    call("cuMemAddressReserve", ctypes.byref(address), ctypes.c_size_t(size + 2 * page), ctypes.c_size_t(0),
         ctypes.c_uint64(0), ctypes.c_uint64(0))  # fmt: skip
    call("cuMemCreate", ctypes.byref(handle), ctypes.c_size_t(size), ctypes.byref(prop), ctypes.c_uint64(0))
    start = address.value + page
    call("cuMemMap", ctypes.c_uint64(start), ctypes.c_size_t(size), ctypes.c_size_t(0), handle, ctypes.c_uint64(0))
    access = _AccessDesc(on_device, index, read_write)
    call("cuMemSetAccess", ctypes.c_uint64(start), ctypes.c_size_t(size), ctypes.byref(access), ctypes.c_size_t(1))
    return torch.as_tensor(Bytes(start, size), device=device)
