"""Which vector instructions does attention need on a CPU?  Products of a KV group's heads with keys and values, exponentials.

numba alone keeps too little in registers, so the inner tiles are written as LLVM instructions.
"""

import math
import typing

import llvmlite.ir
import numba
import numba.core.cgutils
import numba.extending
import numpy as np

from pallas_kernels.numba_memory import LANES, NEAR, fetch_line

FLOAT, INT64 = llvmlite.ir.FloatType(), llvmlite.ir.IntType(64)
MAX_SUMS = 16 if LANES == 16 else 12  # vectors that a tile of products adds up, of 32 or 16 registers


@numba.njit(forceinline=True)
@typing.no_type_check
def _exp(x):
    """e**x for x <= 0 within 2 units in the last place (Cephes expf), of instructions that exist for vectors."""
    x = max(x, np.float32(-87.0))
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * r * r + r + np.float32(1.0)
    return y * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@numba.njit(fastmath={"nnan", "nsz", "reassoc"}, forceinline=True)
@typing.no_type_check
def _peak(scores, size):
    peak = scores[0]
    for s in range(size):
        peak = max(peak, scores[s])
    return peak


@numba.njit(fastmath={"contract", "reassoc"}, forceinline=True)
@typing.no_type_check
def exponentiate(scores, size):
    """Replaces scores by their distance to the highest, exponentiated; returns the sum."""
    peak = _peak(scores, size)
    total = np.float32(0)
    for s in range(size):
        scores[s] = _exp(scores[s] - peak)
        total += scores[s]
    return total


@typing.no_type_check
class _Emitter:
    """Writes vector instructions for rows of `head_dim` elements; addresses are int64, offsets count elements."""

    def __init__(self, builder, itemsize, head_dim):
        self.builder = builder
        self.is_bits = itemsize == 2  # of bfloat16; else float32
        self.lanes = math.gcd(head_dim, LANES)
        self.floats = llvmlite.ir.VectorType(FLOAT, self.lanes)

    def at(self, address, offset, itemsize, element):
        b = self.builder
        offset = offset if isinstance(offset, llvmlite.ir.Value) else INT64(offset)
        return b.inttoptr(b.add(address, b.mul(offset, INT64(itemsize))), element.as_pointer())

    def load(self, address, offset):
        """A vector of float32."""
        return self.builder.load(self.at(address, offset, 4, self.floats), align=4)

    def load_page(self, address, offset):
        """A vector of page elements as float32."""
        if not self.is_bits:
            return self.load(address, offset)
        b = self.builder
        words = llvmlite.ir.VectorType(llvmlite.ir.IntType(32), self.lanes)
        bits = llvmlite.ir.VectorType(llvmlite.ir.IntType(16), self.lanes)
        wide = b.zext(b.load(self.at(address, offset, 2, bits), align=2), words)
        return b.bitcast(b.shl(wide, words([16] * self.lanes)), self.floats)

    def load_apart(self, address, offset, every):
        """Elements of a page as `every` vectors of float32: one, or two of bfloat16, each of which has every other one."""
        if every == 1:
            return (self.load_page(address, offset),)
        b = self.builder
        words = llvmlite.ir.VectorType(llvmlite.ir.IntType(32), self.lanes)
        both = b.load(self.at(address, offset, 2, words), align=2)
        halves = b.shl(both, words([16] * self.lanes)), b.and_(both, words([0xFFFF0000] * self.lanes))
        return tuple(b.bitcast(half, self.floats) for half in halves)

    def store(self, value, address, offset):
        self.builder.store(value, self.at(address, offset, 4, value.type), align=4)

    def multiply_add(self, a, b, c):
        """a * b + c in one instruction where there is one."""
        return self.builder.fadd(self.builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))

    def splat(self, address, offset):
        """One float32 in all lanes."""
        b, word = self.builder, llvmlite.ir.IntType(32)
        value = b.load(self.at(address, offset, 4, FLOAT), align=4)
        first = b.insert_element(llvmlite.ir.Constant(self.floats, llvmlite.ir.Undefined), value, word(0))
        lanes = llvmlite.ir.VectorType(word, self.lanes)([0] * self.lanes)
        return b.shuffle_vector(first, first, lanes)

    def sums(self, vectors):
        """The sum of each vector's lanes, side by side in one vector.  Halves are added first, of two vectors at once."""
        b, word = self.builder, llvmlite.ir.IntType(32)
        lanes = self.lanes  # that one of the sums is spread over
        while lanes > 1:
            pairs = list(zip(vectors[::2], vectors[1::2], strict=True)) if len(vectors) > 1 else [(vectors[0],) * 2]
            starts = range(0, vectors[0].type.count * min(2, len(vectors)), lanes)
            lanes //= 2
            low, high = (
                [i for start in starts for i in range(start + offset, start + offset + lanes)] for offset in (0, lanes)
            )
            places = llvmlite.ir.VectorType(word, len(low))
            vectors = [
                b.fadd(b.shuffle_vector(x, y, places(low)), b.shuffle_vector(x, y, places(high))) for x, y in pairs
            ]
        return vectors[0]


@numba.extending.intrinsic(prefer_literal=True)
@typing.no_type_check
def scores(typing_context, query, keys, out, stride, num_keys, itemsize, head_dim, group):
    """out[g, s] = query[g] . keys[s] for `num_keys` keys; rows of `out` lie `stride` apart.  The last four are constants."""
    shape = (num_keys, itemsize, head_dim, group)
    if not all(isinstance(number, numba.types.IntegerLiteral) for number in shape):
        return None

    def generate(context, builder, signature, arguments):
        query, keys, out, stride = arguments[:4]
        num_keys, itemsize, head_dim, group = (number.literal_value for number in shape)
        e = _Emitter(builder, itemsize, head_dim)
        sums = {}
        for d in range(0, head_dim, e.lanes):
            vectors = [e.load_page(keys, s * head_dim + d) for s in range(num_keys)]
            for g in range(group):
                q = e.load(query, g * head_dim + d)
                for s in range(num_keys):
                    old = sums.get((g, s))
                    sums[g, s] = builder.fmul(q, vectors[s]) if old is None else e.multiply_add(q, vectors[s], old)
        for g in range(group):
            e.store(e.sums([sums[g, s] for s in range(num_keys)]), out, builder.mul(stride, INT64(g)))
        return context.get_dummy_value()

    return numba.types.void(*(numba.types.int64,) * 4, *shape), generate


def value_order(itemsize: int, head_dim: int) -> tuple[int, int]:
    """How `add_values` orders sums: so many lanes have every n-th element, the next ones those after them.  Returns both numbers."""
    every = 2 if itemsize == 2 and head_dim % 2 == 0 else 1
    return math.gcd(head_dim // every, LANES), every


@numba.extending.intrinsic(prefer_literal=True)
@typing.no_type_check
def add_values(typing_context, weights, strides, values, num_values, coming, acc, itemsize, head_dim, group):
    """acc[g] += sum_s weights[g, s] values[s]; `strides` of weights: from head to head, from value to value.

    The last three are constants; `acc` is in `value_order`.  Meanwhile the values from `coming` on, as many, are brought near.
    """
    shape = (itemsize, head_dim, group)
    if not all(isinstance(number, numba.types.IntegerLiteral) for number in shape):
        return None

    def generate(context, builder, signature, arguments):
        b = builder
        weights, strides, values, num_values, coming, acc = arguments[:6]
        head_stride, value_stride = numba.core.cgutils.unpack_tuple(b, strides)
        itemsize, head_dim, group = (number.literal_value for number in shape)
        e = _Emitter(b, itemsize, head_dim)
        e.lanes, every = value_order(itemsize, head_dim)
        e.floats = llvmlite.ir.VectorType(FLOAT, e.lanes)
        width = e.lanes * every * max(1, MAX_SUMS // (every * group))
        for first in range(0, head_dim, width):
            places = [(g, d) for d in range(first, min(first + width, head_dim), e.lanes) for g in range(group)]
            sums = {}
            for g, d in places:
                sums[g, d] = numba.core.cgutils.alloca_once(b, e.floats)
                b.store(e.load(acc, g * head_dim + d), sums[g, d])
            with numba.core.cgutils.for_range(b, num_values) as loop:
                s = loop.index
                place = b.mul(value_stride, s)
                weight = [e.splat(weights, b.add(b.mul(head_stride, INT64(g)), place)) for g in range(group)]
                row = b.mul(s, INT64(head_dim))
                later = b.add(coming, b.mul(row, INT64(itemsize)))
                for line in range(first * itemsize, min(first + width, head_dim) * itemsize, 64):
                    fetch_line(b, b.add(later, INT64(line)), NEAR)
                for d in range(first, min(first + width, head_dim), every * e.lanes):
                    for i, vector in enumerate(e.load_apart(values, b.add(row, INT64(d)), every)):
                        for g in range(group):
                            at = sums[g, d + i * e.lanes]
                            b.store(e.multiply_add(weight[g], vector, b.load(at)), at)
            for g, d in places:
                e.store(b.load(sums[g, d]), acc, g * head_dim + d)
        return context.get_dummy_value()

    one = numba.types.int64
    return numba.types.void(one, strides, *(one,) * 4, *shape), generate
