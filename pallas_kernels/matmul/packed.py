"""How does a kernel lie in memory so that a CPU's unit for bfloat16 reads it as it goes?  In panels of columns, rows in pairs.

A packed kernel keeps its shape; its dtype, uint16 for bfloat16's bits, tells that it is packed, and keeps it from all but `matmul`.
In memory it is [f / 32 panels, c / 2 pairs of rows, 32 columns, 2 rows], of the kernel as a matrix [c, f].  A panel of a kernel
[c, 2, f] has 16 columns of gate and, after them, the same of up.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt16

from pallas_kernels.device import cpu_has, cpu_has_amx, platform

PANEL = 32
"""Columns of a panel."""
GATED_COLUMNS = PANEL // 2
"""Columns of the result that a panel of gate and up gives."""
AMX_DEPTH = 32
"""Rows that AMX multiplies at a time: a kernel's number of rows must be a multiple."""


def unit(num_rows: int) -> str | None:
    """Which unit of this CPU multiplies bfloat16 kernels of so many rows: "amx", "avx512bf16", or None."""
    if num_rows % AMX_DEPTH == 0 and cpu_has_amx():
        return "amx"
    return "avx512bf16" if num_rows % 2 == 0 and cpu_has("avx512bf16") else None


def is_packed(kernel) -> bool:
    """Whether `pack` packed it."""
    return kernel.dtype == jnp.uint16


def operand_dtype(kernel) -> jnp.dtype:
    """What the operands of its products are rounded to."""
    return jnp.dtype(jnp.bfloat16) if is_packed(kernel) else kernel.dtype


def pack(
    kernel: Float[Array, "..."] | UInt16[Array, "..."], num_axes: int
) -> Float[Array, "..."] | UInt16[Array, "..."]:
    """The kernel packed, if this CPU has a unit that reads it so; else the kernel as it is.

    kernel: a matrix [c, f], either axis as one or several; or [c, 2, f], gate and up.
    num_axes: leading axes that are the rows of the matrix; the others are its columns.
    """
    num_rows = math.prod(kernel.shape[:num_axes])
    suits = kernel.dtype == jnp.bfloat16 and kernel.shape[-1] % (GATED_COLUMNS if is_gated(kernel) else PANEL) == 0
    if not suits or platform() != "cpu" or unit(num_rows) is None:
        return kernel
    return _pack(kernel, num_rows)


def is_gated(kernel) -> bool:
    """Whether the kernel is one of gate and up, [c, 2, f]."""
    return kernel.ndim == 3 and kernel.shape[1] == 2


@functools.partial(jax.jit, static_argnums=1)
def _pack(kernel, num_rows: int):
    columns = kernel.reshape(num_rows, 2, -1, GATED_COLUMNS).swapaxes(1, 2) if is_gated(kernel) else kernel
    bits = jax.lax.bitcast_convert_type(columns, jnp.uint16).reshape(num_rows // 2, 2, -1, PANEL)
    return bits.transpose(2, 0, 3, 1).reshape(kernel.shape)
