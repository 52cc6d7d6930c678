"""How does a kernel lie in memory so that a CPU's unit for bfloat16 reads it as it goes?  In panels of columns, rows in pairs.

A packed kernel keeps its shape; its dtype, uint16 for bfloat16's bits, tells that it is packed, and keeps it from all but `matmul`.
In memory it is [f / 32 panels, c / 2 pairs of rows, 32 columns, 2 rows], of the kernel as a matrix [c, f].  A panel of a kernel
[c, 2, f] has 16 columns of gate and, after them, the same of up.

Weights of few bits stay so in memory, where their number is what a product of few tokens takes its time for.  Such a kernel is
uint8 (4 bits) or int8 (8 bits); its rows are bytes, 5 or 9 for each 8 of the kernel's.  A panel's blocks of 32 rows lie one after
the other: 32 scales and 32 least values in float16, a column each, then the codes (`pack_blocks`).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Int8, UInt8, UInt16

from pallas_kernels.device import cpu_has, cpu_has_amx, platform

PackedKernel = UInt16[Array, "..."] | UInt8[Array, "..."] | Int8[Array, "..."]
"""In bfloat16, or of weights of 4 or 8 bits."""
PANEL = 32
"""Columns of a panel."""
GATED_COLUMNS = PANEL // 2
"""Columns of the result that a panel of gate and up gives."""
AMX_DEPTH = 32
"""Rows that AMX multiplies at a time: a kernel's number of rows must be a multiple."""
BLOCK_ROWS = 32
"""Rows of a column that share a scale and a least value, as in GGUF's simple formats."""
BLOCK_HEAD_BYTES = 2 * 2 * PANEL
_BITS = {jnp.dtype(jnp.uint8): 4, jnp.dtype(jnp.int8): 8}


def unit(num_rows: int) -> str | None:
    """Which unit of this CPU multiplies bfloat16 kernels of so many rows: "amx", "avx512bf16", or None."""
    if num_rows % AMX_DEPTH == 0 and cpu_has_amx():
        return "amx"
    return "avx512bf16" if num_rows % 2 == 0 and cpu_has("avx512bf16") else None


def block_bytes(num_bits: int) -> int:
    """Of a panel's block of weights of so many bits."""
    return BLOCK_HEAD_BYTES + BLOCK_ROWS * PANEL * num_bits // 8


def num_bits(kernel) -> int:
    """Bits of a weight of a kernel that `pack_blocks` packed, 0 for another one."""
    return _BITS.get(jnp.dtype(kernel.dtype), 0)


def num_rows(kernel) -> int:
    """Rows of the kernel as a matrix [c, f] or [c, 2, f]."""
    bits = num_bits(kernel)
    return kernel.shape[0] * BLOCK_ROWS * PANEL // block_bytes(bits) if bits else kernel.shape[0]


def is_packed(kernel) -> bool:
    """Whether `pack` or `pack_blocks` packed it."""
    return kernel.dtype == jnp.uint16 or num_bits(kernel) > 0


def operand_dtype(kernel) -> jnp.dtype:
    """What the operands of its products are rounded to."""
    return jnp.dtype(jnp.bfloat16) if is_packed(kernel) else kernel.dtype


def pack(kernel: Float[Array, "..."] | PackedKernel, num_axes: int) -> Float[Array, "..."] | PackedKernel:
    """The kernel packed, if this CPU has a unit that reads it so; else the kernel as it is.

    kernel: a matrix [c, f], either axis as one or several; or [c, 2, f], gate and up.
    num_axes: leading axes that are the rows of the matrix; the others are its columns.
    """
    rows = math.prod(kernel.shape[:num_axes])
    if kernel.dtype != jnp.bfloat16 or not _suits(kernel, rows):
        return kernel
    return _pack(kernel, rows)


def takes_blocks(shape: tuple[int, ...], num_axes: int) -> bool:
    """Whether `pack_blocks` takes a kernel of this shape on this CPU: by AVX512-BF16 expanding takes longer than it saves."""
    kernel, rows = jax.ShapeDtypeStruct(shape, jnp.uint8), math.prod(shape[:num_axes])
    return shape[num_axes - 1] % 8 == 0 and _suits(kernel, rows) and unit(rows) == "amx"


def blocks_shape(shape: tuple[int, ...], num_axes: int, bits: int) -> jax.ShapeDtypeStruct:
    """What `pack_blocks` makes of a kernel of this shape, of weights of so many bits."""
    last = shape[num_axes - 1] * block_bytes(bits) // (BLOCK_ROWS * PANEL)
    dtype = next(dtype for dtype, of in _BITS.items() if of == bits)
    return jax.ShapeDtypeStruct((*shape[: num_axes - 1], last, *shape[num_axes:]), dtype)


@functools.partial(jax.jit, static_argnums=(3, 4))
def pack_blocks(
    codes: UInt8[Array, "..."], scale: Float16[Array, "..."], least: Float16[Array, "..."], num_axes: int, bits: int
) -> PackedKernel:
    """The kernel `scale * codes + least` in blocks, if it `takes_blocks`.

    codes: as a kernel of `pack`, below 2**bits; scale, least: the same, but for 32 rows each one, as one axis.
    """
    rows, columns = math.prod(codes.shape[:num_axes]), codes.shape[num_axes:]
    num_blocks = rows // BLOCK_ROWS

    def ordered(x, *shape):
        x = x.reshape(-1, *columns)
        x = x.reshape(x.shape[0], 2, -1, GATED_COLUMNS).swapaxes(1, 2) if is_gated(x) else x
        return x.reshape(*shape)

    lanes = ordered(codes, num_blocks, BLOCK_ROWS // 2, 2, -1, PANEL // 8, 8).transpose(3, 0, 1, 4, 5, 2)
    per_word = 32 // bits
    words = lanes.astype(jnp.uint32).reshape(lanes.shape[0], num_blocks, -1, per_word, 16)
    words = jnp.sum(words << (bits * jnp.arange(per_word, dtype=jnp.uint32))[:, None], axis=3, dtype=jnp.uint32)
    heads = [ordered(x, num_blocks, -1, PANEL).swapaxes(0, 1) for x in (scale, least)]
    parts = [jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(*lanes.shape[:2], -1) for x in (*heads, words)]
    there = blocks_shape(codes.shape, num_axes, bits)
    return jax.lax.bitcast_convert_type(jnp.concatenate(parts, axis=2), there.dtype).reshape(there.shape)


def _suits(kernel, rows: int) -> bool:
    return kernel.shape[-1] % (GATED_COLUMNS if is_gated(kernel) else PANEL) == 0 and (
        platform() == "cpu" and unit(rows) is not None
    )


def is_gated(kernel) -> bool:
    """Whether the kernel is one of gate and up, [c, 2, f]."""
    return kernel.ndim == 3 and kernel.shape[1] == 2


@functools.partial(jax.jit, static_argnums=1)
def _pack(kernel, num_rows: int):
    columns = kernel.reshape(num_rows, 2, -1, GATED_COLUMNS).swapaxes(1, 2) if is_gated(kernel) else kernel
    bits = jax.lax.bitcast_convert_type(columns, jnp.uint16).reshape(num_rows // 2, 2, -1, PANEL)
    return bits.transpose(2, 0, 3, 1).reshape(kernel.shape)
