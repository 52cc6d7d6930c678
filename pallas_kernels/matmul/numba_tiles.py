"""How does a CPU's matrix unit (AMX) add up products in bfloat16?  In tiles of 16 rows of 64 bytes: 32 products deep.

Four tiles hold sums.  Two blocks of 16 rows meet one panel of 32 columns of the right operand, so that what a loop of many rows
keeps in the core's first cache is that panel and no more: the blocks come past it, by loads that do not drive it out.  One block
alone meets two panels.  All right operands pass through one tile: the unit has eight, but renames few, and where a core's other
thread has taken its half of them, products in all eight wait for each other (a third more than in these seven).  While a product
waits, work on vectors is done: weights are expanded, earlier sums are gated.
"""

import itertools
import typing

import llvmlite.ir
import numba
import numba.core.cgutils
import numba.extending
import numpy as np

from pallas_kernels.matmul.numba_blocks import PIECES, emit_all, emit_expand
from pallas_kernels.matmul.numba_gated import emit_gate
from pallas_kernels.matmul.packed import AMX_DEPTH, PANEL, block_bytes
from pallas_kernels.numba_ffi import array
from pallas_kernels.numba_memory import NEAR, NEARER, fetch_line
from pallas_kernels.numba_vectors16 import INT64

ROWS = 16
"""Rows of a tile: of a block of the left operand, pairs of rows of a right one."""
DEPTH = AMX_DEPTH
STEP_BYTES = 2 * DEPTH * PANEL
"""Of a panel's part that one step multiplies."""

BYTE = llvmlite.ir.IntType(8)
BYTES = BYTE.as_pointer()
LEFT, RIGHT = (4, 5), 6  # tiles, after those of sums


def emit_tile(b, name, *arguments):
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
        emit_tile(builder, "ldtilecfg", builder.inttoptr(arguments[0], BYTES))
        return context.get_dummy_value()

    return numba.types.void(numba.types.int64), generate


@numba.extending.intrinsic
@typing.no_type_check
def release_tiles(typing_context):
    """Gives the tiles back, so that a switch of threads need not save them."""

    def generate(context, builder, signature, arguments):
        emit_tile(builder, "tilerelease")
        return context.get_dummy_value()

    return numba.types.void(), generate


@numba.njit(forceinline=True)
@typing.no_type_check
def configure(at, num_rows, num_columns):
    """Gives tiles of sums and left operands `num_rows` rows and tiles of sums and right operands `num_columns` columns."""
    palette, columns, rows = array(at, np.int64, 8), array(at + 16, np.uint16, 8), array(at + 48, np.uint8, 8)
    for i in range(8):
        palette[i] = 0
    palette[0] = 1
    for tile in range(RIGHT + 1):
        columns[tile] = 64 if tile in LEFT else 4 * num_columns
        rows[tile] = num_rows if tile < RIGHT else ROWS
    _set_tiles(at)


@numba.extending.intrinsic(prefer_literal=True)
@typing.no_type_check
def tiles(typing_context, operands, num_blocks, num_panels, num_parts, num_bits, is_gating):
    """Sums of one or two blocks of rows with one or two packed panels, 32 products at a time.

    operands: a tuple, int64 all, of
      left: of the blocks: the first one's address, the bytes from row to row and the bytes to the next block;
      panel: the first one's address, and the bytes to the next;
      num_steps: how many times 32 products;
      out, added: as `left`, of the sums with one panel after the other, and of what is added to them, unless that address is 0;
      is_far: the panels are in no first cache: each step brings what the next one reads;
      later: in each step the next so many (the second number) lines of 64 bytes from there on are brought near;
      part: bytes from a part of the left operand to the next;
      codes, mask: what is expanded, as `panel` of the packed; and what wraps the bytes of a panel that are kept;
      gated, num_gated: where so many rows of each of two blocks' sums lie, block after block, row after row; and three numbers
        that say where they go gated, as `out` does.

    The others are constants:
    num_blocks, num_panels: 1 and 1, 1 and 2, or 2 and 1.
    num_parts: the left operand is the sum of so many.
    num_bits: if not 0, the panels' first parts are expanded (`numba_blocks`), and each step expands the next ones.
    is_gating: 1 if earlier sums are gated meanwhile (`numba_gated`).
    """
    constants = num_blocks, num_panels, num_parts, num_bits, is_gating
    if not all(isinstance(number, numba.types.IntegerLiteral) for number in constants):
        return None

    def generate(context, builder, signature, arguments):
        b = builder
        left, panel, num_steps, out, added, is_far, later, part, codes, mask, gated, num_gated = (
            numba.core.cgutils.unpack_tuple(b, arguments[0])
        )
        left, left_stride, next_left = numba.core.cgutils.unpack_tuple(b, left)
        pairs = (numba.core.cgutils.unpack_tuple(b, pair) for pair in (panel, later, codes))
        (panel, panel_bytes), (later, num_lines), (codes, codes_bytes) = pairs
        block_count, panel_count, parts, bits, gates = (number.literal_value for number in constants)
        blocks, panels = range(block_count), range(panel_count)
        halves = list(itertools.product(panels, range(2)))
        load_left = "tileloadd64" if block_count == 1 else "tileloaddt164"

        def sums(place):
            """Each tile of sums, its address, and the bytes from row to row."""
            start, stride, next_block = numba.core.cgutils.unpack_tuple(b, place)
            for tile, (block, half) in enumerate(itertools.product(blocks, range(len(halves)))):
                at = b.add(start, b.add(b.mul(next_block, INT64(block)), INT64(64 * half)))
                yield tile, b.inttoptr(at, BYTES), stride

        def gate(index):
            """Emits the gating of one row of each of the two blocks, a row at a time."""
            source, to, stride, next_block = numba.core.cgutils.unpack_tuple(b, gated)
            for block in range(2):
                with b.if_then(b.icmp_signed("<", index, num_gated)):
                    row = b.add(source, b.add(b.mul(index, INT64(4 * PANEL)), INT64(4 * PANEL * ROWS * block)))
                    emit_gate(b, row, b.add(to, b.add(b.mul(index, stride), b.mul(next_block, INT64(block)))))
                yield

        def expand(index):
            """Emits the expansion of the panels' parts of a step, piece by piece."""
            for p in panels:
                block = b.add(b.mul(codes_bytes, INT64(p)), b.mul(index, INT64(block_bytes(bits))))
                to = b.add(starts[p], b.and_(b.mul(index, INT64(STEP_BYTES)), mask))
                yield from emit_expand(b, b.add(codes, block), to, bits)

        with b.if_else(b.icmp_signed("!=", b.extract_value(added, 0), INT64(0))) as (has_added, has_none):
            with has_added:
                for tile, at, stride in sums(added):
                    emit_tile(b, "tileloadd64", tile, at, stride)
            with has_none:
                for tile in range(block_count * len(halves)):
                    emit_tile(b, "tilezero", tile)
        starts = [b.add(panel, b.mul(panel_bytes, INT64(p))) for p in panels]
        with numba.core.cgutils.for_range(b, num_steps) as loop:
            column, row = b.mul(loop.index, INT64(2 * DEPTH)), b.and_(b.mul(loop.index, INT64(STEP_BYTES)), mask)
            following = b.add(loop.index, INT64(1))
            has_following = b.icmp_signed("<", following, num_steps)
            if block_count == 2:  # after the last step it expands what is there already: no branch
                following = b.select(has_following, following, loop.index)
            expanding, gating = expand(following) if bits else iter(()), gate(loop.index) if gates else iter(())
            meanwhile = itertools.chain(expanding, gating)
            num_pieces = (PIECES if bits else 0) + (2 if gates else 0)
            # One block alone has little to multiply: it would wait for what is expanded.
            num_between = -(-num_pieces // (4 * parts)) if block_count == 2 else 0
            for i in range(parts):
                place = b.add(b.add(left, column), b.mul(part, INT64(i)))
                for block in blocks:
                    at = b.add(place, b.mul(next_left, INT64(block)))
                    emit_tile(b, load_left, LEFT[block], b.inttoptr(at, BYTES), left_stride)
                for h, (p, half) in enumerate(halves):
                    place = b.add(starts[p], b.add(row, INT64(64 * half)))
                    emit_tile(b, "tileloadd64", RIGHT, b.inttoptr(place, BYTES), INT64(4 * PANEL))
                    for block in blocks:
                        emit_tile(b, "tdpbf16ps", block * len(halves) + h, LEFT[block], RIGHT)
                        emit_all(itertools.islice(meanwhile, num_between))
            with b.if_then(has_following):
                emit_all(expanding)
            emit_all(gating)
            with b.if_then(b.icmp_signed("<", loop.index, INT64(ROWS))):
                for _, at, stride in sums(out):
                    fetch_line(b, b.add(b.ptrtoint(at, INT64), b.mul(loop.index, stride)), NEARER, is_written=True)
            with b.if_then(b.icmp_signed("!=", is_far, INT64(0))):
                for p, line in itertools.product(panels, range(STEP_BYTES // 64)):
                    fetch_line(b, b.add(starts[p], b.add(row, INT64(STEP_BYTES + 64 * line))), NEARER)
            first = b.add(later, b.mul(loop.index, b.mul(num_lines, INT64(64))))
            with numba.core.cgutils.for_range(b, num_lines) as line:
                fetch_line(b, b.add(first, b.mul(line.index, INT64(64))), NEAR)
        if gates:
            with numba.core.cgutils.for_range_slice(b, num_steps, num_gated, INT64(1), inc=True) as (index, _):
                emit_all(gate(index))
        for tile, at, stride in sums(out):
            emit_tile(b, "tilestored64", tile, at, stride)
        return context.get_dummy_value()

    return numba.types.void(operands, *constants), generate
