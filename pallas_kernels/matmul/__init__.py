"""Which names does the matrix product offer?"""

from pallas_kernels.matmul.api import matmul
from pallas_kernels.matmul.packed import operand_dtype, pack

__all__ = ["matmul", "operand_dtype", "pack"]
