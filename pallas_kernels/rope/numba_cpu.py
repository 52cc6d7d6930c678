"""How does a CPU rotate queries and keys in one pass over their joint projection?

To XLA for CPUs the rotation is part of whatever uses it: inside of a step it computes sines and cosines again for each head.
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
from pallas_kernels.numba_vectors16 import INT64, WIDTH, load, scale_row, store_vector

X, COS, SIN, Q, K, V, NUM_TOKENS, NUM_ROWS, NUM_KV_HEADS, NUM_HEADS, HEAD_DIM, NUM_WORDS = range(12)
ROWS = 16
"""Rows of an item of work: what one thread rotates while another would still be waking up."""


def rotate_qkv(
    y: Float32[Array, "t K w h"],
    cos: Float32[Array, "t h2"],
    sin: Float32[Array, "t h2"],
    num_tokens: Int32[Array, ""],
    out_dtype: jnp.dtype,
) -> tuple[Float[Array, "t H h"], Float[Array, "t K h"], Float[Array, "t K h"]]:
    """Queries, keys and values of the first `num_tokens` rows, zero for the others."""
    t, num_kv_heads, width, head_dim = y.shape
    shapes = (num_kv_heads * (width - 2), num_kv_heads, num_kv_heads)
    outs = [jax.ShapeDtypeStruct((t, heads, head_dim), out_dtype) for heads in shapes]
    q, k, v = jax.ffi.ffi_call(_target(out_dtype.itemsize), outs)(y, cos, sin, num_tokens)
    return q, k, v


def _target(out_bytes: int) -> str:
    """Makes XLA know the rotation with results of 4 bytes (float32) or 2 (bfloat16); returns its name."""
    name = f"rotate_qkv_to_{out_bytes}_bytes"
    return register(name, lambda sources: (make_describe(sources), make_work(sources, out_bytes)), num_words=NUM_WORDS)


@typing.no_type_check
def make_describe(sources):
    """Reads what a call is about off its frame; an item of work is `ROWS` rows."""

    @numba.cfunc(Describe, cache=True)
    @typing.no_type_check
    def describe(frame_at, job_at):
        frame, job = array(frame_at, np.int64, FRAME_SIZE), array(job_at, np.int64, NUM_WORDS + 0 * sources)
        job[X], dims_at = buffer(frame, False, 0)
        job[COS], job[SIN] = buffer(frame, False, 1)[0], buffer(frame, False, 2)[0]
        job[Q], job[K], job[V] = buffer(frame, True, 0)[0], buffer(frame, True, 1)[0], buffer(frame, True, 2)[0]
        dims = array(dims_at, np.int64, 4)
        job[NUM_ROWS], job[NUM_KV_HEADS], job[NUM_HEADS], job[HEAD_DIM] = dims[0], dims[1], dims[2] - 2, dims[3]
        job[NUM_TOKENS] = min(array(buffer(frame, False, 3)[0], np.int32, 1)[0], job[NUM_ROWS])
        return -(-job[NUM_ROWS] // ROWS)

    return describe


@numba.extending.intrinsic(prefer_literal=True)
@typing.no_type_check
def rotate_head(typing_context, x, cos, sin, half, out, out_bytes):
    """Rotates a head of 32 * `half` values of float32 into `out`, in float32 or, if `out_bytes` (a constant) is 2, bfloat16."""
    size = out_bytes
    if not isinstance(size, numba.types.IntegerLiteral):
        return None

    def generate(context, builder, signature, arguments):
        b = builder
        x, cos, sin, half, out = arguments[:5]
        with numba.core.cgutils.for_range(b, half) as loop:
            offset, other = b.mul(loop.index, INT64(4 * WIDTH)), b.add(loop.index, half)
            one, two = load(b, x, offset), load(b, x, b.mul(other, INT64(4 * WIDTH)))
            c, s = load(b, cos, offset), load(b, sin, offset)
            store_vector(b, b.fsub(b.fmul(one, c), b.fmul(two, s)), out, loop.index, size.literal_value)
            store_vector(b, b.fadd(b.fmul(two, c), b.fmul(one, s)), out, other, size.literal_value)
        return context.get_dummy_value()

    return numba.types.void(*(numba.types.int64,) * 5, size), generate


@typing.no_type_check
def make_work(sources, out_bytes):
    """The work on blocks of rows."""

    @numba.cfunc(Work, error_model="numpy", cache=True)
    @typing.no_type_check
    def work(job_at, first, stop):
        job = array(job_at, np.int64, NUM_WORDS + 0 * sources)
        num_kv_heads, num_heads, head_dim = job[NUM_KV_HEADS], job[NUM_HEADS], job[HEAD_DIM]
        half = head_dim // (2 * WIDTH)
        head, out_head = 4 * head_dim, out_bytes * head_dim
        q_bytes, kv_bytes = out_head * num_kv_heads * num_heads, out_head * num_kv_heads  # of a row
        begin, end = ROWS * first, min(ROWS * stop, job[NUM_ROWS])
        for row in range(begin, min(end, job[NUM_TOKENS])):
            x = job[X] + head * num_kv_heads * (num_heads + 2) * row
            cos, sin = job[COS] + head // 2 * row, job[SIN] + head // 2 * row
            q, k, v = job[Q] + q_bytes * row, job[K] + kv_bytes * row, job[V] + kv_bytes * row
            for _ in range(num_kv_heads):
                for _ in range(num_heads):
                    rotate_head(x, cos, sin, half, q, out_bytes)
                    x, q = x + head, q + out_head
                rotate_head(x, cos, sin, half, k, out_bytes)
                scale_row(x + head, np.float32(1), v, 2 * half, out_bytes)
                x, k, v = x + 2 * head, k + out_head, v + out_head
        padding = max(begin, job[NUM_TOKENS])
        clear_rows(job[Q], q_bytes, padding, end, q_bytes)
        clear_rows(job[K], kv_bytes, padding, end, kv_bytes)
        clear_rows(job[V], kv_bytes, padding, end, kv_bytes)

    return work
