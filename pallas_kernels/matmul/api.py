"""What does the matrix product of activations and weights promise, and which implementation keeps the promise here?"""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.device import cpu_multiplies_bfloat16, num_multiprocessors, platform, why_not_hopper

PANEL = 32
"""Columns must be a multiple of this for "numba"."""


def matmul(
    x: Float[Array, "t c"],
    kernel: Float[Array, "c f"] | Float[Array, "c 2 f"],
    residual: Float[Array, "t f"] | None = None,
    *,
    implementation: str | None = None,
    num_ctas: int | None = None,
    out_dtype: Any = jnp.float32,
) -> Float[Array, "t f"]:
    """`x @ kernel`: operands in the kernel's dtype, sums in float32; for gate and up columns `silu(gate) * up`.

    Args:
      residual: is added to the product.
      implementation: None is the best one for the default platform: "numba" on a CPU with AVX512-BF16 for bfloat16 kernels
        of an even number of rows and a multiple of 32 columns where numba is installed, else "xla".  "mosaic_gpu" is for Hopper.
      num_ctas: multiprocessors that "mosaic_gpu" works on, all of them if None; of no meaning to the others.
      out_dtype: of the result, rounded after all else.

    Raises:
      NotImplementedError: the implementation named does not exist, or cannot run here or on these operands.
    """
    x = x.astype(kernel.dtype)
    if implementation == "mosaic_gpu":
        reason = _why_not_mosaic(x, kernel)
        if reason is not None:
            raise NotImplementedError(f"implementation='mosaic_gpu' {reason}")
        from pallas_kernels.matmul import mosaic_gpu  # takes a second: only where it is used

        count = num_multiprocessors() if num_ctas is None else num_ctas
        added = None if residual is None else residual.astype(out_dtype)
        return mosaic_gpu.matmul(x, kernel, added, num_ctas=count, out_dtype=out_dtype)
    result = _product(x, kernel.reshape(kernel.shape[0], -1), implementation)
    if kernel.ndim == 3:
        gate, up = jnp.moveaxis(result.reshape(x.shape[0], *kernel.shape[1:]), 1, 0)
        result = jax.nn.silu(gate) * up
    if residual is not None:
        result = residual + result
    return result.astype(out_dtype)


def _product(x: Float[Array, "t c"], kernel: Float[Array, "c f"], implementation: str | None) -> Float[Array, "t f"]:
    """The product alone, float32."""
    if implementation is None:
        implementation = "xla" if _why_not_numba(kernel) else "numba"
    match implementation:
        case "xla":
            # bfloat16 operands double the rate on CPUs with AVX512-BF16; a bfloat16 result does not.
            return jax.lax.dot_general(x, kernel, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        case "numba":
            reason = _why_not_numba(kernel)
            if reason is not None:
                raise NotImplementedError(f"implementation='numba' {reason}")
            from pallas_kernels.matmul import numba_cpu  # takes a second, too

            return numba_cpu.matmul(x, kernel)
        case _:
            raise NotImplementedError(f"implementation={implementation!r} is none of 'mosaic_gpu', 'numba', 'xla'")


def _why_not_mosaic(x, kernel) -> str | None:
    """What keeps `mosaic_gpu` from the call, None if nothing does."""
    reason = why_not_hopper()
    if reason is not None:
        return reason
    from pallas_kernels.matmul import mosaic_gpu

    return mosaic_gpu.why_not(x, kernel)


def _why_not_numba(kernel) -> str | None:
    """What keeps `numba_cpu` from the call, None if nothing does."""
    if platform() != "cpu":
        return f"runs on 'cpu', not on {platform()!r}"
    if kernel.dtype != jnp.bfloat16 or kernel.shape[0] % 2 or kernel.shape[1] % PANEL:
        return f"needs a bfloat16 kernel of [even, multiple of {PANEL}], not {kernel.dtype.name} {list(kernel.shape)}"
    if importlib.util.find_spec("numba") is None:
        return "needs the package numba, which is not installed"
    return None if cpu_multiplies_bfloat16() else "needs a CPU with AVX512-BF16"
