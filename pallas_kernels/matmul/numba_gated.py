"""How do sums of gate and up columns become the one value that the next product takes?  While they are in the first cache."""

import typing

import llvmlite.ir
import numba
import numba.extending
import numpy as np

from pallas_kernels.matmul.packed import GATED_COLUMNS, PANEL
from pallas_kernels.matmul.panels import address
from pallas_kernels.numba_ffi import array
from pallas_kernels.numba_math import exp


class BFloat(llvmlite.ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self):
        return "bfloat"


FLOATS = llvmlite.ir.VectorType(llvmlite.ir.FloatType(), GATED_COLUMNS)
ROUNDED = llvmlite.ir.VectorType(BFloat(), GATED_COLUMNS)


@numba.extending.intrinsic
@typing.no_type_check
def _round(typing_context, source, target):
    """GATED_COLUMNS values of float32 to bfloat16, to the nearest even; both addresses are int64."""

    def generate(context, builder, signature, arguments):
        b = builder
        source, target = arguments
        value = b.fptrunc(b.load(address(b, source, 0, FLOATS), align=4), ROUNDED)
        b.store(value, address(b, target, 0, ROUNDED), align=2)
        return context.get_dummy_value()

    return numba.types.void(numba.types.int64, numba.types.int64), generate


@numba.njit(error_model="numpy", forceinline=True)
@typing.no_type_check
def gate_rows(sums, num_rows, out, out_stride):
    """`silu(gate) * up` of `num_rows` rows of a panel's float32 sums, gates first, rounded to bfloat16 at `out`."""
    for row in range(num_rows):
        values = array(sums + 4 * PANEL * row, np.float32, PANEL)
        for i in range(GATED_COLUMNS):
            gate = values[i]
            e = exp(-abs(gate))
            values[i] = gate * ((np.float32(1) if gate >= 0 else e) / (np.float32(1) + e)) * values[GATED_COLUMNS + i]
        _round(sums + 4 * PANEL * row, out + out_stride * row)
