"""How does a kernel bring memory near, and clear it?  For functions that numba compiles."""

import typing

import llvmlite.ir
import numba
import numba.extending
import numpy as np

from pallas_kernels.device import cpu_has
from pallas_kernels.numba_ffi import array

LANES = 16 if cpu_has("avx512f") else 8
"""Float32 values in a vector register; there are 32 registers of 16, or 16 of 8."""


@numba.njit(forceinline=True)
@typing.no_type_check
def clear_rows(out, stride, first, stop, num_bytes):
    """Zeroes `num_bytes` bytes, a multiple of 8, of the rows `first` to `stop`, which lie `stride` bytes apart from `out` on."""
    for row in range(first, stop):
        values = array(out + stride * row, np.int64, num_bytes // 8)
        for i in range(num_bytes // 8):
            values[i] = 0


NEAR, NEARER = 2, 3
"""The core's second cache, and its first."""


def fetch_line(builder, address, nearness=NEARER, *, is_written=False):
    """Emits the instruction that starts to bring the 64 bytes at an int64 address near.

    is_written: for writing, away from other cores.
    """
    byte, word = llvmlite.ir.IntType(8).as_pointer(), llvmlite.ir.IntType(32)
    function_type = llvmlite.ir.FunctionType(llvmlite.ir.VoidType(), (byte, word, word, word))
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", (byte,), function_type)
    data = word(1)
    builder.call(prefetch, (builder.inttoptr(address, byte), word(int(is_written)), word(nearness), data))


@numba.extending.intrinsic
@typing.no_type_check
def _prefetch_line(typing_context, address):
    """Starts to bring the 64 bytes at the int64 `address` near."""

    def generate(context, builder, signature, arguments):
        fetch_line(builder, arguments[0], NEAR)
        return context.get_dummy_value()

    return numba.types.void(numba.types.int64), generate


@numba.njit(forceinline=True)
@typing.no_type_check
def prefetch(address, num_bytes):
    """Starts to bring `num_bytes` near."""
    for offset in range(0, num_bytes, 64):
        _prefetch_line(address + offset)
