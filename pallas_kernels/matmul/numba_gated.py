"""How do sums of gate and up columns become the one value that the next product takes?  While they are in the first cache."""

import typing

import numba
import numba.core.cgutils
import numba.extending

from pallas_kernels.matmul.packed import GATED_COLUMNS
from pallas_kernels.numba_vectors16 import constant, exp, load, store_rounded


def emit_gate(b, sums, out):
    """Emits `silu(gate) * up` of a panel's row of float32 sums at an int64 address, gates first, rounded to bfloat16 at another."""
    gate, up = load(b, sums, 0), load(b, sums, 4 * GATED_COLUMNS)
    silu = b.fdiv(gate, b.fadd(exp(b, b.fmul(gate, constant(-1))), constant(1)), flags=("arcp",))
    store_rounded(b, b.fmul(silu, up), out, 0)


@numba.extending.intrinsic
@typing.no_type_check
def gate_rows(typing_context, sums, stride, num_rows, out, out_stride):
    """Gates (`emit_gate`) `num_rows` rows; int64 all.

    stride, out_stride: bytes from row to row.
    """

    def generate(context, builder, signature, arguments):
        b = builder
        sums, stride, num_rows, out, out_stride = arguments
        with numba.core.cgutils.for_range(b, num_rows) as loop:
            emit_gate(b, b.add(sums, b.mul(loop.index, stride)), b.add(out, b.mul(loop.index, out_stride)))
        return context.get_dummy_value()

    return numba.types.void(*(numba.types.int64,) * 5), generate
