"""Finding the largest values of rows that stream past, a tile at a time, with sorting networks held in registers.

A *list* is a tuple of equally shaped tensors, descending: element i of every tensor position holds that position's i-th
largest value. Lists of a row's columns are merged until one is left. Only minima and maxima of whole tensors occur, so
nothing depends on data, and no thread waits for another as long as columns stay in their thread: a tile [M, C] is cut
by its leading column bits, which matrix-product layouts keep in registers.

Values must not be NaN: a minimum and a maximum would both return the other operand.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _halves(x):
    """[M, C] -> its first and last C / 2 columns."""
    x = tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2])
    return tl.split(tl.permute(x, 0, 2, 1))


@triton.jit
def pieces(x, COUNT: tl.constexpr):
    """[M, C] -> its COUNT groups of C / COUNT adjacent columns."""
    if COUNT == 1:
        result = (x,)
    else:
        first, last = _halves(x)
        result = pieces(first, COUNT // 2) + pieces(last, COUNT // 2)
    return result


@triton.jit
def odd_even_merge(a, b, LENGTH: tl.constexpr):
    """One list from two lists of LENGTH (Batcher's odd-even merging network)."""
    if LENGTH == 1:
        result = (tl.maximum(a[0], b[0]), tl.minimum(a[0], b[0]))
    else:
        even = odd_even_merge(a[::2], b[::2], LENGTH // 2)
        odd = odd_even_merge(a[1::2], b[1::2], LENGTH // 2)
        result = even[:1]
        for i in tl.static_range(LENGTH - 1):
            result += (tl.maximum(odd[i], even[i + 1]), tl.minimum(odd[i], even[i + 1]))
        result += odd[LENGTH - 1 :]
    return result


@triton.jit
def sorted_list(tensors, LENGTH: tl.constexpr):
    """The list of LENGTH unordered tensors."""
    if LENGTH == 1:
        result = tensors
    else:
        first = sorted_list(tensors[: LENGTH // 2], LENGTH // 2)
        last = sorted_list(tensors[LENGTH // 2 :], LENGTH // 2)
        result = odd_even_merge(first, last, LENGTH // 2)
    return result


@triton.jit
def _bitonic_list(tensors, LENGTH: tl.constexpr):
    """The list of LENGTH tensors that fall and then rise, or rise and then fall."""
    if LENGTH == 1:
        result = tensors
    else:
        high = tensors[:0]
        low = tensors[:0]
        for i in tl.static_range(LENGTH // 2):
            high += (tl.maximum(tensors[i], tensors[i + LENGTH // 2]),)
            low += (tl.minimum(tensors[i], tensors[i + LENGTH // 2]),)
        result = _bitonic_list(high, LENGTH // 2) + _bitonic_list(low, LENGTH // 2)
    return result


@triton.jit
def merge_lists(a, b, LENGTH: tl.constexpr, LENGTH_B: tl.constexpr):
    """The LENGTH largest of a list of LENGTH and one of LENGTH_B <= LENGTH."""
    largest = a[: LENGTH - LENGTH_B]
    for i in tl.static_range(LENGTH - LENGTH_B, LENGTH):
        largest += (tl.maximum(a[i], b[LENGTH - 1 - i]),)
    return _bitonic_list(largest, LENGTH)


@triton.jit
def list_halves(values, LENGTH: tl.constexpr):
    """A list of [M, C] -> those of its first and of its last C / 2 columns."""
    first = values[:0]
    last = values[:0]
    for i in tl.static_range(LENGTH):
        a, b = _halves(values[i])
        first += (a,)
        last += (b,)
    return first, last


@triton.jit
def fold_columns(values, LENGTH: tl.constexpr, COLUMNS: tl.constexpr, TO: tl.constexpr):
    """Merge the lists of a row's COLUMNS columns into those of TO columns, cutting by the leading column bits."""
    if COLUMNS == TO:
        result = values
    else:
        first, last = list_halves(values, LENGTH)
        result = fold_columns(merge_lists(first, last, LENGTH, LENGTH), LENGTH, COLUMNS // 2, TO)
    return result


@triton.jit
def _partner(x, DISTANCE: tl.constexpr):
    """[M, C] with column c exchanged for column c ^ DISTANCE, by reductions, which cross threads without memory."""
    pairs = tl.reshape(x, [x.shape[0], x.shape[1] // (2 * DISTANCE), 2, DISTANCE])
    high = tl.max(pairs, axis=2, keep_dims=True)
    low = tl.min(pairs, axis=2, keep_dims=True)
    return tl.reshape(tl.where(pairs == high, low, high), x.shape)


@triton.jit
def _share_columns(values, LENGTH: tl.constexpr, COLUMNS: tl.constexpr, DISTANCE: tl.constexpr):
    """Merge the lists of a row's COLUMNS columns into one, which every column then holds; DISTANCE starts at 1."""
    if DISTANCE == COLUMNS:
        result = values
    else:
        partner = values[:0]
        for i in tl.static_range(LENGTH):
            partner += (_partner(values[i], DISTANCE),)
        merged = merge_lists(values, partner, LENGTH, LENGTH)
        result = _share_columns(merged, LENGTH, COLUMNS, 2 * DISTANCE)
    return result


@triton.jit
def merge_columns(values, LENGTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Merge the lists of a row's COLUMNS columns into one, which each of COLUMNS / 2 columns then holds."""
    even = values[:0]
    odd = values[:0]
    for i in tl.static_range(LENGTH):
        # Neighbours stand in one thread.
        a, b = tl.split(tl.reshape(values[i], [values[i].shape[0], COLUMNS // 2, 2]))
        even += (a,)
        odd += (b,)
    return _share_columns(merge_lists(even, odd, LENGTH, LENGTH), LENGTH, COLUMNS // 2, 1)
