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
PAIRS = llvmlite.ir.VectorType(BFloat(), 2 * WIDTH)
EXP_TERMS = tuple(1 / math.factorial(n) for n in range(6, -1, -1))
"""Of e**r for |r| <= log(2) / 2: what is left out is below 2e-7."""


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


def exp(b, x, *, is_negative=False):
    """e**x, with x held between -87 and, unless it `is_negative` anyway, 88."""
    x = larger(b, constant(-87), x)
    if not is_negative:
        x = b.select(b.fcmp_ordered("<", constant(88), x), constant(88), x)
    n = call(b, "rint", b.fmul(x, constant(1 / math.log(2))))
    r = call(b, "fma", n, constant(-0.693359375), x)  # log(2) in two parts
    r = call(b, "fma", n, constant(2.12194440e-4), r)
    y = constant(EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        y = call(b, "fma", y, r, constant(term))
    exponent = b.shl(b.fptosi(n, WORDS), WORDS([23] * WIDTH))
    return b.bitcast(b.add(b.bitcast(y, WORDS), exponent), FLOATS)


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


@numba.extending.intrinsic(prefer_literal=True)
@typing.no_type_check
def softmax_row(typing_context, scores, num_keys, num_vectors, scale, weights, part, num_parts):
    """exp(scale (score - highest)) of the first `num_keys` (at least 1) scores, zero after them; returns their float32 sum.

    16 * `num_vectors` weights are written, as `split_row` does; addresses are int64, `scale` is positive.
    """
    count = num_parts
    if not isinstance(count, numba.types.IntegerLiteral):
        return None

    def generate(context, builder, signature, arguments):
        b = builder
        scores, num_keys, num_vectors, scale, weights, part = arguments[:6]
        scales = splat(b, scale, FLOATS)
        peaks, sums = (numba.core.cgutils.alloca_once(b, FLOATS) for _ in range(2))
        b.store(constant("-inf"), peaks)
        b.store(constant(0), sums)
        num_whole = b.udiv(num_keys, INT64(WIDTH))
        lanes = llvmlite.ir.Constant(WORDS, list(range(WIDTH)))
        is_seen = b.icmp_signed("<", lanes, splat(b, b.trunc(b.urem(num_keys, INT64(WIDTH)), WORD), WORDS))

        def scores_of(index):
            return load(b, scores, b.mul(index, INT64(4 * WIDTH)))

        def weigh(index, peak, mask=None):
            value = exp(b, b.fmul(b.fsub(scores_of(index), peak), scales), is_negative=True)
            value = value if mask is None else b.select(mask, value, constant(0))
            b.store(b.fadd(b.load(sums), value), sums)
            store_parts(b, value, weights, b.mul(index, INT64(2 * WIDTH)), part, count.literal_value)

        with numba.core.cgutils.for_range(b, num_whole) as loop:
            b.store(larger(b, b.load(peaks), scores_of(loop.index)), peaks)
        has_tail = b.icmp_signed("<", num_whole, num_vectors)
        with b.if_then(has_tail):
            tail = b.select(is_seen, scores_of(num_whole), constant("-inf"))
            b.store(larger(b, b.load(peaks), tail), peaks)
        peak = splat(b, call(b, "vector.reduce.fmax", b.load(peaks), returns=FLOAT), FLOATS)
        with numba.core.cgutils.for_range(b, num_whole) as loop:
            weigh(loop.index, peak)
        with b.if_then(has_tail):
            weigh(num_whole, peak, is_seen)
        with numba.core.cgutils.for_range_slice(b, b.add(num_whole, INT64(1)), num_vectors, INT64(1), inc=True) as (
            index,
            _,
        ):
            store_parts(b, constant(0), weights, b.mul(index, INT64(2 * WIDTH)), part, count.literal_value)
        return call(b, "vector.reduce.fadd", FLOAT(0.0), b.load(sums), returns=FLOAT)

    one = numba.types.int64
    return numba.types.float32(one, one, one, numba.types.float32, one, one, count), generate
