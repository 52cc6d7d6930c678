"""Which product does a CPU run, on all its cores?  One for each unit that multiplies, called by XLA as FFI handlers."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.device import cpu_has
from pallas_kernels.matmul import numba_bfloat16, numba_float32, panels
from pallas_kernels.numba_ffi import fingerprint, register


def matmul(
    x: Float[Array, "t c"],
    kernel: Float[Array, "c f"] | Float[Array, "f c"],
    num_tokens: Int32[Array, ""],
    *,
    is_transposed: bool = False,
) -> Float32[Array, "t f"]:
    """`x @ kernel`, or `x @ kernel.T`, of the first `num_tokens` tokens; zero for the others.

    Sums are float32.  A token's result does not depend on the other tokens, to the last bit.
    """
    num_columns = kernel.shape[0 if is_transposed else 1]
    has_unit = kernel.dtype == jnp.bfloat16 and not is_transposed and cpu_has("avx512bf16")
    unit = "bfloat16" if has_unit else "float32"
    target = _target(kernel.dtype.name, unit, is_transposed)
    out = jax.ShapeDtypeStruct((x.shape[0], num_columns), jnp.float32)
    return jax.ffi.ffi_call(target, out)(x.astype(unit), kernel, num_tokens)


@functools.cache
def _target(dtype: str, unit: str, is_transposed: bool) -> str:
    name = f"matmul_{dtype}_in_{unit}{'_transposed' if is_transposed else ''}"
    sources = fingerprint(panels.__file__, numba_bfloat16.__file__, numba_float32.__file__)
    if unit == "bfloat16":
        work = numba_bfloat16.make_work(sources)
    else:
        work = numba_float32.make_work(sources, jnp.dtype(dtype).itemsize, 1 if is_transposed else 0)
    register(name, panels.make_describe(sources), work, num_words=panels.NUM_WORDS, items_per_turn=1)
    return name
