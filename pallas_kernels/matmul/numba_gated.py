"""How do sums of gate and up columns become the one value that the next product takes?  While they are in the first cache."""

import typing

import numba
import numba.core.cgutils
import numba.extending

from pallas_kernels.matmul.packed import GATED_COLUMNS
from pallas_kernels.numba_vectors16 import INT64, constant, exp, load, store_rounded


@numba.extending.intrinsic
@typing.no_type_check
def gate_rows(typing_context, sums, stride, num_rows, out, out_stride):
    """`silu(gate) * up` of `num_rows` rows of a panel's float32 sums, gates first, rounded to bfloat16 at `out`; int64 all.

    stride, out_stride: bytes from row to row.
    """

    def generate(context, builder, signature, arguments):
        b = builder
        sums, stride, num_rows, out, out_stride = arguments
        with numba.core.cgutils.for_range(b, num_rows) as loop:
            row = b.mul(loop.index, stride)
            gate, up = load(b, sums, row), load(b, sums, b.add(row, INT64(4 * GATED_COLUMNS)))
            silu = b.fdiv(gate, b.fadd(exp(b, b.fmul(gate, constant(-1))), constant(1)), flags=("arcp",))
            store_rounded(b, b.fmul(silu, up), out, b.mul(loop.index, out_stride))
        return context.get_dummy_value()

    return numba.types.void(*(numba.types.int64,) * 5), generate
