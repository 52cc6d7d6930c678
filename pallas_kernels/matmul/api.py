"""What does the matrix product of activations and weights promise, and which implementation keeps the promise here?"""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.device import cpu_has, num_multiprocessors, platform, why_not_hopper
from pallas_kernels.matmul.packed import PANEL, PackedKernel, is_packed, num_rows, operand_dtype, unit

SQUARE = 16
"""Rows of a transposed kernel must be a multiple of it for "numba", columns of `PANEL`."""


def matmul(
    x: Float[Array, "t c"],
    kernel: Float[Array, "c f"] | Float[Array, "c 2 f"] | Float[Array, "f c"] | PackedKernel,
    residual: Float[Array, "t f"] | None = None,
    *,
    is_transposed: bool = False,
    num_tokens: Int32[Array, ""] | None = None,
    implementation: str | None = None,
    num_ctas: int | None = None,
    out_dtype: Any = jnp.float32,
) -> Float[Array, "t f"]:
    """`x @ kernel`: operands in the kernel's dtype, sums in float32; for gate and up, [c 2 f], `silu(gate) * up`.

    Args:
      kernel: may be one that `pack` or `pack_blocks` packed; then `silu(gate) * up` is rounded to bfloat16 before all else.
      residual: is added to the product.
      is_transposed: the kernel is [f, c].
      num_tokens: only the first so many tokens are asked for; "numba" leaves the others out, what they would get is 0.
      implementation: None is the best one for the default platform: "numba" on a CPU where numba is installed and the
        kernel suits it (see `_why_not_numba`), else "xla".  "mosaic_gpu" is for Hopper.
      num_ctas: multiprocessors that "mosaic_gpu" works on, all of them if None; of no meaning to the others.
      out_dtype: of the result, rounded after all else; but on a GPU "xla" rounds a product to which nothing is added as it
        leaves the unit, gate and up, too, if this is the kernel's dtype: that halves what is written and read.

    Raises:
      NotImplementedError: the implementation named does not exist, or cannot run here or on these operands.
    """
    if is_packed(kernel) and implementation not in (None, "numba"):
        raise NotImplementedError(f"implementation={implementation!r} cannot read a packed kernel")
    x = x.astype(operand_dtype(kernel))
    if implementation == "mosaic_gpu":
        reason = "takes no transposed kernel" if is_transposed else _why_not_mosaic(x, kernel)
        if reason is not None:
            raise NotImplementedError(f"implementation='mosaic_gpu' {reason}")
        from pallas_kernels.matmul import mosaic_gpu  # takes a second: only where it is used

        count = num_multiprocessors() if num_ctas is None else num_ctas
        added = None if residual is None else residual.astype(out_dtype)
        return mosaic_gpu.matmul(x, kernel, added, num_ctas=count, out_dtype=out_dtype)
    is_narrow = platform() == "gpu" and residual is None and out_dtype == kernel.dtype
    dtype = kernel.dtype if is_narrow else jnp.float32
    is_gated = kernel.ndim == 3
    if is_gated and is_packed(kernel):
        result = _numba(x, kernel, None, is_transposed, num_tokens)
    else:
        matrix = kernel.reshape(kernel.shape[0], -1)
        added = None if is_gated else residual
        result = _product(x, matrix, added, is_transposed, num_tokens, implementation, dtype)
        if is_gated:
            gate, up = jnp.moveaxis(result.reshape(x.shape[0], *kernel.shape[1:]), 1, 0)
            result = jax.nn.silu(gate.astype(jnp.float32)) * up
    if is_gated and residual is not None:
        result = residual + result
    return result.astype(out_dtype)


def _product(
    x, kernel, residual, is_transposed: bool, num_tokens, implementation: str | None, dtype: Any
) -> Float[Array, "t f"]:
    """The product and what is added to it; "xla" gives the product in `dtype`, sums being float32, "numba" in float32."""
    if implementation is None:
        # XLA multiplies bfloat16 by the CPU's unit; the transposed form of "numba" does not.
        is_for_unit = is_transposed and kernel.dtype == jnp.bfloat16 and unit(kernel.shape[1]) is not None
        suits = is_packed(kernel) or _why_not_numba(kernel, is_transposed=is_transposed) is None
        implementation = "numba" if suits and not is_for_unit else "xla"
    match implementation:
        case "xla":
            # bfloat16 operands double the rate on CPUs with AVX512-BF16; a bfloat16 result does not.
            dims = (((1,), (1 if is_transposed else 0,)), ((), ()))
            product = jax.lax.dot_general(x, kernel, dims, preferred_element_type=dtype)
            return product if residual is None else residual + product
        case "numba":
            return _numba(x, kernel, residual, is_transposed, num_tokens)
        case _:
            raise NotImplementedError(f"implementation={implementation!r} is none of 'mosaic_gpu', 'numba', 'xla'")


def _numba(x, kernel, residual, is_transposed: bool, num_tokens) -> Float[Array, "t f"]:
    reason = _why_not_numba(kernel, is_transposed=is_transposed)
    if reason is not None:
        raise NotImplementedError(f"implementation='numba' {reason}")
    from pallas_kernels.matmul import numba_cpu  # takes a second, too

    count = jnp.int32(x.shape[0]) if num_tokens is None else num_tokens
    if kernel.ndim == 3:
        return numba_cpu.gated(x, kernel, count)
    return numba_cpu.matmul(x, kernel, count, residual, is_transposed=is_transposed)


def _why_not_mosaic(x, kernel) -> str | None:
    """What keeps `mosaic_gpu` from the call, None if nothing does."""
    reason = why_not_hopper()
    if reason is not None:
        return reason
    from pallas_kernels.matmul import mosaic_gpu

    return mosaic_gpu.why_not(x, kernel)


def _why_not_numba(kernel, *, is_transposed: bool = False) -> str | None:
    """What keeps `numba_cpu` from the call, None if nothing does."""
    if platform() != "cpu":
        return f"runs on 'cpu', not on {platform()!r}"
    if is_packed(kernel):
        return None if unit(num_rows(kernel)) else "cannot read a kernel that another CPU packed"
    rows, columns = kernel.shape[::-1] if is_transposed else kernel.shape
    if kernel.dtype not in (jnp.bfloat16, jnp.float32):
        return f"needs a bfloat16 or float32 kernel, not {kernel.dtype.name} {list(kernel.shape)}"
    if columns % PANEL or rows % (SQUARE if is_transposed else 2):
        sizes = f"[multiple of {PANEL}, of {SQUARE}]" if is_transposed else f"[even, multiple of {PANEL}]"
        return f"needs a kernel of {sizes}, not {list(kernel.shape)}"
    if importlib.util.find_spec("numba") is None:
        return "needs the package numba, which is not installed"
    return None if cpu_has("avx2") and cpu_has("fma") else "needs a CPU with AVX2"
