"""Which names does the matrix product offer?"""

from pallas_kernels.matmul.api import matmul

__all__ = ["matmul"]
