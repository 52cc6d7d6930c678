"""Which names does the overlap of a matrix product with decode attention offer?"""

from pallas_kernels.overlap.shares import Split, ctas_of_shares, split_of_share

__all__ = ["Split", "ctas_of_shares", "split_of_share"]
