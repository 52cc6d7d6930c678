"""How does a kernel lie in memory so that a CPU's unit for bfloat16 reads it as it goes?  In panels of columns, rows in pairs.

A packed kernel keeps its shape; its dtype, uint16 for bfloat16's bits, tells that it is packed, and keeps it from all but `matmul`.
In memory it is [f / 32 panels, c / 2 pairs of rows, 32 columns, 2 rows], of the kernel as a matrix [c, f].
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, UInt16

from pallas_kernels.device import cpu_has, cpu_has_amx, platform

PANEL = 32
"""Columns of a panel."""
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
    kernel: Float[Array, "*c f"] | UInt16[Array, "*c f"], num_axes: int
) -> Float[Array, "*c f"] | UInt16[Array, "*c f"]:
    """The kernel packed, if this CPU has a unit that reads it so; else the kernel as it is.

    num_axes: leading axes that are the rows of the matrix; the others are its columns.
    """
    num_rows = math.prod(kernel.shape[:num_axes])
    num_columns = math.prod(kernel.shape[num_axes:])
    suits = kernel.dtype == jnp.bfloat16 and num_columns % PANEL == 0
    if not suits or platform() != "cpu" or unit(num_rows) is None:
        return kernel
    return _pack(kernel, num_rows)


@functools.partial(jax.jit, static_argnums=1)
def _pack(kernel, num_rows: int):
    bits = jax.lax.bitcast_convert_type(kernel, jnp.uint16).reshape(num_rows // 2, 2, -1, PANEL)
    return bits.transpose(2, 0, 3, 1).reshape(kernel.shape)


def unpack(kernel: UInt16[Array, "*c f"], num_axes: int) -> BFloat16[Array, "*c f"]:
    """What was packed."""
    num_rows, num_columns = math.prod(kernel.shape[:num_axes]), math.prod(kernel.shape[num_axes:])
    panels = kernel.reshape(num_columns // PANEL, num_rows // 2, PANEL, 2).transpose(1, 3, 0, 2)
    return jax.lax.bitcast_convert_type(panels.reshape(kernel.shape), jnp.bfloat16)
