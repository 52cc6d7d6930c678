"""Which operations on 16 values of float32 do kernels for AVX-512 share?  Emitters of LLVM instructions, for numba's intrinsics."""

import math
import typing

import llvmlite.ir
import numba
import numba.core.cgutils
import numba.extending

WIDTH = 16


class BFloat(llvmlite.ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self):
        return "bfloat"


INT64, WORD, FLOAT = llvmlite.ir.IntType(64), llvmlite.ir.IntType(32), llvmlite.ir.FloatType()
FLOATS, WORDS = llvmlite.ir.VectorType(FLOAT, WIDTH), llvmlite.ir.VectorType(WORD, WIDTH)
ROUNDED = llvmlite.ir.VectorType(BFloat(), WIDTH)
EXP_TERMS = tuple(1 / math.factorial(n) for n in range(6, -1, -1))
"""Of e**r for |r| <= log(2) / 2: what is left out is below 2e-7."""


def address(b, base, offset, element):
    """Where the `element` at `offset` bytes (an int64 or a constant) from an int64 address lies."""
    offset = offset if isinstance(offset, llvmlite.ir.Value) else INT64(offset)
    return b.inttoptr(b.add(base, offset), element.as_pointer())


def constant(value):
    """The value 16 times."""
    return llvmlite.ir.Constant(FLOATS, [float(value)] * WIDTH)


def call(b, name, *values, returns=FLOATS):
    """Calls the LLVM intrinsic `llvm.{name}.v16f32`."""
    function_type = llvmlite.ir.FunctionType(returns, [value.type for value in values])
    name = f"llvm.{name}.v{WIDTH}f32"
    return b.call(b.module.globals.get(name) or llvmlite.ir.Function(b.module, function_type, name), values)


def load(b, base, offset):
    """16 values from an int64 address on."""
    return b.load(address(b, base, offset, FLOATS), align=4)


def store_rounded(b, value, base, offset):
    """16 values as bfloat16, rounded to the nearest even."""
    b.store(b.fptrunc(value, ROUNDED), address(b, base, offset, ROUNDED), align=2)


def exp(b, x):
    """e**x, with x held between -87 and 88."""
    x = call(b, "minnum", call(b, "maxnum", x, constant(-87)), constant(88))
    n = call(b, "rint", b.fmul(x, constant(1 / math.log(2))))
    r = call(b, "fma", n, constant(-0.693359375), x)  # log(2) in two parts
    r = call(b, "fma", n, constant(2.12194440e-4), r)
    y = constant(EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        y = call(b, "fma", y, r, constant(term))
    exponent = b.shl(b.fptosi(n, WORDS), WORDS([23] * WIDTH))
    return b.bitcast(b.add(b.bitcast(y, WORDS), exponent), FLOATS)


@numba.extending.intrinsic
@typing.no_type_check
def round_row(typing_context, source, target, num_vectors):
    """16 * `num_vectors` values of float32 to bfloat16; both addresses are int64."""

    def generate(context, builder, signature, arguments):
        b = builder
        source, target, num_vectors = arguments
        with numba.core.cgutils.for_range(b, num_vectors) as loop:
            value = load(b, source, b.mul(loop.index, INT64(4 * WIDTH)))
            store_rounded(b, value, target, b.mul(loop.index, INT64(2 * WIDTH)))
        return context.get_dummy_value()

    return numba.types.void(*(numba.types.int64,) * 3), generate


@numba.extending.intrinsic
@typing.no_type_check
def softmax_row(typing_context, scores, num_keys, num_vectors, weights):
    """exp(score - highest) of the first `num_keys` (at least 1) scores as bfloat16, zero after them; returns their float32 sum.

    `num_vectors` vectors of 16 are written; addresses are int64.
    """

    def generate(context, builder, signature, arguments):
        b = builder
        scores, num_keys, num_vectors, weights = arguments
        lanes = llvmlite.ir.Constant(WORDS, list(range(WIDTH)))

        def visible(index):
            left = b.trunc(b.sub(num_keys, b.mul(index, INT64(WIDTH))), WORD)
            first = b.insert_element(llvmlite.ir.Constant(WORDS, llvmlite.ir.Undefined), left, WORD(0))
            return b.icmp_signed("<", lanes, b.shuffle_vector(first, first, WORDS([0] * WIDTH)))

        peaks, sums = (numba.core.cgutils.alloca_once(b, FLOATS) for _ in range(2))
        b.store(constant("-inf"), peaks)
        b.store(constant(0), sums)
        last = b.udiv(b.add(num_keys, INT64(WIDTH - 1)), INT64(WIDTH))
        with numba.core.cgutils.for_range(b, last) as loop:
            value = load(b, scores, b.mul(loop.index, INT64(4 * WIDTH)))
            value = b.select(visible(loop.index), value, constant("-inf"))
            b.store(call(b, "maxnum", b.load(peaks), value), peaks)
        peak = call(b, "vector.reduce.fmax", b.load(peaks), returns=FLOAT)
        first = b.insert_element(llvmlite.ir.Constant(FLOATS, llvmlite.ir.Undefined), peak, WORD(0))
        peak = b.shuffle_vector(first, first, WORDS([0] * WIDTH))
        with numba.core.cgutils.for_range(b, num_vectors) as loop:
            value = exp(b, b.fsub(load(b, scores, b.mul(loop.index, INT64(4 * WIDTH))), peak))
            value = b.select(visible(loop.index), value, constant(0))
            b.store(b.fadd(b.load(sums), value), sums)
            store_rounded(b, value, weights, b.mul(loop.index, INT64(2 * WIDTH)))
        return call(b, "vector.reduce.fadd", FLOAT(0.0), b.load(sums), returns=FLOAT)

    return numba.types.float32(*(numba.types.int64,) * 4), generate
