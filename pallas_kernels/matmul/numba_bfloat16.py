"""How does a bfloat16 matrix product come near a CPU's peak, for a few tokens as for hundreds?

A panel of 32 columns of the kernel, its rows in pairs as AVX512-BF16 wants them, stays in the core's cache while up to 12 tokens at
a time keep all their sums of the panel in registers.  A kernel that is not packed is packed on its way into a buffer.
"""

import typing

import llvmlite.ir
import numba
import numba.core.cgutils
import numba.extending
import numpy as np

from pallas_kernels.matmul.numba_gated import gate_rows
from pallas_kernels.matmul.packed import GATED_COLUMNS, PANEL
from pallas_kernels.matmul.panels import (
    KERNEL,
    NUM_COLUMNS,
    NUM_ROWS,
    NUM_TOKENS,
    NUM_WORDS,
    OUT,
    TO_ADDED,
    WIDTH,
    X,
)
from pallas_kernels.numba_ffi import Work, array
from pallas_kernels.numba_memory import clear_rows, fetch_line, prefetch
from pallas_kernels.numba_vectors16 import (
    FLOATS,
    INT64,
    PAIRS,
    WORD,
    WORDS,
    address,
    constant,
    instruction,
    load,
    splat,
)

AHEAD = 2  # panels: with two threads the next panel of this one is the one after the next

MOST_TOKENS = 12  # at a time: 24 sums, 2 weights and 1 activation nearly fill the 32 registers

HALVES = llvmlite.ir.VectorType(llvmlite.ir.IntType(16), 32)


@numba.extending.intrinsic
@typing.no_type_check
def pack_pair(typing_context, source, next_source, target):
    """32 values of each of two rows, interleaved."""

    def generate(context, builder, signature, arguments):
        b = builder
        source, next_source, target = arguments
        one, two = (b.load(address(b, row, 0, HALVES), align=2) for row in (source, next_source))
        index = llvmlite.ir.VectorType(WORD, 32)
        for half in range(2):
            order = [column + 32 * row for column in range(16 * half, 16 * half + 16) for row in range(2)]
            b.store(b.shuffle_vector(one, two, index(order)), address(b, target, 64 * half, HALVES), align=64)
        return context.get_dummy_value()

    return numba.types.void(*(numba.types.int64,) * 3), generate


@numba.extending.intrinsic(prefer_literal=True)
@typing.no_type_check
def _tile(typing_context, x, x_stride, panel, num_pairs, out, out_stride, to_added, later, num_tokens):
    """Products of `num_tokens` (a constant) tokens with one packed panel of `num_pairs` pairs of rows.

    to_added: bytes from a result to what is added to it, or 0 for nothing.
    later: meanwhile half as many bytes as the panel has are brought near from there on.
    """
    count = num_tokens
    if not isinstance(count, numba.types.IntegerLiteral):
        return None

    def generate(context, builder, signature, arguments):
        b = builder
        x, x_stride, panel, num_pairs, out, out_stride, to_added, later = arguments[:8]
        num_tokens = count.literal_value
        sums = {}
        for m in range(num_tokens):
            for half in range(2):
                sums[m, half] = numba.core.cgutils.alloca_once(b, FLOATS)
                b.store(constant(0), sums[m, half])
        tokens = [b.add(x, b.mul(x_stride, INT64(m))) for m in range(num_tokens)]
        with numba.core.cgutils.for_range(b, num_pairs) as loop:
            row = b.add(panel, b.mul(loop.index, INT64(128)))
            weights = [b.bitcast(b.load(address(b, row, 64 * half, HALVES), align=64), PAIRS) for half in range(2)]
            fetch_line(b, b.add(later, b.mul(loop.index, INT64(64))))
            place = b.mul(loop.index, INT64(4))
            for m in range(num_tokens):
                pair = b.load(address(b, tokens[m], place, WORD), align=2)
                both = b.bitcast(splat(b, pair, WORDS), PAIRS)
                for half in range(2):
                    total = instruction(b, "avx512bf16.dpbf16ps", b.load(sums[m, half]), both, weights[half])
                    b.store(total, sums[m, half])
        places = {at: b.add(b.mul(out_stride, INT64(at[0])), INT64(64 * at[1])) for at in sums}
        with b.if_then(b.icmp_signed("!=", to_added, INT64(0))):
            for at, place in places.items():
                b.store(b.fadd(load(b, b.add(out, to_added), place), b.load(sums[at])), sums[at])
        for at, place in places.items():
            b.store(b.load(sums[at]), address(b, out, place, FLOATS), align=4)
        return context.get_dummy_value()

    return numba.types.void(*(numba.types.int64,) * 8, count), generate


@numba.njit(forceinline=True)
@typing.no_type_check
def pack_panel(source, row_bytes, num_pairs, packed):
    """Interleaves the pairs of rows of the panel at `source` in the buffer at `packed`."""
    for k in range(0, 2 * num_pairs, 2):
        prefetch(source + k * row_bytes + AHEAD * 2 * PANEL, 64)
        prefetch(source + (k + 1) * row_bytes + AHEAD * 2 * PANEL, 64)
        pack_pair(source + k * row_bytes, source + (k + 1) * row_bytes, packed + k * 2 * PANEL)


@typing.no_type_check
def make_work(sources, form):
    """The work on a kernel in a form ("plain", "packed", "gated"; see `packed.py`): for each panel, runs all tokens through it."""
    is_packed, is_gated = form != "plain", form == "gated"
    panel_out_bytes, column_bytes = (2 * GATED_COLUMNS, 2) if is_gated else (4 * PANEL, 4)

    @numba.cfunc(Work, error_model="numpy", cache=True)
    @typing.no_type_check
    def work(job_at, first, stop):
        job = array(job_at, np.int64, NUM_WORDS + 0 * sources)
        num_tokens, num_pairs, out_stride = job[NUM_TOKENS], job[WIDTH] // 2, column_bytes * job[NUM_COLUMNS]
        x_stride, panel_bytes, to_added = 4 * num_pairs, 4 * PANEL * num_pairs, job[TO_ADDED]
        buffer_ = np.empty((0 if is_packed else num_pairs * 2 * PANEL) + 2 * MOST_TOKENS * PANEL + 32, np.int16)
        sums = (buffer_.ctypes.data + 63) // 64 * 64
        packed = sums + 4 * MOST_TOKENS * PANEL
        for panel in range(first, stop):
            out = job[OUT] + panel_out_bytes * panel
            clear_rows(out, out_stride, num_tokens, job[NUM_ROWS], panel_out_bytes)
            if is_packed:
                packed = job[KERNEL] + panel_bytes * panel
            else:
                pack_panel(job[KERNEL] + 2 * PANEL * panel, 2 * job[NUM_COLUMNS], num_pairs, packed)
            token = 0
            while token < num_tokens:
                left = num_tokens - token
                x, here = job[X] + x_stride * token, out + out_stride * token
                target, stride = (sums, 4 * PANEL) if is_gated else (here, out_stride)
                # What a later panel needs: a half in the first pass, the other in those that follow.
                later = packed + panel_bytes * AHEAD + panel_bytes // 2 * min(token, 1) if is_packed else packed
                if left >= MOST_TOKENS and left != 16:
                    count = MOST_TOKENS
                    _tile(x, x_stride, packed, num_pairs, target, stride, to_added, later, MOST_TOKENS)
                elif left >= 8:
                    count = 8
                    _tile(x, x_stride, packed, num_pairs, target, stride, to_added, later, 8)
                elif left >= 4:
                    count = 4
                    _tile(x, x_stride, packed, num_pairs, target, stride, to_added, later, 4)
                elif left >= 2:
                    count = 2
                    _tile(x, x_stride, packed, num_pairs, target, stride, to_added, later, 2)
                else:
                    count = 1
                    _tile(x, x_stride, packed, num_pairs, target, stride, to_added, later, 1)
                if is_gated:
                    gate_rows(target, stride, count, here, out_stride)
                token += count
        buffer_[0] = 0  # numba frees an array after the last use of its name, whoever still uses its address

    return work
