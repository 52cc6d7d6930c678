"""Which functions of float32 do the CPU's kernels share?  Written so that numba makes vector instructions of them."""

import typing

import numba
import numpy as np


@numba.njit(forceinline=True)
@typing.no_type_check
def exp(x):
    """e**x for x <= 0 within 2 units in the last place (Cephes expf), of instructions that exist for vectors."""
    x = max(x, np.float32(-87.0))
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * r * r + r + np.float32(1.0)
    return y * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
