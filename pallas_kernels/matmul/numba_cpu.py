"""How does a bfloat16 matrix product come near a CPU's peak, for a few tokens as for hundreds?

A weight panel of 32 columns is rearranged into pairs of rows, as AVX512-BF16 wants it, in a buffer that stays in the core's
cache; then up to 12 tokens at a time keep all their sums of the panel in registers.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import llvmlite.binding
import llvmlite.ir
import numba
import numba.core.cgutils
import numba.extending
import numpy as np
from jaxtyping import Array, BFloat16, Float32

from pallas_kernels.numba_ffi import FRAME_SIZE, Describe, Work, array, buffer, fingerprint, prefetch, register

PANEL = 32  # columns: two vectors of 16 float32 sums for each token
AHEAD = 2 * 64  # bytes: with two threads the next panel of this one is the one after the next


def matmul(x: BFloat16[Array, "t c"], kernel: BFloat16[Array, "c f"]) -> Float32[Array, "t f"]:
    """`x @ kernel`, sums in float32.  A token's result does not depend on the other tokens, to the last bit."""
    call = jax.ffi.ffi_call(_target(), jax.ShapeDtypeStruct((x.shape[0], kernel.shape[1]), jnp.float32))
    return call(x, kernel)


@functools.cache
def _target() -> str:
    name = "matmul_bfloat16"
    sources = fingerprint(__file__)
    register(name, _make_describe(sources), _make_panels(sources), num_words=NUM_WORDS, items_per_turn=1)
    return name


X, KERNEL, OUT, NUM_TOKENS, WIDTH, NUM_COLUMNS, NUM_WORDS = range(7)


@typing.no_type_check
def _make_describe(sources):
    """Reads what a call is about off its frame; an item of work is a panel."""

    @numba.cfunc(Describe, cache=True)
    def describe(frame_at, job_at):
        frame, job = array(frame_at, np.int64, FRAME_SIZE), array(job_at, np.int64, NUM_WORDS + 0 * sources)
        job[X], x_dims = buffer(frame, False, 0)
        job[KERNEL] = buffer(frame, False, 1)[0]
        job[OUT], out_dims = buffer(frame, True, 0)
        job[NUM_TOKENS], job[WIDTH] = array(x_dims, np.int64, 2)[0], array(x_dims, np.int64, 2)[1]
        job[NUM_COLUMNS] = array(out_dims, np.int64, 2)[1]
        return job[NUM_COLUMNS] // PANEL

    return describe


class _BFloat(llvmlite.ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self):
        return "bfloat"


FLOAT, WORD, INT64 = llvmlite.ir.FloatType(), llvmlite.ir.IntType(32), llvmlite.ir.IntType(64)
SUMS = llvmlite.ir.VectorType(FLOAT, 16)
WORDS = llvmlite.ir.VectorType(WORD, 16)
HALVES = llvmlite.ir.VectorType(llvmlite.ir.IntType(16), 32)
PAIRS = llvmlite.ir.VectorType(_BFloat(), 32)


def _at(b, address, offset, element):
    """The `element` at `offset` bytes (an int64 or a constant) from an int64 address."""
    offset = offset if isinstance(offset, llvmlite.ir.Value) else INT64(offset)
    return b.inttoptr(b.add(address, offset), element.as_pointer())


@numba.extending.intrinsic
@typing.no_type_check
def _pack_pair(typing_context, source, next_source, target):
    """32 values of each of two rows, interleaved."""

    def generate(context, builder, signature, arguments):
        b = builder
        source, next_source, target = arguments
        one, two = (b.load(_at(b, row, 0, HALVES), align=2) for row in (source, next_source))
        index = llvmlite.ir.VectorType(WORD, 32)
        for half in range(2):
            order = [column + 32 * row for column in range(16 * half, 16 * half + 16) for row in range(2)]
            b.store(b.shuffle_vector(one, two, index(order)), _at(b, target, 64 * half, HALVES), align=64)
        return context.get_dummy_value()

    return numba.types.void(*(numba.types.int64,) * 3), generate


@numba.extending.intrinsic(prefer_literal=True)
@typing.no_type_check
def _tile(typing_context, x, x_stride, panel, num_pairs, out, out_stride, num_tokens):
    """Products of `num_tokens` (a constant) tokens with one packed panel of `num_pairs` pairs of rows."""
    count = num_tokens
    if not isinstance(count, numba.types.IntegerLiteral):
        return None

    def generate(context, builder, signature, arguments):
        b = builder
        x, x_stride, panel, num_pairs, out, out_stride = arguments[:6]
        num_tokens = count.literal_value
        dot_type = llvmlite.ir.FunctionType(SUMS, (SUMS, PAIRS, PAIRS))
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        dot = b.module.globals.get(name) or llvmlite.ir.Function(b.module, dot_type, name)
        zero = llvmlite.ir.Constant(SUMS, [0.0] * 16)
        sums = {}
        for m in range(num_tokens):
            for half in range(2):
                sums[m, half] = numba.core.cgutils.alloca_once(b, SUMS)
                b.store(zero, sums[m, half])
        tokens = [b.add(x, b.mul(x_stride, INT64(m))) for m in range(num_tokens)]
        with numba.core.cgutils.for_range(b, num_pairs) as loop:
            row = b.add(panel, b.mul(loop.index, INT64(128)))
            weights = [b.bitcast(b.load(_at(b, row, 64 * half, HALVES), align=64), PAIRS) for half in range(2)]
            place = b.mul(loop.index, INT64(4))
            for m in range(num_tokens):
                pair = b.load(_at(b, tokens[m], place, WORD), align=2)
                first = b.insert_element(llvmlite.ir.Constant(WORDS, llvmlite.ir.Undefined), pair, WORD(0))
                both = b.bitcast(b.shuffle_vector(first, first, WORDS([0] * 16)), PAIRS)
                for half in range(2):
                    b.store(b.call(dot, (b.load(sums[m, half]), both, weights[half])), sums[m, half])
        for m in range(num_tokens):
            for half in range(2):
                place = b.add(b.mul(out_stride, INT64(m)), INT64(64 * half))
                b.store(b.load(sums[m, half]), _at(b, out, place, SUMS), align=4)
        return context.get_dummy_value()

    return numba.types.void(*(numba.types.int64,) * 6, count), generate


@typing.no_type_check
def _make_panels(sources):
    """The work: for each panel, packs it, then runs all tokens through it."""

    @numba.cfunc(Work, error_model="numpy", cache=True)
    @typing.no_type_check
    def panels(job_at, first, stop):
        job = array(job_at, np.int64, NUM_WORDS + 0 * sources)
        x, kernel, out = job[X], job[KERNEL], job[OUT]
        num_tokens, num_pairs, row_bytes = job[NUM_TOKENS], job[WIDTH] // 2, 2 * job[NUM_COLUMNS]
        x_stride, out_stride = 4 * num_pairs, 2 * row_bytes
        buffer_ = np.empty(num_pairs * 2 * PANEL + 32, np.int16)
        packed = (buffer_.ctypes.data + 63) // 64 * 64
        for panel in range(first, stop):
            source = kernel + 2 * PANEL * panel
            for k in range(0, 2 * num_pairs, 2):
                prefetch(source + k * row_bytes + AHEAD, 64)
                prefetch(source + (k + 1) * row_bytes + AHEAD, 64)
                _pack_pair(source + k * row_bytes, source + (k + 1) * row_bytes, packed + k * 2 * PANEL)
            token = 0  # 12 at a time: 24 sums, 2 weights and 1 activation nearly fill the 32 registers
            while token < num_tokens:
                left = num_tokens - token
                activations = x + x_stride * token
                sums = out + 4 * PANEL * panel + out_stride * token
                if left >= 12 and left != 16:
                    _tile(activations, x_stride, packed, num_pairs, sums, out_stride, 12)
                    token += 12
                elif left >= 8:
                    _tile(activations, x_stride, packed, num_pairs, sums, out_stride, 8)
                    token += 8
                elif left >= 4:
                    _tile(activations, x_stride, packed, num_pairs, sums, out_stride, 4)
                    token += 4
                elif left >= 2:
                    _tile(activations, x_stride, packed, num_pairs, sums, out_stride, 2)
                    token += 2
                else:
                    _tile(activations, x_stride, packed, num_pairs, sums, out_stride, 1)
                    token += 1

    return panels
