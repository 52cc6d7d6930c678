"""How do sums of gate and up columns become the one value that the next product takes?  While they are in the first cache."""

import math
import typing

import llvmlite.ir
import numba
import numba.core.cgutils
import numba.extending

from pallas_kernels.matmul.packed import GATED_COLUMNS, PANEL
from pallas_kernels.matmul.panels import INT64, WORD, address


class BFloat(llvmlite.ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self):
        return "bfloat"


FLOATS = llvmlite.ir.VectorType(llvmlite.ir.FloatType(), GATED_COLUMNS)
WORDS = llvmlite.ir.VectorType(WORD, GATED_COLUMNS)
ROUNDED = llvmlite.ir.VectorType(BFloat(), GATED_COLUMNS)
EXP_TERMS = tuple(1 / math.factorial(n) for n in range(6, -1, -1))
"""Of e**r for |r| <= log(2) / 2: what is left out is below 2e-7."""


def _all(value):
    return llvmlite.ir.Constant(FLOATS, [float(value)] * GATED_COLUMNS)


def _call(b, name, *values):
    function_type = llvmlite.ir.FunctionType(FLOATS, (FLOATS,) * len(values))
    name = f"llvm.{name}.v{GATED_COLUMNS}f32"
    return b.call(b.module.globals.get(name) or llvmlite.ir.Function(b.module, function_type, name), values)


def _exp(b, x):
    """e**x of a vector of float32, held between e**-87 and e**88."""
    x = _call(b, "minnum", _call(b, "maxnum", x, _all(-87)), _all(88))
    n = _call(b, "rint", b.fmul(x, _all(1 / math.log(2))))
    r = _call(b, "fma", n, _all(-0.693359375), x)  # log(2) in two parts
    r = _call(b, "fma", n, _all(2.12194440e-4), r)
    y = _all(EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        y = _call(b, "fma", y, r, _all(term))
    exponent = b.shl(b.fptosi(n, WORDS), WORDS([23] * GATED_COLUMNS))
    return b.bitcast(b.add(b.bitcast(y, WORDS), exponent), FLOATS)


@numba.extending.intrinsic
@typing.no_type_check
def gate_rows(typing_context, sums, num_rows, out, out_stride):
    """`silu(gate) * up` of `num_rows` rows of a panel's float32 sums, gates first, rounded to bfloat16 at `out`; int64 all."""

    def generate(context, builder, signature, arguments):
        b = builder
        sums, num_rows, out, out_stride = arguments
        with numba.core.cgutils.for_range(b, num_rows) as loop:
            row = b.mul(loop.index, INT64(4 * PANEL))
            gate, up = (
                b.load(address(b, sums, b.add(row, INT64(4 * first)), FLOATS), align=4) for first in (0, GATED_COLUMNS)
            )
            minus = b.fmul(gate, _all(-1))
            silu = b.fdiv(gate, b.fadd(_exp(b, minus), _all(1)), flags=("arcp",))
            value = b.fptrunc(b.fmul(silu, up), ROUNDED)
            b.store(value, address(b, out, b.mul(loop.index, out_stride), ROUNDED), align=2)
        return context.get_dummy_value()

    return numba.types.void(*(numba.types.int64,) * 4), generate
