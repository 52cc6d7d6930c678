"""Which names does the overlap of a matrix product with decode attention offer?"""

from pallas_kernels.overlap.api import (
    PREPARE,
    decode_on,
    matmul_and_decode_attention,
    path_for,
    why_not_decode,
)
from pallas_kernels.overlap.shares import Split, ctas_of_shares, split_of_share

__all__ = [
    "PREPARE",
    "Split",
    "ctas_of_shares",
    "decode_on",
    "matmul_and_decode_attention",
    "path_for",
    "split_of_share",
    "why_not_decode",
]
