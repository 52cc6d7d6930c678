"""How do decode rows read their pages in place on a CPU?

XLA for CPUs has no loop that reads a page where it lies: it gathers pages into a buffer first.  Here Python functions
that numba compiles to machine code do, and XLA calls them as typed FFI handlers from inside its program; no Python runs
then.  One call takes a share of the rows, so that XLA may spread the calls over its threads.  Chunks go to `xla.py`.
"""

import functools
import os
import typing

import jax
import jax.numpy as jnp
import numba
import numba.extending
import numpy as np
from jaxtyping import Array, Float, Int32, UInt16

from pallas_kernels.paged_attention import xla

# XLA runs custom calls on another thread only where more than 8 are ready to run, and then hands over half of them.
SHARES_PER_CORE = 8
MAX_CORES = 8
TOKENS_AT_ONCE = 4  # keys or values that share one pass over a query or a sum


def paged_attention(
    q: Float[Array, "T H h"],
    k_pages: Float[Array, "L N K p h"] | UInt16[Array, "L N K p h"],
    v_pages: Float[Array, "L N K p h"] | UInt16[Array, "L N K p h"],
    layer: int,
    kv_lens: Int32[Array, "R"],
    page_indices: Int32[Array, "R P"],
    cu_q_lens: Int32[Array, "R+1"],
    num_decode: Int32[Array, ""],
    *,
    sm_scale: float,
) -> Float[Array, "T H h"]:
    """Attention as `api.paged_attention` defines it; products and sums of decode rows in float32.

    The result of a decode row depends on that row alone, to the last bit.

    Raises:
      NotImplementedError: see `why_not`.
    """
    reason = why_not(q, k_pages, v_pages)
    if reason is not None:
        raise NotImplementedError(f"implementation='numba' {reason}")
    is_decode = jnp.arange(kv_lens.shape[0]) < num_decode
    decoded = _decode(q, k_pages, v_pages, layer, jnp.where(is_decode, kv_lens, 0), page_indices, sm_scale)
    # Decode rows without keys cost the other implementation nothing.
    kv_lens = jnp.where(is_decode, 0, kv_lens)
    out = xla.paged_attention(
        q, k_pages, v_pages, layer, kv_lens, page_indices, cu_q_lens, num_decode, sm_scale=sm_scale
    )
    is_token_of_decode = (jnp.arange(q.shape[0]) < num_decode)[:, None, None]
    decoded = jnp.pad(decoded, ((0, q.shape[0] - decoded.shape[0]), (0, 0), (0, 0)))
    return jnp.where(is_token_of_decode, decoded.astype(q.dtype), out)


def why_not(q, k_pages, v_pages) -> str | None:
    """What keeps this implementation from a call, None if nothing does."""
    platform = jax.default_backend()
    if platform != "cpu":
        return f"runs on 'cpu', not on {platform!r}"
    for pages in (k_pages, v_pages):
        if pages.dtype not in (jnp.uint16, jnp.float32):
            return f"reads pages of uint16 (the bits of bfloat16) or float32, not {pages.dtype.name}"
    if k_pages.dtype != v_pages.dtype:
        return f"reads keys and values of one dtype, not {k_pages.dtype.name} and {v_pages.dtype.name}"
    return None


def _num_shares():
    return SHARES_PER_CORE * min(MAX_CORES, os.cpu_count() or 1)


def _decode(q, k_pages, v_pages, layer, kv_lens, page_indices, sm_scale):
    """Output of the rows with `kv_lens` > 0, 0 for the others: float32 [min(R, T) H h]."""
    num_tokens, num_heads, head_dim = q.shape
    capacity = min(kv_lens.shape[0], num_tokens)
    num_shares = min(_num_shares(), capacity)
    rows, place = _deal(kv_lens[:capacity], num_shares)
    target = _register(k_pages.dtype.name, head_dim, num_heads // k_pages.shape[2])
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((rows.shape[1], num_heads, head_dim), jnp.float32))
    operands = (q.astype(jnp.float32), k_pages, v_pages, kv_lens, page_indices, rows)
    attributes = {"layer": np.int64(layer), "scale": np.float32(sm_scale)}
    outs = [call(*operands, **attributes, share=np.int64(share)) for share in range(num_shares)]
    return jnp.concatenate(outs)[place]


def _deal(kv_lens, num_shares):
    """Deals rows out to shares, the longest first, back and forth: rows [shares each], -1 for none; place [R] undoes it.

    Only lengths enter, so that XLA does this once for all layers of a step.
    """
    num_rows = kv_lens.shape[0]
    each = -(-num_rows // num_shares)
    order = jnp.argsort(-kv_lens).astype(jnp.int32)
    rows = jnp.pad(order, (0, each * num_shares - num_rows), constant_values=-1).reshape(each, num_shares)
    rows = jnp.where(jnp.arange(each)[:, None] % 2, rows[:, ::-1], rows)
    # XLA hands over halves of the calls in their order: let neighbours by length be in different halves.
    rows = jnp.concatenate([rows[:, ::2], rows[:, 1::2]], axis=1).T
    slots = jnp.arange(rows.size, dtype=jnp.int32).reshape(rows.shape)
    place = jnp.zeros(num_rows, jnp.int32).at[jnp.where(rows < 0, num_rows, rows)].set(slots, mode="drop")
    return rows, place


@functools.cache
def _register(dtype, head_dim, group):
    """Compiles the handler for pages of a dtype, `group` query heads for each KV head; returns its name for XLA."""
    name = f"paged_decode_{dtype}_h{head_dim}_g{group}"
    handler = _make_handler(np.dtype(dtype), head_dim, group)
    _HANDLERS.append(handler)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler.ctypes), platform="cpu")
    return name


_HANDLERS = []  # XLA knows their addresses only


@numba.extending.intrinsic
@typing.no_type_check
def _pointer(typing_context, address, dtype):
    """The int64 `address` as a pointer to elements of `dtype`."""
    pointer = numba.types.CPointer(dtype.dtype)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(numba.types.int64, dtype), generate


@numba.njit(forceinline=True)
@typing.no_type_check
def _array(address, dtype, size):
    return numba.carray(_pointer(np.int64(address), dtype), (size,))


# Words (8 bytes) of the structures in xla/ffi/api/c_api.h.  They only ever grow at their end.
FRAME_EXTENSION, FRAME_STAGE, FRAME_ARGS, FRAME_RETS, FRAME_ATTRS, FRAME_SIZE = 1, 4, 9, 14, 20, 21
EXTENSION_METADATA, METADATA_VERSION = 3, 3
BUFFER_DATA, BUFFER_DIMS, BUFFER_SIZE = 3, 5, 6
STAGE_EXECUTE = 3
API_VERSION = 1 << 32  # minor version 1 in the high half, major version 0 in the low half


@numba.njit(forceinline=True)
@typing.no_type_check
def _tail(floats, start):
    return _array(floats.ctypes.data + 4 * start, np.float32, floats.size - start)


@numba.njit(forceinline=True)
@typing.no_type_check
def _exp(x):
    """e**x for x <= 0, within 2 units in the last place, of instructions that exist for vectors."""
    x = max(x, np.float32(-87.0))
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
        y = y * r + np.float32(c)
    return y * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@typing.no_type_check
def _make_handler(dtype, head_dim, group):
    """The handler: `group` and `head_dim` are constants to the compiler, all other sizes come with the call."""
    fast = numba.njit(fastmath={"reassoc", "contract"}, forceinline=True, error_model="numpy")
    is_bits = dtype == np.uint16
    step = TOKENS_AT_ONCE
    element, dtype_bytes = (np.uint16, 2) if is_bits else (np.float32, 4)

    if is_bits:

        @numba.njit(forceinline=True)
        def to_float(x):
            return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    else:

        @numba.njit(forceinline=True)
        def to_float(x):
            return x

    @fast
    def widen(page, num_tokens, buffer):
        for i in range(num_tokens * head_dim):
            buffer[i] = to_float(page[i])

    @fast
    def score(query, keys, num_tokens, scores, stride):
        """scores[g, s] = query[g] . keys[s]"""
        for g in range(group):
            q = _array(query.ctypes.data + 4 * g * head_dim, np.float32, head_dim)
            for s in range(0, num_tokens - num_tokens % step, step):
                s0 = s1 = s2 = s3 = np.float32(0)
                for d in range(head_dim):
                    s0 += q[d] * keys[s * head_dim + d]
                    s1 += q[d] * keys[(s + 1) * head_dim + d]
                    s2 += q[d] * keys[(s + 2) * head_dim + d]
                    s3 += q[d] * keys[(s + 3) * head_dim + d]
                scores[g * stride + s] = s0
                scores[g * stride + s + 1] = s1
                scores[g * stride + s + 2] = s2
                scores[g * stride + s + 3] = s3
            for s in range(num_tokens - num_tokens % step, num_tokens):
                s0 = np.float32(0)
                for d in range(head_dim):
                    s0 += q[d] * keys[s * head_dim + d]
                scores[g * stride + s] = s0

    @fast
    def add(weights, stride, values, num_tokens, acc):
        """acc[g] += sum_s weights[g, s] values[s]"""
        for g in range(group):
            for s in range(0, num_tokens - num_tokens % step, step):
                w0 = weights[g * stride + s]
                w1 = weights[g * stride + s + 1]
                w2 = weights[g * stride + s + 2]
                w3 = weights[g * stride + s + 3]
                for d in range(head_dim):
                    acc[g * head_dim + d] += (
                        w0 * values[s * head_dim + d]
                        + w1 * values[(s + 1) * head_dim + d]
                        + w2 * values[(s + 2) * head_dim + d]
                        + w3 * values[(s + 3) * head_dim + d]
                    )
            for s in range(num_tokens - num_tokens % step, num_tokens):
                w0 = weights[g * stride + s]
                for d in range(head_dim):
                    acc[g * head_dim + d] += w0 * values[s * head_dim + d]

    @numba.njit(fastmath={"nnan", "nsz", "reassoc"}, forceinline=True)
    def peak_of(scores, size):
        peak = scores[0]
        for s in range(size):
            peak = max(peak, scores[s])
        return peak

    @fast
    def softmax(scores, size, scale):
        """Replaces scores by exp(scale (score - peak)); returns their sum."""
        peak = peak_of(scores, size)
        if scale < 0:
            for s in range(size):
                scores[s] = -scores[s]
            peak = peak_of(scores, size)
            scale = -scale
        total = np.float32(0)
        for s in range(size):
            scores[s] = _exp((scores[s] - peak) * scale)
            total += scores[s]
        return total

    @numba.cfunc(numba.types.int64(numba.types.CPointer(numba.types.int64)), error_model="numpy")
    def handler(frame):
        frame = numba.carray(frame, (FRAME_SIZE,))
        if frame[FRAME_EXTENSION] != 0:  # XLA asks for the version, once
            metadata = _array(frame[FRAME_EXTENSION], np.int64, 4)[EXTENSION_METADATA]
            _array(metadata, np.int64, 4)[METADATA_VERSION] = API_VERSION
            return 0
        if frame[FRAME_STAGE] & 0xFFFFFFFF != STAGE_EXECUTE:
            return 0
        args = _array(frame[FRAME_ARGS], np.int64, 6)
        attrs = _array(frame[FRAME_ATTRS], np.int64, 3)  # sorted by name: layer, scale, share
        layer = _array(_array(attrs[0], np.int64, 2)[1], np.int64, 1)[0]
        scale = _array(_array(attrs[1], np.int64, 2)[1], np.float32, 1)[0]
        share = _array(_array(attrs[2], np.int64, 2)[1], np.int64, 1)[0]
        q_data = _array(args[0], np.int64, BUFFER_SIZE)[BUFFER_DATA]
        k_data = _array(args[1], np.int64, BUFFER_SIZE)[BUFFER_DATA]
        v_data = _array(args[2], np.int64, BUFFER_SIZE)[BUFFER_DATA]
        cache_dims = _array(_array(args[1], np.int64, BUFFER_SIZE)[BUFFER_DIMS], np.int64, 5)
        num_pages, num_kv_heads, page_size = cache_dims[1], cache_dims[2], cache_dims[3]
        table_dims = _array(_array(args[4], np.int64, BUFFER_SIZE)[BUFFER_DIMS], np.int64, 2)
        kv_lens = _array(_array(args[3], np.int64, BUFFER_SIZE)[BUFFER_DATA], np.int32, table_dims[0])
        table = _array(_array(args[4], np.int64, BUFFER_SIZE)[BUFFER_DATA], np.int32, table_dims[0] * table_dims[1])
        each = _array(_array(args[5], np.int64, BUFFER_SIZE)[BUFFER_DIMS], np.int64, 2)[1]
        rows = _array(_array(args[5], np.int64, BUFFER_SIZE)[BUFFER_DATA] + 4 * share * each, np.int32, each)
        rets = _array(frame[FRAME_RETS], np.int64, 1)
        out_data = _array(rets[0], np.int64, BUFFER_SIZE)[BUFFER_DATA]

        head = page_size * head_dim  # elements of one KV head in a page
        row_size = num_kv_heads * group * head_dim
        longest = 0
        for i in range(each):
            if rows[i] >= 0:
                longest = max(longest, kv_lens[rows[i]])
        stride = np.int64(longest)
        scores = np.empty(num_kv_heads * group * stride, np.float32)
        buffer = np.empty(head, np.float32)
        for i in range(each):
            row = np.int64(rows[i])
            acc = _array(out_data + 4 * i * row_size, np.float32, row_size)
            acc[:] = 0
            kv_len = np.int64(0) if row < 0 else np.int64(kv_lens[row])
            if kv_len == 0:
                continue
            num_used = (kv_len + page_size - 1) // page_size
            for j in range(num_used):
                num_tokens = min(page_size, kv_len - j * page_size)
                page = (layer * num_pages + table[row * table_dims[1] + j]) * num_kv_heads
                for k in range(num_kv_heads):
                    keys = _array(k_data + (page + k) * head * dtype_bytes, element, head)
                    widen(keys, num_tokens, buffer)
                    query = _array(q_data + 4 * (row * row_size + k * group * head_dim), np.float32, group * head_dim)
                    start = k * group * stride + j * page_size
                    score(query, buffer, num_tokens, _tail(scores, start), stride)
            for m in range(num_kv_heads * group):
                of_head = _tail(scores, m * stride)
                total = softmax(of_head, kv_len, scale)
                for s in range(kv_len):
                    of_head[s] /= total
            for j in range(num_used):
                num_tokens = min(page_size, kv_len - j * page_size)
                page = (layer * num_pages + table[row * table_dims[1] + j]) * num_kv_heads
                for k in range(num_kv_heads):
                    values = _array(v_data + (page + k) * head * dtype_bytes, element, head)
                    widen(values, num_tokens, buffer)
                    start = k * group * stride + j * page_size
                    add(_tail(scores, start), stride, buffer, num_tokens, _tail(acc, k * group * head_dim))
        return 0

    return handler
