"""Which product does a CPU run, on all its cores?  One for each unit that multiplies, called by XLA as FFI handlers."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt16

from pallas_kernels.matmul import numba_amx, numba_bfloat16, numba_float32, packed, panels
from pallas_kernels.numba_ffi import fingerprint, register


def matmul(
    x: Float[Array, "t c"],
    kernel: Float[Array, "c f"] | UInt16[Array, "c f"] | Float[Array, "f c"],
    num_tokens: Int32[Array, ""],
    *,
    is_transposed: bool = False,
) -> Float32[Array, "t f"]:
    """`x @ kernel`, packed or not, or `x @ kernel.T`, of the first `num_tokens` tokens; zero for the others.

    Sums are float32.  A token's result does not depend on the other tokens, to the last bit.
    """
    num_rows, num_columns = x.shape[0], kernel.shape[0 if is_transposed else 1]
    unit = unit_for(kernel, is_transposed)
    x = x.astype(jnp.float32 if unit == "float32" else jnp.bfloat16)
    if unit == "amx" and is_transposed:
        x = numba_amx.pack_tokens(x)
    out = jax.ShapeDtypeStruct((num_rows, num_columns), jnp.float32)
    return jax.ffi.ffi_call(_target(kernel.dtype.name, unit, is_transposed), out)(x, kernel, num_tokens)


def unit_for(kernel, is_transposed: bool) -> str:
    """What multiplies: the matrix unit "amx", "avx512bf16", or arithmetic in "float32"."""
    if kernel.dtype == jnp.float32:
        return "float32"
    unit = packed.unit(kernel.shape[1 if is_transposed else 0])
    return "float32" if unit is None or (is_transposed and unit != "amx") else unit


@functools.cache
def _target(dtype: str, unit: str, is_transposed: bool) -> str:
    name = f"matmul_{dtype}_in_{unit}{'_transposed' if is_transposed else ''}"
    sources = fingerprint(panels.__file__, numba_amx.__file__, numba_bfloat16.__file__, numba_float32.__file__)
    is_packed = dtype == "uint16"
    match unit:
        case "amx":
            work = numba_amx.make_transposed_work(sources) if is_transposed else numba_amx.make_work(sources, is_packed)
        case "avx512bf16":
            work = numba_bfloat16.make_work(sources, is_packed)
        case _:
            work = numba_float32.make_work(sources, jnp.dtype(dtype).itemsize, 1 if is_transposed else 0)
    register(name, panels.make_describe(sources), work, num_words=panels.NUM_WORDS, items_per_turn=1)
    return name
