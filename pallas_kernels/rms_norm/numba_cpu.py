"""How does a CPU norm rows in one pass?  A row stays in the first cache between its sum of squares and its scaling.

XLA runs three programs for it, the sum by a library that takes ten times as long as the memory does.
"""

import typing

import jax
import jax.numpy as jnp
import numba
import numba.core.cgutils
import numba.extending
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.numba_ffi import FRAME_SIZE, Describe, Work, array, buffer, register
from pallas_kernels.numba_memory import clear_rows
from pallas_kernels.numba_vectors16 import (
    FLOAT,
    FLOATS,
    INT64,
    WIDTH,
    add,
    call,
    constant,
    fold,
    load,
    splat,
    store_vector,
)

X, SCALE, EPS, OUT, NUM_TOKENS, NUM_ROWS, LENGTH, NUM_WORDS = range(8)
ROWS = 32
"""Rows of an item of work: what one thread norms while another would still be waking up."""


def rms_norm(
    x: Float32[Array, "t D"],
    scale: Float32[Array, "D"],
    eps: float,
    num_tokens: Int32[Array, ""],
    out_dtype: jnp.dtype,
) -> Float[Array, "t D"]:
    """The norm of the first `num_tokens` rows, zero for the others.  A row's result does not depend on the other rows."""
    out = jax.ShapeDtypeStruct(x.shape, out_dtype)
    return jax.ffi.ffi_call(_target(out_dtype.itemsize), out)(x, scale, num_tokens, jnp.float32(eps))


def _target(out_bytes: int) -> str:
    """Makes XLA know the norm with results of 4 bytes (float32) or 2 (bfloat16); returns its name."""
    name = f"rms_norm_to_{out_bytes}_bytes"
    return register(name, lambda sources: (make_describe(sources), make_work(sources, out_bytes)), num_words=NUM_WORDS)


@typing.no_type_check
def make_describe(sources):
    """Reads what a call is about off its frame; an item of work is `ROWS` rows."""

    @numba.cfunc(Describe, cache=True)
    @typing.no_type_check
    def describe(frame_at, job_at):
        frame, job = array(frame_at, np.int64, FRAME_SIZE), array(job_at, np.int64, NUM_WORDS + 0 * sources)
        job[X], x_dims = buffer(frame, False, 0)
        job[SCALE], job[EPS], job[OUT] = (
            buffer(frame, False, 1)[0],
            buffer(frame, False, 3)[0],
            buffer(frame, True, 0)[0],
        )
        job[NUM_ROWS], job[LENGTH] = array(x_dims, np.int64, 2)[0], array(x_dims, np.int64, 2)[1]
        job[NUM_TOKENS] = min(array(buffer(frame, False, 2)[0], np.int32, 1)[0], job[NUM_ROWS])
        return -(-job[NUM_ROWS] // ROWS)

    return describe


@numba.extending.intrinsic(prefer_literal=True)
@typing.no_type_check
def norm_row(typing_context, x, scale, eps, num_vectors, out, out_bytes):
    """Norms 16 * `num_vectors` values of float32 into `out`, in float32 or, if `out_bytes` (a constant) is 2, bfloat16."""
    size = out_bytes
    if not isinstance(size, numba.types.IntegerLiteral):
        return None

    def generate(context, builder, signature, arguments):
        b = builder
        x, scale, eps, num_vectors, out = arguments[:5]
        squares = numba.core.cgutils.alloca_once(b, FLOATS)
        b.store(constant(0), squares)
        with numba.core.cgutils.for_range(b, num_vectors) as loop:
            value = load(b, x, b.mul(loop.index, INT64(4 * WIDTH)))
            b.store(call(b, "fma", value, value, b.load(squares)), squares)
        total = fold(b, b.load(squares), add)
        mean = b.fdiv(total, b.sitofp(b.mul(num_vectors, INT64(WIDTH)), FLOAT))
        root = call(b, "sqrt", splat(b, b.fadd(mean, eps), FLOATS))
        factor = b.fdiv(constant(1), root)
        with numba.core.cgutils.for_range(b, num_vectors) as loop:
            offset = b.mul(loop.index, INT64(4 * WIDTH))
            value = b.fmul(b.fmul(load(b, x, offset), factor), load(b, scale, offset))
            store_vector(b, value, out, loop.index, size.literal_value)
        return context.get_dummy_value()

    one = numba.types.int64
    return numba.types.void(one, one, numba.types.float32, one, one, size), generate


@typing.no_type_check
def make_work(sources, out_bytes):
    """The work on blocks of rows."""

    @numba.cfunc(Work, error_model="numpy", cache=True)
    @typing.no_type_check
    def work(job_at, first, stop):
        job = array(job_at, np.int64, NUM_WORDS + 0 * sources)
        length, eps = job[LENGTH], array(job[EPS], np.float32, 1)[0]
        begin, end, row_bytes = ROWS * first, min(ROWS * stop, job[NUM_ROWS]), out_bytes * length
        for row in range(begin, min(end, job[NUM_TOKENS])):
            norm_row(job[X] + 4 * length * row, job[SCALE], eps, length // WIDTH, job[OUT] + row_bytes * row, out_bytes)
        clear_rows(job[OUT], row_bytes, max(begin, job[NUM_TOKENS]), end, row_bytes)

    return work
