"""A row's flags as strings of 64 bits: packing, counting, and finding the bit of a given rank without a loop.

A *string* is uint64; bit b of a row's strings, counted through all of them, stands for column b of its tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

ONES = tl.constexpr(0x0101010101010101)
TOPS = tl.constexpr(0x8080808080808080)


@triton.jit
def row_strings(flags, BITS: tl.constexpr):
    """Flags of a row, BITS tensors [M, 8], as two strings [M, 1]: flag i of column c is bit c · BITS + i; BITS <= 16."""
    word = flags[0].to(tl.int32)
    for i in tl.static_range(1, BITS):
        word = word | tl.where(flags[i], 1 << i, 0)
    word = word.to(tl.uint64)
    place = (tl.arange(0, 8) * BITS)[None, :]
    if BITS <= 8:
        first = tl.sum(word << place.to(tl.uint64), axis=1, keep_dims=True)
        return first, tl.zeros_like(first)
    else:
        word = word << (place % 64).to(tl.uint64)
        first = tl.sum(tl.where(place < 64, word, 0), axis=1, keep_dims=True)
        last = tl.sum(tl.where(place < 64, 0, word), axis=1, keep_dims=True)
        return first, last


@triton.jit
def byte_sums(string):
    """In byte i, how many bits are set in bytes 0 … i of the string."""
    count = string - ((string >> 1) & 0x5555555555555555)
    count = (count & 0x3333333333333333) + ((count >> 2) & 0x3333333333333333)
    count = (count + (count >> 4)) & 0x0F0F0F0F0F0F0F0F
    return count * ONES


@triton.jit
def total_bits(sums):
    """How many bits are set in the string that these are the `byte_sums` of."""
    return (sums >> 56).to(tl.int32)


@triton.jit
def bit_at_rank(string, sums, rank):
    """Number of the bit that has `rank` set bits below it (S. Vigna, "Broadword implementation of rank/select queries").

    Args:
        sums: `byte_sums(string)`.
        rank: int32 >= 0. Where it is not below the number of set bits, the result means nothing.
    """
    # The top bit of each byte: whether the rank is past that byte. Sums are at most 64, so no byte borrows.
    passed = (((rank & 63).to(tl.uint64) * ONES | TOPS) - sums) & TOPS
    place = ((passed >> 7) * ONES >> 56 << 3) & 56
    rank -= ((sums << 8 >> place) & 255).to(tl.int32)
    byte = ((string >> place) & 255).to(tl.int32)
    pairs = byte - ((byte >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    low = nibbles & 15
    bit = tl.where(rank >= low, 4, 0)
    rank -= tl.where(rank >= low, low, 0)
    low = (pairs >> bit) & 3
    bit += tl.where(rank >= low, 2, 0)
    rank -= tl.where(rank >= low, low, 0)
    bit += tl.where(rank >= ((byte >> bit) & 1), 1, 0)
    return place.to(tl.int32) + bit
