"""Triton's CPU interpreter, repaired where it does not do what a GPU does."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import triton

# The version whose interpreter this repairs; others have other parts.
VERSION = "3.6."


@functools.cache
def repair() -> None:
    """Change the interpreter of this process, once.

    - A loop bound read from memory is a one-element array, which NumPy >= 2.4 does not turn into an int.
    - fp32 to bf16 is truncated, where a GPU rounds to nearest even.
    - A matrix product of bf16 takes the bits as integers, and one of fp32 rounds, on some processors, by where a row or
      column lies in its tile. Products are taken in fp64 and rounded once.
    - A reduction by any function but the commonest is a loop over elements.
    - The maximum or minimum of NaN and a number is NaN, where a GPU returns the number.
    - A scan by the kernel's own function is a loop over elements, too.
    - More than half of a kernel's time goes into what nobody asked for: every call of a function within it looks for
      the builtins of the whole language, every operation makes a table of dtypes, and every tensor spells out a type
      of its shape.

    Raises:
        ImportError: for another version of Triton.
    """
    if not triton.__version__.startswith(VERSION):
        raise ImportError(f"Triton's interpreter serves in Triton {VERSION}x only, this is {triton.__version__}")
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor, convert = interpreter._patch_lang_tensor, interpreter._convert_float
    builder = interpreter.InterpreterBuilder

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def convert_bf16_exactly(data, source, target, rounding_mode):
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.view(np.uint16).astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = data.view(np.uint32)
            rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
            return np.where(np.isnan(data), 0x7FFF, rounded).astype(np.uint16)
        return convert(data, source, target, rounding_mode)

    def dot_of_values(self, a, b, d, *options):
        def values(handle):
            if handle.dtype.scalar != tl.bfloat16:
                return handle.data.astype(np.float64)
            return convert_bf16_exactly(handle.data, tl.bfloat16, tl.float32, None).view(np.float32).astype(np.float64)

        product = np.matmul(values(a), values(b)) + d.data
        return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    patch_lang, find_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    nothing = interpreter._LangPatchScope()
    running: list[interpreter._LangPatchScope] = []
    dtypes: dict[str, np.dtype] = {}

    def patch_lang_once_a_launch(fn):
        if running:
            return nothing
        running.append(patch_lang(language))
        scope = interpreter._LangPatchScope()
        scope.restore = lambda: running.pop().restore()
        return scope

    def find_dtype_once(dtype):
        if dtype.name not in dtypes:
            dtypes[dtype.name] = find_dtype(dtype)
        return dtypes[dtype.name]

    interpreter._patch_lang = patch_lang_once_a_launch
    interpreter._get_np_dtype = find_dtype_once
    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter._convert_float = convert_bf16_exactly
    builder.create_dot = dot_of_values
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)

    def reduce_in_steps(self, input):
        values = [x.handle.data for x in input]
        while values[0].shape[self.axis] > 1:
            first, last = zip(*(np.split(x, 2, self.axis) for x in values), strict=True)
            found = self.combine_fn.fn(*map(self.to_tensor, first + last, [x.dtype for x in input] * 2))
            values = [x.handle.data for x in (found if isinstance(found, tuple) else (found,))]
        if not self.keep_dims:
            values = [x.squeeze(self.axis) for x in values]
        return [self.to_tensor(x, y.dtype) for x, y in zip(values, input, strict=True)]

    def scan_in_steps(self, input):
        values = [x.handle.data for x in input]
        index = np.arange(values[0].shape[self.axis]).reshape([-1] + [1] * (values[0].ndim - 1 - self.axis))
        step = 1
        while step < len(index):
            pairs = [np.roll(x, step, self.axis) for x in values] + values
            found = self.combine_fn.fn(*map(self.to_tensor, pairs, [x.dtype for x in input] * 2))
            found = found if isinstance(found, tuple) else (found,)
            values = [np.where(index < step, x, y.handle.data) for x, y in zip(values, found, strict=True)]
            step *= 2
        return list(map(self.to_tensor, values, [x.dtype for x in input]))

    def keep_values(self, values, type=None):
        self.values = list(values)
        if type is not None:
            self.type = type if isinstance(type, tl.core.tuple_type) else tl.core.tuple_type(type)

    type_when_asked = functools.cached_property(lambda self: tl.core._type_for_tuple_values(self.values))
    type_when_asked.__set_name__(tl.core.tuple, "type")
    tl.core.tuple.__init__, tl.core.tuple.type = keep_values, type_when_asked
    interpreter.ScanOps.generic_scan = scan_in_steps
    interpreter.ReduceOps.generic_reduce = reduce_in_steps
