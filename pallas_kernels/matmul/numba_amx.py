"""How does a bfloat16 matrix product use a CPU's matrix unit (AMX)?  Tiles of 16 tokens and of 16 columns, 32 rows deep.

Two panels of 32 columns of the kernel, their rows in pairs, stay in the core's caches while 16 tokens at a time keep their sums of
the panels in four tiles; what later panels need is brought near meanwhile.  All left operands pass through one tile, all right
ones through another: the unit has eight, but renames few, and where a core's other thread has taken its half of them, products in
all eight wait for each other (twice as long as in these six).  A kernel that is not packed is packed on its way into a buffer.
One that lies transposed is its own left operand: then the tokens are the panels, and the tiles of sums are turned as they leave.
"""

import itertools
import typing

import jax.numpy as jnp
import llvmlite.ir
import numba
import numba.core.cgutils
import numba.extending
import numpy as np
from jaxtyping import Array, BFloat16

from pallas_kernels.matmul.numba_bfloat16 import pack_panel
from pallas_kernels.matmul.numba_float32 import turn_square
from pallas_kernels.matmul.numba_gated import gate_rows
from pallas_kernels.matmul.packed import AMX_DEPTH, GATED_COLUMNS, PANEL
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
    typing_context, left, left_stride, panel, panel_bytes, num_steps, out, out_stride, added, is_far, later, num_panels,
    num_lines, num_parts, part,
):  # fmt: skip
    """Sums of a block of rows with `num_panels` (1 or 2) packed panels, `panel_bytes` apart, 32 products at a time.

    left, out: addresses of the block and of its sums, of one panel after the other.
    added: address of what is added to the sums, laid out as the result, or 0.
    is_far: the panels are in no first cache: each step brings what the next one reads.
    later: in each step the next `num_lines` lines of 64 bytes from there on are brought near.
    num_parts: the left operand is the sum of so many, which lie `part` bytes apart.
    """
    constants = num_panels, num_parts
    if not all(isinstance(number, numba.types.IntegerLiteral) for number in constants):
        return None

    def generate(context, builder, signature, arguments):
        b = builder
        left, left_stride, panel, panel_bytes, num_steps, out, out_stride, added, is_far, later = arguments[:10]
        _, num_lines, _, part = arguments[10:]
        panels, parts = (range(number.literal_value) for number in constants)
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
            column, row = b.mul(loop.index, INT64(2 * DEPTH)), b.mul(loop.index, INT64(ROWS * 4 * PANEL))
            for i in parts:
                place = b.add(b.add(left, column), b.mul(part, INT64(i)))
                _emit(b, "tileloadd64", LEFT, b.inttoptr(place, BYTES), left_stride)
                for total, (p, half) in zip(sums, halves, strict=True):
                    place = b.add(starts[p], b.add(row, INT64(64 * half)))
                    _emit(b, "tileloadd64", RIGHT, b.inttoptr(place, BYTES), INT64(4 * PANEL))
                    _emit(b, "tdpbf16ps", total, LEFT, RIGHT)
            with b.if_then(b.icmp_signed("!=", is_far, INT64(0))):
                for p, line in itertools.product(panels, range(2 * ROWS)):
                    fetch_line(b, b.add(starts[p], b.add(row, INT64((2 * ROWS + line) * 64))), NEARER)
            first = b.add(later, b.mul(loop.index, b.mul(num_lines, INT64(64))))
            with numba.core.cgutils.for_range(b, num_lines) as line:
                fetch_line(b, b.add(first, b.mul(line.index, INT64(64))), NEAR)
        for i in sums:
            _emit(b, "tilestored64", i, b.inttoptr(b.add(out, INT64(64 * i)), BYTES), out_stride)
        return context.get_dummy_value()

    one = numba.types.int64
    return numba.types.void(*(one,) * 10, num_panels, one, num_parts, one), generate


@numba.njit(forceinline=True)
@typing.no_type_check
def _coming(panel, num_steps, lines_of_step, index, num_passes):
    """From where on pass `index` of `num_passes` brings a panel near, and how many lines of each step: a part of all."""
    lines = -(-lines_of_step // num_passes)
    return panel + 64 * num_steps * lines * index, max(min(lines, lines_of_step - lines * index), 0)


@typing.no_type_check
def make_work(sources, form):
    """The work on a kernel in a form ("plain", "packed", "gated"; see `packed.py`): for each panels, runs all tokens through them."""
    is_packed, is_gated = form != "plain", form == "gated"
    lines_of_step = PANELS * PANEL if is_packed else 0
    panel_out_bytes, column_bytes = (2 * GATED_COLUMNS, 2) if is_gated else (4 * PANEL, 4)

    @numba.cfunc(Work, error_model="numpy", cache=True)
    @typing.no_type_check
    def work(job_at, first, stop):
        job = array(job_at, np.int64, NUM_WORDS + 0 * sources)
        num_tokens, num_rows, width = job[NUM_TOKENS], job[NUM_ROWS], job[WIDTH]
        x_stride, out_stride, panel_bytes = 2 * width, column_bytes * job[NUM_COLUMNS], 2 * PANEL * width
        num_steps, rows = width // DEPTH, min(num_rows, ROWS)
        num_passes = -(-num_tokens // ROWS)
        buffer_ = np.empty((0 if is_packed else PANELS * width * PANEL) + 2 * ROWS * PANELS * PANEL + 32, np.int16)
        sums = (buffer_.ctypes.data + 63) // 64 * 64
        packed = sums + 4 * ROWS * PANELS * PANEL
        configure(sums, rows)
        for panel in range(first, stop, PANELS):
            has_two = panel + 1 < stop
            out = job[OUT] + panel_out_bytes * panel
            if is_packed:
                packed = job[KERNEL] + panel_bytes * panel
            elif num_tokens > 0:
                for p in range(2 if has_two else 1):
                    place = job[KERNEL] + 2 * PANEL * (panel + p)
                    pack_panel(place, 2 * job[NUM_COLUMNS], width // 2, packed + panel_bytes * p)
            ahead = packed + AHEAD * PANELS * panel_bytes
            for token in range(0, num_tokens, ROWS):
                # The last block begins where it ends with the array: tokens computed twice come out the same.
                row = min(token, num_rows - rows)
                x, here = job[X] + x_stride * row, out + out_stride * row
                target, stride = (sums, 4 * PANELS * PANEL) if is_gated else (here, out_stride)
                added = here + job[TO_ADDED] if job[TO_ADDED] != 0 else 0
                is_far = np.int64(is_packed and token == 0)
                later, lines = _coming(ahead, num_steps, lines_of_step, token // ROWS, num_passes)
                if has_two:
                    tiles(
                        x,
                        x_stride,
                        packed,
                        panel_bytes,
                        num_steps,
                        target,
                        stride,
                        added,
                        is_far,
                        later,
                        2,
                        lines,
                        1,
                        0,
                    )
                else:
                    tiles(
                        x,
                        x_stride,
                        packed,
                        panel_bytes,
                        num_steps,
                        target,
                        stride,
                        added,
                        is_far,
                        later,
                        1,
                        lines,
                        1,
                        0,
                    )
                if is_gated:
                    gate_rows(target, stride, rows, here, out_stride)
                    if has_two:
                        gate_rows(target + 4 * PANEL, stride, rows, here + panel_out_bytes, out_stride)
            clear_rows(out, out_stride, num_tokens, num_rows, panel_out_bytes * (2 if has_two else 1))
        release_tiles()
        buffer_[0] = 0  # numba frees an array after the last use of its name, whoever still uses its address

    return work


def pack_tokens(x: BFloat16[Array, "t c"]) -> BFloat16[Array, "padded c"]:
    """Tokens as `make_transposed_work` takes them: in panels of 32, each as pairs of values; zeros after the last."""
    width = x.shape[1]
    panels = jnp.pad(x, ((0, -x.shape[0] % PANEL), (0, 0))).reshape(-1, PANEL, width // 2, 2)
    return panels.swapaxes(1, 2).reshape(-1, width)


@typing.no_type_check
def make_transposed_work(sources):
    """The work on a kernel [f, c] and tokens that `pack_tokens` packed: for each panel of columns, runs all tokens through it."""

    @numba.cfunc(Work, error_model="numpy", cache=True)
    @typing.no_type_check
    def work(job_at, first, stop):
        job = array(job_at, np.int64, NUM_WORDS + 0 * sources)
        num_tokens, num_rows, width = job[NUM_TOKENS], job[NUM_ROWS], job[WIDTH]
        row_bytes, out_stride, num_steps = 2 * width, 4 * job[NUM_COLUMNS], width // DEPTH
        most = PANELS * PANEL
        num_passes = -(-num_tokens // most)
        buffer_ = np.empty(2 * PANEL * most + 16, np.float32)
        sums = (buffer_.ctypes.data + 63) // 64 * 64
        turned = sums + 4 * PANEL * most
        configure(sums, ROWS)
        for panel in range(first, stop):
            kernel, out = job[KERNEL] + PANEL * row_bytes * panel, job[OUT] + 4 * PANEL * panel
            ahead = kernel + AHEAD * PANEL * row_bytes
            for token in range(0, num_tokens, most):
                count = min(num_tokens - token, most)
                later, lines = _coming(ahead, 2 * num_steps, PANEL // 2, token // most, num_passes)
                tokens, panel_bytes = job[X] + token * row_bytes, PANEL * row_bytes
                for column in range(0, PANEL, ROWS):
                    left, to = kernel + column * row_bytes, sums + 4 * most * column
                    if count > PANEL:
                        tiles(
                            left, row_bytes, tokens, panel_bytes, num_steps, to, 4 * most, 0, 0, later, 2, lines, 1, 0
                        )
                    else:
                        tiles(
                            left, row_bytes, tokens, panel_bytes, num_steps, to, 4 * most, 0, 0, later, 1, lines, 1, 0
                        )
                    later += 64 * num_steps * lines
                    for row in range(0, count, ROWS):
                        turn_square(to + 4 * row, 4 * most, turned + 4 * (PANEL * row + column), 4)
                for row in range(count):
                    source = array(turned + 4 * PANEL * row, np.float32, PANEL)
                    target = array(out + out_stride * (token + row), np.float32, PANEL)
                    for column in range(PANEL):
                        target[column] = source[column]
            clear_rows(out, out_stride, num_tokens, num_rows, 4 * PANEL)
        release_tiles()
        buffer_[0] = 0

    return work
