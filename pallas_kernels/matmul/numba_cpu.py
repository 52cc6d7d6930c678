"""Which product does a CPU run, on all its cores?  One for each unit that multiplies, called by XLA as FFI handlers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from pallas_kernels.matmul import (
    numba_amx,
    numba_bfloat16,
    numba_float32,
    packed,
    panels,
)
from pallas_kernels.numba_ffi import register

ANY_NUMBER = 1 << 62
"""Of tokens."""


def matmul(
    x: Float[Array, "t c"],
    kernel: Float[Array, "c f"] | Float[Array, "f c"] | packed.PackedKernel,
    num_tokens: Int32[Array, ""],
    residual: Float[Array, "t f"] | None = None,
    *,
    is_transposed: bool = False,
) -> Float32[Array, "t f"]:
    """`x @ kernel`, packed or not, or `x @ kernel.T`, plus `residual`, of the first `num_tokens` tokens; zero for the others.

    Sums are float32.  A token's result does not depend on the other tokens, to the last bit.  No unit adds to a transposed
    product by itself: there the others keep `residual`.
    """
    if is_transposed and residual is not None:
        return residual + matmul(x, kernel, num_tokens, is_transposed=True)
    unit, num_columns = unit_for(kernel, is_transposed), kernel.shape[0 if is_transposed else 1]
    x = x.astype(jnp.float32 if unit == "float32" else jnp.bfloat16)
    form = "transposed" if is_transposed else "packed" if packed.is_packed(kernel) else "plain"
    out = jax.ShapeDtypeStruct((x.shape[0], num_columns), jnp.float32)
    added = () if residual is None else (residual.astype(jnp.float32),)
    return jax.ffi.ffi_call(_target(kernel.dtype.name, unit, form), out)(x, kernel, num_tokens, *added)


def gated(x: Float[Array, "t c"], kernel: packed.PackedKernel, num_tokens: Int32[Array, ""]) -> BFloat16[Array, "t f"]:
    """`silu(gate x) * (up x)` of a packed kernel, otherwise as `matmul`."""
    out = jax.ShapeDtypeStruct((x.shape[0], kernel.shape[2]), jnp.bfloat16)
    target = _target(kernel.dtype.name, unit_for(kernel, False), "gated")
    return jax.ffi.ffi_call(target, out)(x.astype(jnp.bfloat16), kernel, num_tokens)


def unit_for(kernel, is_transposed: bool) -> str:
    """What multiplies: the matrix unit "amx", "avx512bf16", or arithmetic in "float32", which alone takes transposed kernels."""
    if kernel.dtype == jnp.float32 or is_transposed:
        return "float32"
    return packed.unit(packed.num_rows(kernel)) or "float32"


def _target(dtype: str, unit: str, form: str) -> str:
    """Makes XLA know the product of kernels of a dtype in a form ("transposed", "plain", "packed", "gated"); returns its name."""
    name = f"matmul_{form}_{dtype}_in_{unit}"
    is_gated = form == "gated"

    def make(sources):
        match unit:
            case "amx":
                work = numba_amx.make_work(sources, form, packed.num_bits(jax.ShapeDtypeStruct((), dtype)))
            case "avx512bf16":
                work = numba_bfloat16.make_work(sources, form)
            case _:
                work = numba_float32.make_work(sources, jnp.dtype(dtype).itemsize, int(form == "transposed"))
        # Two panels of gate and up give a whole line of the cache, which two threads had better not share.
        pairs_up_to = ANY_NUMBER if is_gated else numba_amx.ROWS if unit == "amx" else 0
        return panels.make_describe(sources, packed.GATED_COLUMNS if is_gated else packed.PANEL, pairs_up_to), work

    return register(name, make, num_words=panels.NUM_WORDS)
