"""Which names does the overlap of a matrix product with decode attention offer?"""

from pallas_kernels.overlap.api import matmul_and_decode_attention, path_for
from pallas_kernels.overlap.shares import Split, ctas_of_shares, split_of_share

__all__ = ["Split", "ctas_of_shares", "matmul_and_decode_attention", "path_for", "split_of_share"]
