"""Which operations on 16 values of float32 do kernels for AVX-512 share?  Emitters of LLVM instructions, for numba's intrinsics."""

import math
import typing

import llvmlite.ir
import numba
import numba.core.cgutils
import numba.extending
import numpy as np

WIDTH = 16


class BFloat(llvmlite.ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self):
        return "bfloat"


INT64, WORD, FLOAT = llvmlite.ir.IntType(64), llvmlite.ir.IntType(32), llvmlite.ir.FloatType()
FLOATS, WORDS = llvmlite.ir.VectorType(FLOAT, WIDTH), llvmlite.ir.VectorType(WORD, WIDTH)
ROUNDED = llvmlite.ir.VectorType(BFloat(), WIDTH)
PAIRS = llvmlite.ir.VectorType(BFloat(), 2 * WIDTH)
EXP2_TERMS = tuple(
    np.polynomial.Chebyshev.interpolate(np.exp2, 5, (-0.5, 0.5))
    .convert(kind=np.polynomial.Polynomial)
    .coef[::-1]
    .tolist()
)
"""Of 2**r for |r| <= 1 / 2, off by less than 2e-7 of it."""


def address(b, base, offset, element):
    """Where the `element` at `offset` bytes (an int64 or a constant) from an int64 address lies."""
    offset = offset if isinstance(offset, llvmlite.ir.Value) else INT64(offset)
    return b.inttoptr(b.add(base, offset), element.as_pointer())


def constant(value):
    """The value 16 times."""
    return llvmlite.ir.Constant(FLOATS, [float(value)] * WIDTH)


def call(b, name, *values, returns: llvmlite.ir.Type = FLOATS):
    """Calls the LLVM intrinsic `llvm.{name}.v16f32`."""
    return _call(b, f"llvm.{name}.v{WIDTH}f32", values, returns)


def instruction(b, name, *values, returns: llvmlite.ir.Type = FLOATS):
    """Calls the LLVM intrinsic `llvm.x86.{name}.512`."""
    return _call(b, f"llvm.x86.{name}.512", values, returns)


def _call(b, name, values, returns):
    function_type = llvmlite.ir.FunctionType(returns, [value.type for value in values])
    return b.call(b.module.globals.get(name) or llvmlite.ir.Function(b.module, function_type, name), values)


def load(b, base, offset):
    """16 values from an int64 address on."""
    return b.load(address(b, base, offset, FLOATS), align=4)


def store_rounded(b, value, base, offset):
    """16 values as bfloat16, rounded to the nearest even; returns what that leaves out."""
    rounded = b.fptrunc(value, ROUNDED)
    b.store(rounded, address(b, base, offset, ROUNDED), align=2)
    return b.fsub(value, b.fpext(rounded, FLOATS))


def store_vector(b, value, base, index, itemsize):
    """16 values as the vector number `index` (an int64) from an address on, in float32 (4 bytes) or bfloat16 (2), rounded."""
    if itemsize == 2:
        store_rounded(b, value, base, b.mul(index, INT64(2 * WIDTH)))
    else:
        b.store(value, address(b, base, b.mul(index, INT64(4 * WIDTH)), FLOATS), align=4)


def store_parts(b, value, base, offset, part, num_parts):
    """16 values as the sum of `num_parts` numbers in bfloat16, `part` bytes apart."""
    for i in range(num_parts):
        value = store_rounded(b, value, base, b.add(offset, b.mul(part, INT64(i))))


def larger(b, bound, x):
    """The larger one, in one instruction; what is not a number stays in `x`."""
    return b.select(b.fcmp_ordered(">", bound, x), bound, x)


def add(b, x, y):
    """The sum."""
    return b.fadd(x, y)


def exp2(b, x):
    """2**x, of any float32."""
    n = call(b, "rint", x)
    r = b.fsub(x, n)
    y = constant(EXP2_TERMS[0])
    for term in EXP2_TERMS[1:]:
        y = call(b, "fma", y, r, constant(term))
    half = llvmlite.ir.IntType(16)
    return instruction(
        b, "avx512.mask.scalef.ps", y, n, y, half(0xFFFF), WORD(4)
    )  # all lanes, the rounding that is set


def exp(b, x):
    """e**x; relative to it off by less than 2e-7 (1 + |x| / 2)."""
    return exp2(b, b.fmul(x, constant(1 / math.log(2))))


def fold_lanes(b, x, combine, interval):
    """In each lane all lanes `interval` (a power of 2) apart, by `combine(b, x, y)`: of halves, of quarters, and so on."""
    distance = WIDTH // 2
    while distance >= interval:
        other = b.shuffle_vector(x, x, WORDS([lane ^ distance for lane in range(WIDTH)]))
        x = combine(b, x, other)
        distance //= 2
    return x


def fold(b, x, combine):
    """All lanes as one scalar, as `fold_lanes`."""
    return b.extract_element(fold_lanes(b, x, combine, 1), WORD(0))


def splat(b, value, vector):
    """A scalar in all lanes of a vector of that type."""
    first = b.insert_element(llvmlite.ir.Constant(vector, llvmlite.ir.Undefined), value, WORD(0))
    return b.shuffle_vector(first, first, WORDS([0] * WIDTH))


@numba.extending.intrinsic(prefer_literal=True)
@typing.no_type_check
def split_row(typing_context, source, target, num_vectors, part, num_parts):
    """16 * `num_vectors` values of float32 as sums of `num_parts` (a constant) in bfloat16, `part` bytes apart; int64 all."""
    count = num_parts
    if not isinstance(count, numba.types.IntegerLiteral):
        return None

    def generate(context, builder, signature, arguments):
        b = builder
        source, target, num_vectors, part = arguments[:4]
        with numba.core.cgutils.for_range(b, num_vectors) as loop:
            value = load(b, source, b.mul(loop.index, INT64(4 * WIDTH)))
            store_parts(b, value, target, b.mul(loop.index, INT64(2 * WIDTH)), part, count.literal_value)
        return context.get_dummy_value()

    return numba.types.void(*(numba.types.int64,) * 4, count), generate


@numba.extending.intrinsic(prefer_literal=True)
@typing.no_type_check
def scale_row(typing_context, source, factor, target, num_vectors, out_bytes):
    """16 * `num_vectors` values of float32 times `factor`, in float32 or, if `out_bytes` (a constant) is 2, bfloat16."""
    size = out_bytes
    if not isinstance(size, numba.types.IntegerLiteral):
        return None

    def generate(context, builder, signature, arguments):
        b = builder
        source, factor, target, num_vectors = arguments[:4]
        factors = splat(b, factor, FLOATS)
        with numba.core.cgutils.for_range(b, num_vectors) as loop:
            value = b.fmul(load(b, source, b.mul(loop.index, INT64(4 * WIDTH))), factors)
            store_vector(b, value, target, loop.index, size.literal_value)
        return context.get_dummy_value()

    one = numba.types.int64
    return numba.types.void(one, numba.types.float32, one, one, size), generate


def _first_lanes(b, count):
    """Which lanes are the first `count` (an int64)."""
    lanes = llvmlite.ir.Constant(WORDS, list(range(WIDTH)))
    return b.icmp_signed("<", lanes, splat(b, b.trunc(count, WORD), WORDS))


@numba.extending.intrinsic(prefer_literal=True)
@typing.no_type_check
def peak_row(typing_context, scores, num_scores, peaks, interval):
    """The highest of the first `num_scores` (at least 1) float32 scores, of which there are whole vectors, in 16 lanes at `peaks`.

    `interval` (a power of 2 up to 16, a constant) rows have their scores in turn: so many lanes differ.
    """
    step = interval
    if not isinstance(step, numba.types.IntegerLiteral):
        return None

    def generate(context, builder, signature, arguments):
        b = builder
        scores, num_scores, to = arguments[:3]
        peaks = numba.core.cgutils.alloca_once(b, FLOATS)
        last = b.udiv(b.sub(num_scores, INT64(1)), INT64(WIDTH))
        is_seen = _first_lanes(b, b.sub(num_scores, b.mul(last, INT64(WIDTH))))
        b.store(b.select(is_seen, load(b, scores, b.mul(last, INT64(4 * WIDTH))), constant("-inf")), peaks)
        with numba.core.cgutils.for_range(b, last) as loop:
            b.store(larger(b, b.load(peaks), load(b, scores, b.mul(loop.index, INT64(4 * WIDTH)))), peaks)
        store_vector(b, fold_lanes(b, b.load(peaks), larger, step.literal_value), to, INT64(0), 4)
        return context.get_dummy_value()

    return numba.types.void(*(numba.types.int64,) * 3, step), generate


@numba.extending.intrinsic(prefer_literal=True)
@typing.no_type_check
def weigh_row(
    typing_context, scores, num_scores, num_vectors, peaks, scale, weights, part, num_parts, totals, interval
):
    """exp(scale (score - peak)) of the first `num_scores` scores, zero after them; their float32 sums in 16 lanes at `totals`.

    16 * `num_vectors` weights are written, as `split_row` does, or in float32 if `num_parts` is 0; addresses are int64.
    peaks, interval: as `peak_row` has them.
    """
    constants = num_parts, interval
    if not all(isinstance(number, numba.types.IntegerLiteral) for number in constants):
        return None

    def generate(context, builder, signature, arguments):
        b = builder
        scores, num_scores, num_vectors, peaks, scale, weights, part, _, totals, _ = arguments
        count, step = (number.literal_value for number in constants)
        factors = splat(b, b.fmul(scale, FLOAT(1 / math.log(2))), FLOATS)
        shifts = b.fmul(b.fneg(load(b, peaks, 0)), factors)
        sums = numba.core.cgutils.alloca_once(b, FLOATS)
        b.store(constant(0), sums)

        def store(value, index):
            if count == 0:
                store_vector(b, value, weights, index, 4)
            else:
                store_parts(b, value, weights, b.mul(index, INT64(2 * WIDTH)), part, count)

        def weigh(index, mask=None):
            score = load(b, scores, b.mul(index, INT64(4 * WIDTH)))
            value = exp2(b, call(b, "fma", score, factors, shifts))
            value = value if mask is None else b.select(mask, value, constant(0))
            b.store(b.fadd(b.load(sums), value), sums)
            store(value, index)

        num_whole = b.udiv(num_scores, INT64(WIDTH))
        with numba.core.cgutils.for_range(b, num_whole) as loop:
            weigh(loop.index)
        with b.if_then(b.icmp_signed("<", num_whole, num_vectors)):
            weigh(num_whole, _first_lanes(b, b.urem(num_scores, INT64(WIDTH))))
        rest = b.add(num_whole, INT64(1))
        with numba.core.cgutils.for_range_slice(b, rest, num_vectors, INT64(1), inc=True) as (index, _):
            store(constant(0), index)
        store_vector(b, fold_lanes(b, b.load(sums), add, step), totals, INT64(0), 4)
        return context.get_dummy_value()

    one, real = numba.types.int64, numba.types.float32
    return numba.types.void(one, one, one, one, real, one, one, num_parts, one, interval), generate
