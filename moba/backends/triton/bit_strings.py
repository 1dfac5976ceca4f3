"""Flags of a row as strings of bits: packing, counting, and finding the bit of a given rank without a loop.

A *string* is uint64; bit b stands for block b of a tile of 64.
"""

from __future__ import annotations

import triton
import triton.language as tl

BITS = tl.constexpr(64)
ONES = tl.constexpr(0x0101010101010101)
TOPS = tl.constexpr(0x8080808080808080)


@triton.jit
def byte_sums(string):
    """In byte i, how many bits are set in bytes 0 … i of the string."""
    count = string - ((string >> 1) & 0x5555555555555555)
    count = (count & 0x3333333333333333) + ((count >> 2) & 0x3333333333333333)
    count = (count + (count >> 4)) & 0x0F0F0F0F0F0F0F0F
    return count * ONES


@triton.jit
def num_bits(string):
    """How many bits are set."""
    return (byte_sums(string) >> 56).to(tl.int32)


@triton.jit
def bit_at_rank(string, rank):
    """Number of the bit that has `rank` set bits below it, by arithmetic on all bytes at once.

    Where `rank` (int32, >= 0) is not below the number of set bits, the result means nothing.

    Source: S. Vigna, "Broadword implementation of rank/select queries" (2008).
    """
    sums = byte_sums(string)
    # The top bit of each byte says whether the rank is past it. Sums are at most 64, so no byte borrows.
    passed = (((rank & 63).to(tl.uint64) * ONES | TOPS) - sums) & TOPS
    first_bit = ((passed >> 7) * ONES >> 56 << 3) & 56
    rank -= ((sums << 8 >> first_bit) & 255).to(tl.int32)
    byte = ((string >> first_bit) & 255).to(tl.int32)
    pairs = byte - ((byte >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    low = nibbles & 15
    bit = tl.where(rank >= low, 4, 0)
    rank -= tl.where(rank >= low, low, 0)
    low = (pairs >> bit) & 3
    bit += tl.where(rank >= low, 2, 0)
    rank -= tl.where(rank >= low, low, 0)
    bit += tl.where(rank >= ((byte >> bit) & 1), 1, 0)
    return first_bit.to(tl.int32) + bit


@triton.jit
def bit_at_rank_of_four(first, second, third, fourth, rank):
    """`bit_at_rank` in four strings, one behind the other."""
    end_first = num_bits(first)
    end_second = end_first + num_bits(second)
    end_third = end_second + num_bits(third)
    in_second = rank >= end_first
    in_third = rank >= end_second
    in_fourth = rank >= end_third
    string = tl.where(in_fourth, fourth, tl.where(in_third, third, tl.where(in_second, second, first)))
    before = tl.where(in_fourth, end_third, tl.where(in_third, end_second, tl.where(in_second, end_first, 0)))
    offset = tl.where(in_fourth, 3 * BITS, tl.where(in_third, 2 * BITS, tl.where(in_second, BITS, 0)))
    return offset + bit_at_rank(string, rank - before)
