"""How does a bfloat16 matrix product use a CPU's matrix unit (AMX)?  Tiles of 16 tokens and of 16 columns, 32 rows deep.

Two panels of 32 columns of the kernel, their rows in pairs, stay in the core's caches while 16 tokens at a time keep their sums of
the panels in four tiles; what later panels need is brought near meanwhile.  All left operands pass through one tile, all right
ones through another: the unit has eight, but renames few, and where a core's other thread has taken its half of them, products in
all eight wait for each other (twice as long as in these six).  A kernel that is not packed is packed on its way into a buffer.
"""

import itertools
import typing

import llvmlite.ir
import numba
import numba.core.cgutils
import numba.extending
import numpy as np

from pallas_kernels.matmul.numba_bfloat16 import pack_panel
from pallas_kernels.matmul.numba_blocks import emit_expand, expand
from pallas_kernels.matmul.numba_gated import gate_rows
from pallas_kernels.matmul.packed import AMX_DEPTH, GATED_COLUMNS, PANEL, block_bytes
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
from pallas_kernels.numba_ffi import Work, array, clear_rows, fetch_line
from pallas_kernels.numba_vectors16 import INT64

ROWS = 16
"""Rows of a tile: tokens of a left operand, pairs of rows of a right one."""
DEPTH = AMX_DEPTH
STEP_BYTES = 2 * DEPTH * PANEL
"""Of a panel's part that one step multiplies."""
KEPT_STEPS = 4
AHEAD = 2  # turns: with two threads the next turn of this one is the one after the next
NEAR, NEARER = 2, 3  # the core's second cache, its first

BYTE = llvmlite.ir.IntType(8)
BYTES = BYTE.as_pointer()
SUMS, LEFT, RIGHT = (0, 1, 2, 3), 4, 5  # tiles
PANELS = 2  # at a time


def _emit(b, name, *arguments):
    """Calls an intrinsic of AMX: small integers name tiles, all else is a pointer or a stride."""
    values = [BYTE(a) if isinstance(a, int) else a for a in arguments]
    function_type = llvmlite.ir.FunctionType(llvmlite.ir.VoidType(), [value.type for value in values])
    name = f"llvm.x86.{name}"
    b.call(b.module.globals.get(name) or llvmlite.ir.Function(b.module, function_type, name), values)


@numba.extending.intrinsic
@typing.no_type_check
def _set_tiles(typing_context, config):
    """Takes the tiles' shapes from the 64 bytes at an int64 address."""

    def generate(context, builder, signature, arguments):
        _emit(builder, "ldtilecfg", builder.inttoptr(arguments[0], BYTES))
        return context.get_dummy_value()

    return numba.types.void(numba.types.int64), generate


@numba.extending.intrinsic
@typing.no_type_check
def release_tiles(typing_context):
    """Gives the tiles back, so that a switch of threads need not save them."""

    def generate(context, builder, signature, arguments):
        _emit(builder, "tilerelease")
        return context.get_dummy_value()

    return numba.types.void(), generate


@numba.njit(forceinline=True)
@typing.no_type_check
def configure(at, num_rows):
    """Gives tiles of sums and left operands `num_rows` rows, those of right operands 16; rows of 64 bytes."""
    palette, columns, rows = array(at, np.int64, 8), array(at + 16, np.uint16, 8), array(at + 48, np.uint8, 8)
    for i in range(8):
        palette[i] = 0
    palette[0] = 1
    for tile in range(8):
        columns[tile] = 64
        rows[tile] = num_rows if tile < RIGHT else ROWS
    _set_tiles(at)


@numba.extending.intrinsic(prefer_literal=True)
@typing.no_type_check
def tiles(
    typing_context, left, panel, num_steps, out, added, is_far, later, num_panels, num_parts, part, codes, mask, num_bits
):  # fmt: skip
    """Sums of a block of rows with `num_panels` (1 or 2) packed panels, 32 products at a time.

    left, out: the address of the block, or of its sums with one panel after the other, and the bytes from row to row.
    panel: the first one's address, and the bytes to the next.
    added: address of what is added to the sums, laid out as they are, or 0.
    is_far: the panels are in no first cache: each step brings what the next one reads.
    later: in each step the next so many (the second number) lines of 64 bytes from there on are brought near.
    num_parts: the left operand is the sum of so many (a constant), which lie `part` bytes apart.
    num_bits: if not 0, the panels' first blocks are expanded (`numba_blocks`), and each step expands the next ones from
      `codes`, as `panel` of the packed; `mask` wraps the bytes of a panel that are kept.
    """
    constants = num_panels, num_parts, num_bits
    if not all(isinstance(number, numba.types.IntegerLiteral) for number in constants):
        return None

    def generate(context, builder, signature, arguments):
        b = builder
        left, panel, num_steps, out, added, is_far, later, _, _, part, codes, mask, _ = arguments
        pairs = left, panel, out, later, codes
        (left, left_stride), (panel, panel_bytes), (out, out_stride), (later, num_lines), (codes, codes_bytes) = (
            numba.core.cgutils.unpack_tuple(b, pair) for pair in pairs
        )
        count, parts, bits = (number.literal_value for number in constants)
        panels = range(count)
        halves = [(p, half) for p in panels for half in range(2)]
        sums = SUMS[: len(halves)]
        with b.if_else(b.icmp_signed("!=", added, INT64(0))) as (has_added, has_none):
            with has_added:
                for i in sums:
                    _emit(b, "tileloadd64", i, b.inttoptr(b.add(added, INT64(64 * i)), BYTES), out_stride)
            with has_none:
                for i in sums:
                    _emit(b, "tilezero", i)
        starts = [b.add(panel, b.mul(panel_bytes, INT64(p))) for p in panels]
        with numba.core.cgutils.for_range(b, num_steps) as loop:
            column, row = b.mul(loop.index, INT64(2 * DEPTH)), b.and_(b.mul(loop.index, INT64(STEP_BYTES)), mask)
            for i in range(parts):
                place = b.add(b.add(left, column), b.mul(part, INT64(i)))
                _emit(b, "tileloadd64", LEFT, b.inttoptr(place, BYTES), left_stride)
                for total, (p, half) in zip(sums, halves, strict=True):
                    place = b.add(starts[p], b.add(row, INT64(64 * half)))
                    _emit(b, "tileloadd64", RIGHT, b.inttoptr(place, BYTES), INT64(4 * PANEL))
                    _emit(b, "tdpbf16ps", total, LEFT, RIGHT)
            with b.if_then(b.icmp_signed("!=", is_far, INT64(0))):
                for p, line in itertools.product(panels, range(STEP_BYTES // 64)):
                    fetch_line(b, b.add(starts[p], b.add(row, INT64(STEP_BYTES + 64 * line))), NEARER)
            first = b.add(later, b.mul(loop.index, b.mul(num_lines, INT64(64))))
            with numba.core.cgutils.for_range(b, num_lines) as line:
                fetch_line(b, b.add(first, b.mul(line.index, INT64(64))), NEAR)
            if bits:
                index = b.add(loop.index, INT64(1))
                with b.if_then(b.icmp_signed("<", index, num_steps)):
                    for p in panels:
                        block = b.add(b.mul(codes_bytes, INT64(p)), b.mul(index, INT64(block_bytes(bits))))
                        to = b.add(starts[p], b.and_(b.mul(index, INT64(STEP_BYTES)), mask))
                        emit_expand(b, b.add(codes, block), to, bits)
        for i in sums:
            _emit(b, "tilestored64", i, b.inttoptr(b.add(out, INT64(64 * i)), BYTES), out_stride)
        return context.get_dummy_value()

    one, pair = numba.types.int64, numba.types.UniTuple(numba.types.int64, 2)
    return numba.types.void(
        pair, pair, one, pair, one, one, pair, num_panels, num_parts, one, pair, one, num_bits
    ), generate


@numba.njit(forceinline=True)
@typing.no_type_check
def _coming(panel, num_steps, lines_of_step, index, num_passes):
    """From where on pass `index` of `num_passes` brings a panel near, and how many lines of each step: a part of all."""
    lines = -(-lines_of_step // num_passes)
    return panel + 64 * num_steps * lines * index, max(min(lines, lines_of_step - lines * index), 0)


@typing.no_type_check
def make_work(sources, form, num_bits):
    """The work on a kernel in a form ("plain", "packed", "gated"; see `packed.py`): runs all tokens through two panels at a time.

    num_bits: of a weight, 0 for bfloat16.  The first tokens expand a panel's blocks as they go.
    """
    is_packed, is_gated, is_coded = form != "plain", form == "gated", num_bits != 0
    step_bytes = block_bytes(num_bits) if is_coded else STEP_BYTES
    lines_of_step = PANELS * step_bytes // 64 if is_packed else 0
    panel_out_bytes, column_bytes = (2 * GATED_COLUMNS, 2) if is_gated else (4 * PANEL, 4)

    @numba.cfunc(Work, error_model="numpy", cache=True)
    @typing.no_type_check
    def work(job_at, first, stop):
        job = array(job_at, np.int64, NUM_WORDS + 0 * sources)
        num_tokens, num_rows, width = job[NUM_TOKENS], job[NUM_ROWS], job[WIDTH]
        num_steps, rows = width // DEPTH, min(num_rows, ROWS)
        x_stride, out_stride, source_bytes = 2 * width, column_bytes * job[NUM_COLUMNS], step_bytes * num_steps
        panel_bytes = STEP_BYTES * num_steps
        num_passes = -(-num_tokens // ROWS)
        # What only one pass reads is kept for a few steps.
        mask = np.int64(KEPT_STEPS * STEP_BYTES - 1 if is_coded and num_passes == 1 else -1)
        held_bytes = 0 if is_packed and not is_coded else PANELS * max(panel_bytes, KEPT_STEPS * STEP_BYTES)
        buffer_ = np.empty(held_bytes + 4 * ROWS * PANELS * PANEL + 64, np.uint8)
        sums = (buffer_.ctypes.data + 63) // 64 * 64
        packed = sums + 4 * ROWS * PANELS * PANEL
        configure(sums, rows)
        for panel in range(first, stop if num_tokens > 0 else first, PANELS):
            has_two = panel + 1 < stop
            out, source = job[OUT] + panel_out_bytes * panel, job[KERNEL] + source_bytes * panel
            if is_coded:
                for p in range(2 if has_two else 1):
                    expand(source + source_bytes * p, 1 if has_two else num_steps, packed + panel_bytes * p, num_bits)
            elif is_packed:
                packed = source
            else:
                for p in range(2 if has_two else 1):
                    place = job[KERNEL] + 2 * PANEL * (panel + p)
                    pack_panel(place, 2 * job[NUM_COLUMNS], width // 2, packed + panel_bytes * p)
            right, codes, ahead = (packed, panel_bytes), (source, source_bytes), source + AHEAD * PANELS * source_bytes
            for token in range(0, num_tokens, ROWS):
                # The last block begins where it ends with the array: tokens computed twice come out the same.
                row = min(token, num_rows - rows)
                left, here = (job[X] + x_stride * row, x_stride), out + out_stride * row
                target = (sums, 4 * PANELS * PANEL) if is_gated else (here, out_stride)
                added = here + job[TO_ADDED] if job[TO_ADDED] != 0 else 0
                is_far = np.int64(is_packed and not is_coded and token == 0)
                later = _coming(ahead, num_steps, lines_of_step, token // ROWS, num_passes)
                if not has_two:
                    tiles(left, right, num_steps, target, added, is_far, later, 1, 1, 0, codes, -1, 0)
                elif is_coded and token == 0:
                    tiles(left, right, num_steps, target, added, is_far, later, 2, 1, 0, codes, mask, num_bits)
                else:
                    tiles(left, right, num_steps, target, added, is_far, later, 2, 1, 0, codes, mask, 0)
                if is_gated:
                    gate_rows(*target, rows, here, out_stride)
                    if has_two:
                        gate_rows(target[0] + 4 * PANEL, target[1], rows, here + panel_out_bytes, out_stride)
        release_tiles()
        clear_rows(
            job[OUT] + panel_out_bytes * first, out_stride, num_tokens, num_rows, panel_out_bytes * (stop - first)
        )
        buffer_[0] = 0  # numba frees an array after the last use of its name, whoever still uses its address

    return work
