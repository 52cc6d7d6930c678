"""How does a matrix product in float32 arithmetic come near a CPU's peak, for a few tokens as for hundreds?

A weight panel of 32 columns is copied into a buffer that stays in the core's cache; then a tile of tokens at a time keeps all
its sums in registers: 6 tokens by 16 columns with AVX2, 12 by 32 with AVX-512.  A kernel that lies transposed, as a table of
embeddings does, is turned on its way into the buffer, in squares of one vector's width; one of bfloat16 is widened there.
"""

import itertools
import typing

import llvmlite.ir
import numba
import numba.core.cgutils
import numba.extending
import numpy as np

from pallas_kernels.matmul.packed import PANEL
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
from pallas_kernels.numba_memory import LANES, clear_rows, fetch_line
from pallas_kernels.numba_vectors16 import INT64, WORD, address

ROWS = 12 if LANES == 16 else 6  # tokens of a tile: 24 of 32 registers hold sums, or 12 of 16
TILE = 2 * LANES  # columns of a tile
AHEAD = 2  # panels: with two threads the next panel of this one is the one after the next

FLOAT = llvmlite.ir.FloatType()
LANE = llvmlite.ir.VectorType(FLOAT, LANES)
LANE_BYTES = 4 * LANES


def _load(b, address_, element_bytes):
    """LANES values of float32, or of bfloat16 and widened, from an int64 address."""
    if element_bytes == 4:
        return b.load(address(b, address_, 0, LANE), align=4)
    bits = b.load(address(b, address_, 0, llvmlite.ir.VectorType(llvmlite.ir.IntType(16), LANES)), align=2)
    words = llvmlite.ir.VectorType(WORD, LANES)
    return b.bitcast(b.shl(b.zext(bits, words), words([16] * LANES)), LANE)


@numba.extending.intrinsic(prefer_literal=True)
@typing.no_type_check
def _copy_row(typing_context, source, target, target_stride, element_bytes):
    """PANEL values, those of each tile `target_stride` bytes after those of the one before."""
    size = element_bytes
    if not isinstance(size, numba.types.IntegerLiteral):
        return None

    def generate(context, builder, signature, arguments):
        b = builder
        source, target, stride = arguments[:3]
        for vector in range(PANEL // LANES):
            tile, half = divmod(vector, 2)
            value = _load(b, b.add(source, INT64(vector * LANES * size.literal_value)), size.literal_value)
            to = b.add(target, b.mul(stride, INT64(tile)))
            b.store(value, address(b, to, half * LANE_BYTES, LANE), align=LANE_BYTES)
        return context.get_dummy_value()

    return numba.types.void(*(numba.types.int64,) * 3, size), generate


@numba.extending.intrinsic(prefer_literal=True)
@typing.no_type_check
def turn_square(typing_context, source, source_stride, target, element_bytes):
    """LANES rows of LANES values, `source_stride` bytes apart, to as many half rows of a tile: row i, column j to row j, column i."""
    size = element_bytes
    if not isinstance(size, numba.types.IntegerLiteral):
        return None

    def generate(context, builder, signature, arguments):
        b = builder
        source, stride, target = arguments[:3]
        rows = [_load(b, b.add(source, b.mul(stride, INT64(i))), size.literal_value) for i in range(LANES)]
        index = llvmlite.ir.VectorType(WORD, LANES)
        low = [lane // 2 + LANES * (lane % 2) for lane in range(LANES)]  # two vectors' lower halves, interleaved
        high = [lane + LANES // 2 for lane in low]
        for _ in range(LANES.bit_length() - 1):
            pairs = [(rows[i], rows[i + LANES // 2]) for i in range(LANES // 2)]
            rows = [b.shuffle_vector(*pair, index(order)) for pair in pairs for order in (low, high)]
        for i, row in enumerate(rows):
            b.store(row, address(b, target, 2 * LANE_BYTES * i, LANE), align=LANE_BYTES)
        return context.get_dummy_value()

    return numba.types.void(*(numba.types.int64,) * 3, size), generate


@numba.extending.intrinsic(prefer_literal=True)
@typing.no_type_check
def _tiles(typing_context, x, out, to_added, packed, width, later, element_bytes, num_tokens):
    """Products of `num_tokens` (a constant) tokens, whose activations stay near meanwhile, with the tiles of a packed panel.

    x, out: address and stride of the tokens' activations and results.
    to_added: bytes from a result to what is added to it, or 0 for nothing.
    later: what is brought near meanwhile, PANEL elements a row: address, stride, and rows per packed row in 65536ths.
    """
    count, size = num_tokens, element_bytes
    if not isinstance(count, numba.types.IntegerLiteral) or not isinstance(size, numba.types.IntegerLiteral):
        return None
    lines_per_row = PANEL * size.literal_value // 64
    lines_per_tile = max(lines_per_row * TILE // PANEL, 1)

    def generate(context, builder, signature, arguments):
        b = builder
        to_added, packed, width = arguments[2:5]
        (x, x_stride), (out, out_stride), (later, later_stride, pace) = (
            numba.core.cgutils.unpack_tuple(b, arguments[i]) for i in (0, 1, 5)
        )
        tokens = [b.add(x, b.mul(x_stride, INT64(m))) for m in range(count.literal_value)]
        with numba.core.cgutils.for_range(b, INT64(PANEL // TILE)) as loop:
            weights = b.add(packed, b.mul(loop.index, b.mul(width, INT64(4 * TILE))))
            to = b.add(out, b.mul(loop.index, INT64(4 * TILE)))
            line = b.mul(loop.index, INT64(64 * (lines_per_row - lines_per_tile)))
            ahead = b.add(later, line), later_stride, pace
            _tile(b, tokens, weights, width, to, out_stride, to_added, ahead, lines_per_tile)
        return context.get_dummy_value()

    one, pair, triple = numba.types.int64, *(numba.types.UniTuple(numba.types.int64, n) for n in (2, 3))
    return numba.types.void(pair, pair, one, one, one, triple, size, count), generate


def _tile(b, tokens, packed, width, out, out_stride, to_added, later, num_lines):
    """Products of the activations at the addresses `tokens` with one packed tile of `width` rows.

    to_added, later: as in `_tiles`; of each row `num_lines` lines of 64 bytes are brought near.
    """
    later, later_stride, pace = later
    name, fma_type = f"llvm.fma.v{LANES}f32", llvmlite.ir.FunctionType(LANE, (LANE,) * 3)
    fma = b.module.globals.get(name) or llvmlite.ir.Function(b.module, fma_type, name)
    sums = [[numba.core.cgutils.alloca_once(b, LANE) for _ in range(2)] for _ in tokens]
    for place in itertools.chain(*sums):
        b.store(llvmlite.ir.Constant(LANE, [0.0] * LANES), place)
    with numba.core.cgutils.for_range(b, width) as loop:
        row = b.add(packed, b.mul(loop.index, INT64(4 * TILE)))
        weights = [b.load(address(b, row, half * LANE_BYTES, LANE), align=LANE_BYTES) for half in range(2)]
        offset = b.mul(loop.index, INT64(4))
        fetched_row = b.add(later, b.mul(b.lshr(b.mul(loop.index, pace), INT64(16)), later_stride))
        for line in range(num_lines):
            fetch_line(b, b.add(fetched_row, INT64(64 * line)))
        for token, places in zip(tokens, sums, strict=True):
            one = b.load(address(b, token, offset, FLOAT), align=4)
            first = b.insert_element(llvmlite.ir.Constant(LANE, llvmlite.ir.Undefined), one, WORD(0))
            activation = b.shuffle_vector(first, first, llvmlite.ir.VectorType(WORD, LANES)([0] * LANES))
            for weight, place in zip(weights, places, strict=True):
                b.store(b.call(fma, (activation, weight, b.load(place))), place)
    results = {
        place: b.add(out, b.add(b.mul(out_stride, INT64(m)), INT64(half * LANE_BYTES)))
        for m, places in enumerate(sums) for half, place in enumerate(places)
    }  # fmt: skip
    with b.if_then(b.icmp_signed("!=", to_added, INT64(0))):
        for place, result in results.items():
            added = b.load(address(b, b.add(result, to_added), 0, LANE), align=4)
            b.store(b.fadd(added, b.load(place)), place)
    for place, result in results.items():
        b.store(b.load(place), address(b, result, 0, LANE), align=4)


@typing.no_type_check
def make_work(sources, element_bytes, is_transposed):
    """The work on kernels of float32 (4 bytes) or bfloat16 (2): for each panel, packs it, then runs all tokens through it, while memory brings a later panel near."""

    @numba.cfunc(Work, error_model="numpy", cache=True)
    @typing.no_type_check
    def work(job_at, first, stop):
        job = array(job_at, np.int64, NUM_WORDS + 0 * sources)
        x, kernel, to_added, num_tokens, width = job[X], job[KERNEL], job[TO_ADDED], job[NUM_TOKENS], job[WIDTH]
        x_stride, out_stride, tile_bytes = 4 * width, 4 * job[NUM_COLUMNS], 4 * TILE * width
        row_stride = element_bytes * (width if is_transposed else job[NUM_COLUMNS])
        buffer_ = np.empty(width * PANEL + 16, np.float32)
        packed = (buffer_.ctypes.data + 63) // 64 * 64
        # Rows of the later panel that each tile of tokens fetches, and that number per row of its own loop, in 65536ths.
        num_fetched = min(-(-width * ROWS // max(num_tokens, 1)), width)
        pace = 65536 * num_fetched // width
        # A panel of a transposed kernel is one piece of memory.
        panel_stride = PANEL * (row_stride if is_transposed else element_bytes)
        fetch_stride = PANEL * element_bytes if is_transposed else row_stride
        for panel in range(first, stop):
            out = job[OUT] + 4 * PANEL * panel
            clear_rows(out, out_stride, num_tokens, job[NUM_ROWS], 4 * PANEL)
            if num_tokens == 0:
                continue
            source = kernel + panel_stride * panel
            if is_transposed:
                for group in range(PANEL // LANES):
                    target = packed + group // 2 * tile_bytes + group % 2 * LANE_BYTES
                    for k in range(0, width, LANES):
                        square = source + row_stride * LANES * group + element_bytes * k
                        turn_square(square, row_stride, target + 4 * TILE * k, element_bytes)
            else:
                for k in range(width):
                    _copy_row(source + k * row_stride, packed + 4 * TILE * k, tile_bytes, element_bytes)
            token = 0
            while token < num_tokens:
                left = num_tokens - token
                row = min(token * num_fetched // ROWS, width - num_fetched)
                later = source + AHEAD * panel_stride + row * fetch_stride, fetch_stride, pace
                activations, sums = (x + x_stride * token, x_stride), (out + out_stride * token, out_stride)
                if left >= ROWS and left != ROWS + 2:
                    _tiles(activations, sums, to_added, packed, width, later, element_bytes, ROWS)
                    token += ROWS
                elif left >= 4:
                    _tiles(activations, sums, to_added, packed, width, later, element_bytes, 4)
                    token += 4
                elif left >= 2:
                    _tiles(activations, sums, to_added, packed, width, later, element_bytes, 2)
                    token += 2
                else:
                    _tiles(activations, sums, to_added, packed, width, later, element_bytes, 1)
                    token += 1
        buffer_[0] = 0  # numba frees an array after the last use of its name, whoever still uses its address

    return work
