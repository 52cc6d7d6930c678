"""How does attention read pages in place on a CPU?

XLA for CPUs has no loop that reads a page where it lies: it gathers pages into a buffer first.  Here Python functions
that numba compiles to machine code do, and XLA calls them as typed FFI handlers from inside its program; no Python runs
then.
"""

import functools
import math
import typing

import jax
import jax.numpy as jnp
import llvmlite.ir
import numba
import numba.core.cgutils
import numba.extending
import numpy as np
from jaxtyping import Array, Float, Int32, UInt16


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
    """Attention as `api.paged_attention` defines it; products and sums in float32.

    Pages of uint16 or float32, for a CPU.  Every token is a row of its own to the kernel: a token of a chunk reads the chunk's
    pages again, out of the cores' caches.  Its result depends on that token's row alone, to the last bit.
    """
    del num_decode
    num_tokens, num_heads, head_dim = q.shape
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row = jnp.searchsorted(cu_q_lens[1:], token, side="right", method="compare_all")
    row = jnp.minimum(row, kv_lens.shape[0] - 1)
    num_visible = jnp.where(token < cu_q_lens[-1], kv_lens[row] - cu_q_lens[row + 1] + token + 1, 0)
    target = _register(k_pages.dtype.name, head_dim, num_heads // k_pages.shape[2])
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(q.shape, jnp.float32))
    query = q.astype(jnp.float32) * jnp.float32(sm_scale)
    out = call(query, k_pages, v_pages, num_visible, page_indices[row], layer=np.int64(layer))
    return out.astype(q.dtype)


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
def _exponentiate(scores, size):
    """Replaces scores by their distance to the highest, exponentiated; returns the sum."""
    peak = _peak(scores, size)
    total = np.float32(0)
    for s in range(size):
        scores[s] = _exp(scores[s] - peak)
        total += scores[s]
    return total


FLOAT, INT64 = llvmlite.ir.FloatType(), llvmlite.ir.IntType(64)
MAX_SUMS = 16  # vectors that a tile of products adds up in registers


@typing.no_type_check
class _Emitter:
    """Writes vector instructions for rows of `head_dim` elements; addresses are int64, offsets count elements."""

    def __init__(self, builder, dtype, head_dim):
        self.builder = builder
        self.is_bits = dtype == np.uint16
        self.lanes = math.gcd(head_dim, 16)
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


@numba.extending.intrinsic
@typing.no_type_check
def _prefetch_line(typing_context, address):
    """Starts to bring the 64 bytes at the int64 `address` near."""

    def generate(context, builder, signature, arguments):
        byte, word = llvmlite.ir.IntType(8).as_pointer(), llvmlite.ir.IntType(32)
        function_type = llvmlite.ir.FunctionType(llvmlite.ir.VoidType(), (byte, word, word, word))
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", (byte,), function_type)
        read, keep, data = word(0), word(3), word(1)
        builder.call(prefetch, (builder.inttoptr(arguments[0], byte), read, keep, data))
        return context.get_dummy_value()

    return numba.types.void(numba.types.int64), generate


@numba.njit(forceinline=True)
@typing.no_type_check
def _prefetch(address, num_bytes):
    for offset in range(0, num_bytes, 64):
        _prefetch_line(address + offset)


@typing.no_type_check
def _make_scores(dtype, head_dim, group, num_keys):
    """scores[g, s] = query[g] . keys[s] for `num_keys` keys; rows of scores lie `stride` apart."""

    @numba.extending.intrinsic
    def scores(typing_context, query, keys, out, stride):
        def generate(context, builder, signature, arguments):
            query, keys, out, stride = arguments
            e = _Emitter(builder, dtype, head_dim)
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

        return numba.types.void(*(numba.types.int64,) * 4), generate

    return scores


@typing.no_type_check
def _make_add(dtype, head_dim, group):
    """acc[g] += sum_s weights[g, s] values[s]; rows of weights lie `stride` apart."""

    @numba.extending.intrinsic
    def add(typing_context, weights, stride, values, num_values, acc):
        def generate(context, builder, signature, arguments):
            weights, stride, values, num_values, acc = arguments
            e = _Emitter(builder, dtype, head_dim)
            width = e.lanes * max(1, MAX_SUMS // group)
            for first in range(0, head_dim, width):
                places = [(g, d) for d in range(first, min(first + width, head_dim), e.lanes) for g in range(group)]
                sums = {}
                for g, d in places:
                    sums[g, d] = numba.core.cgutils.alloca_once(builder, e.floats)
                    builder.store(e.load(acc, g * head_dim + d), sums[g, d])
                with numba.core.cgutils.for_range(builder, num_values) as loop:
                    s = loop.index
                    weight = [e.splat(weights, builder.add(builder.mul(stride, INT64(g)), s)) for g in range(group)]
                    row = builder.mul(s, INT64(head_dim))
                    for d in sorted({d for _, d in places}):
                        vector = e.load_page(values, builder.add(row, INT64(d)))
                        for g in range(group):
                            old = builder.load(sums[g, d])
                            builder.store(e.multiply_add(weight[g], vector, old), sums[g, d])
                for g, d in places:
                    e.store(builder.load(sums[g, d]), acc, g * head_dim + d)
            return context.get_dummy_value()

        return numba.types.void(*(numba.types.int64,) * 5), generate

    return add


@typing.no_type_check
def _make_handler(dtype, head_dim, group):
    """The handler: `group` and `head_dim` are constants to the compiler, all other sizes come with the call."""
    itemsize = dtype.itemsize
    num_keys = min(4, math.gcd(head_dim, 16), 1 << (max(1, MAX_SUMS // group).bit_length() - 1))  # a power of 2
    scores_of_keys = _make_scores(dtype, head_dim, group, num_keys)
    scores_of_key = _make_scores(dtype, head_dim, group, 1)
    add = _make_add(dtype, head_dim, group)

    @numba.cfunc(numba.types.int64(numba.types.CPointer(numba.types.int64)), error_model="numpy")
    def handler(frame):
        frame = numba.carray(frame, (FRAME_SIZE,))
        if frame[FRAME_EXTENSION] != 0:  # XLA asks for the version, once
            metadata = _array(frame[FRAME_EXTENSION], np.int64, 4)[EXTENSION_METADATA]
            _array(metadata, np.int64, 4)[METADATA_VERSION] = API_VERSION
            return 0
        if frame[FRAME_STAGE] & 0xFFFFFFFF != STAGE_EXECUTE:
            return 0
        args = _array(frame[FRAME_ARGS], np.int64, 5)
        layer = _array(_array(_array(frame[FRAME_ATTRS], np.int64, 1)[0], np.int64, 2)[1], np.int64, 1)[0]
        q_data = _array(args[0], np.int64, BUFFER_SIZE)[BUFFER_DATA]
        k_data = _array(args[1], np.int64, BUFFER_SIZE)[BUFFER_DATA]
        v_data = _array(args[2], np.int64, BUFFER_SIZE)[BUFFER_DATA]
        cache_dims = _array(_array(args[1], np.int64, BUFFER_SIZE)[BUFFER_DIMS], np.int64, 5)
        num_pages, num_kv_heads, page_size = cache_dims[1], cache_dims[2], cache_dims[3]
        table_dims = _array(_array(args[4], np.int64, BUFFER_SIZE)[BUFFER_DIMS], np.int64, 2)
        kv_lens = _array(_array(args[3], np.int64, BUFFER_SIZE)[BUFFER_DATA], np.int32, table_dims[0])
        table = _array(_array(args[4], np.int64, BUFFER_SIZE)[BUFFER_DATA], np.int32, table_dims[0] * table_dims[1])
        out = _array(frame[FRAME_RETS], np.int64, 1)[0]
        num_rows = _array(_array(out, np.int64, BUFFER_SIZE)[BUFFER_DIMS], np.int64, 3)[0]
        out_data = _array(out, np.int64, BUFFER_SIZE)[BUFFER_DATA]

        num_heads = num_kv_heads * group
        stride = np.int64(0)  # tokens of the longest row
        for row in range(num_rows):
            stride = max(stride, np.int64(kv_lens[row]))
        weights = np.empty(num_heads * stride, np.float32)
        block = page_size * head_dim * itemsize  # bytes of one KV head in a page
        per_head = 4 * group * head_dim  # bytes of the queries, or of the sums, of one KV head
        for row in range(num_rows):
            acc = _array(out_data + row * num_kv_heads * per_head, np.float32, num_heads * head_dim)
            acc[:] = 0
            kv_len = np.int64(kv_lens[row])
            if kv_len == 0:
                continue
            num_used = (kv_len + page_size - 1) // page_size
            for j in range(num_used):
                num_tokens = min(page_size, kv_len - j * page_size)
                page = (layer * num_pages + table[row * table_dims[1] + j]) * num_kv_heads * block
                following = table[row * table_dims[1] + min(j + 1, num_used - 1)]
                coming = (layer * num_pages + following) * num_kv_heads * block
                for k in range(num_kv_heads):
                    _prefetch(k_data + coming + k * block, block)
                    query = q_data + (row * num_kv_heads + k) * per_head
                    keys = k_data + page + k * block
                    scores = weights.ctypes.data + 4 * (k * group * stride + j * page_size)
                    for s in range(0, num_tokens - num_keys + 1, num_keys):
                        scores_of_keys(query, keys + s * head_dim * itemsize, scores + 4 * s, stride)
                    for s in range(num_tokens - num_tokens % num_keys, num_tokens):
                        scores_of_key(query, keys + s * head_dim * itemsize, scores + 4 * s, stride)
            totals = np.empty(num_heads, np.float32)
            for m in range(num_heads):
                totals[m] = _exponentiate(_array(weights.ctypes.data + 4 * m * stride, np.float32, kv_len), kv_len)
            for j in range(num_used):
                num_tokens = min(page_size, kv_len - j * page_size)
                page = (layer * num_pages + table[row * table_dims[1] + j]) * num_kv_heads * block
                following = table[row * table_dims[1] + min(j + 1, num_used - 1)]
                coming = (layer * num_pages + following) * num_kv_heads * block
                for k in range(num_kv_heads):
                    _prefetch(v_data + coming + k * block, block)
                    of_page = weights.ctypes.data + 4 * (k * group * stride + j * page_size)
                    sums = out_data + (row * num_kv_heads + k) * per_head
                    add(of_page, stride, v_data + page + k * block, num_tokens, sums)
            for m in range(num_heads):
                for d in range(head_dim):
                    acc[m * head_dim + d] /= totals[m]
        return 0

    return handler
