"""How do weights of 4 or 8 bits become what a bfloat16 product reads?  In the core's first cache, a block of 32 x 32 at a time.

A weight is `scale * code + least`, rounded to bfloat16: the same bits as those of a kernel that was expanded at rest.
"""

import typing

import llvmlite.ir
import numba
import numba.core.cgutils
import numba.extending

from pallas_kernels.matmul.packed import BLOCK_HEAD_BYTES, BLOCK_ROWS, PANEL, block_bytes
from pallas_kernels.numba_vectors16 import FLOATS, INT64, PAIRS, WORDS, address, call, instruction

_HALVES = llvmlite.ir.VectorType(llvmlite.ir.HalfType(), 16)
_GROUPS, _COLUMNS = 4, 8
"""Columns of a block lie in groups, whose pairs of weights fill a vector of 16."""
PAIR_BYTES = 4 * PANEL
"""Of a pair of rows of a panel in bfloat16."""
PIECES = BLOCK_ROWS // 2
"""In which a block's expansion is emitted."""


def emit_expand(b, block, panel, num_bits):
    """Emits the expansion of the block at an int64 address to the 16 pairs of rows of a panel at another, a pair at a time."""
    scales, least = [], []
    for vectors, start in ((scales, 0), (least, BLOCK_HEAD_BYTES // 2)):
        for half in range(2):
            row = b.fpext(b.load(address(b, block, start + 32 * half, _HALVES), align=32), FLOATS)
            for group in range(2):
                order = WORDS([_COLUMNS * group + lane // 2 for lane in range(16)])
                vectors.append(b.shuffle_vector(row, row, order))
    table = llvmlite.ir.Constant(FLOATS, [float(i) for i in range(16)])
    for pair in range(PIECES):
        weights = []
        for group in range(_GROUPS):
            place = (_GROUPS * pair + group) * num_bits  # in bits of each of the 16 words
            words = b.load(address(b, block, BLOCK_HEAD_BYTES + place // 32 * 64, WORDS), align=64)
            codes = b.lshr(words, WORDS([place % 32] * 16))
            if num_bits == 4:
                values = instruction(b, "avx512.permvar.sf", table, codes)  # looks at 4 bits
            else:
                values = b.uitofp(b.and_(codes, WORDS([(1 << num_bits) - 1] * 16)), FLOATS)
            weights.append(call(b, "fma", values, scales[group], least[group]))
        for half in range(2):
            both = instruction(b, "avx512bf16.cvtne2ps2bf16", *weights[2 * half : 2 * half + 2][::-1], returns=PAIRS)
            b.store(both, address(b, panel, PAIR_BYTES * pair + 64 * half, PAIRS), align=64)
        yield


def emit_all(pieces):
    """Emits what a generator emits piece by piece."""
    for _ in pieces:
        pass


@numba.extending.intrinsic(prefer_literal=True)
@typing.no_type_check
def expand(typing_context, source, num_blocks, panel, num_bits):
    """Expands `num_blocks` blocks, of weights of `num_bits` (a constant), one under the other; int64 all."""
    bits = num_bits
    if not isinstance(bits, numba.types.IntegerLiteral):
        return None

    def generate(context, builder, signature, arguments):
        b = builder
        source, num_blocks, panel, _ = arguments
        with numba.core.cgutils.for_range(b, num_blocks) as loop:
            block = b.add(source, b.mul(loop.index, INT64(block_bytes(bits.literal_value))))
            to = b.add(panel, b.mul(loop.index, INT64(PAIR_BYTES * BLOCK_ROWS // 2)))
            emit_all(emit_expand(b, block, to, bits.literal_value))
        return context.get_dummy_value()

    return numba.types.void(*(numba.types.int64,) * 3, bits), generate
