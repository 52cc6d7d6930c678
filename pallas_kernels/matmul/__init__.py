"""Which names does the matrix product offer?"""

from pallas_kernels.matmul.api import matmul
from pallas_kernels.matmul.packed import (
    PackedKernel,
    blocks_shape,
    is_packed,
    operand_dtype,
    pack,
    pack_blocks,
    takes_blocks,
)

__all__ = [
    "PackedKernel",
    "blocks_shape",
    "is_packed",
    "matmul",
    "operand_dtype",
    "pack",
    "pack_blocks",
    "takes_blocks",
]
