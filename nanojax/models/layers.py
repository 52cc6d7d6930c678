"""Which pieces do all layers share?  RMS norm, the one matrix product, weight initialisation."""

import jax
import jax.numpy as jnp
from flax import nnx

from nanojax.array_types import Array, Float
from pallas_kernels.matmul import matmul


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale` over the last axis, in float32."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x: Float[Array, "*t D"]) -> Float[Array, "*t D"]:
        """Float32, whatever comes in."""
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * self.scale[...]


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jnp.dtype, scale: float = 0.02) -> nnx.Param:
    """A weight drawn from a normal distribution, drawn in `dtype` so that a large model never exists in float32."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(scale, dtype))


def contract(x: Float[Array, "t c"], kernel: Float[Array, "c *out"]) -> Float[Array, "t *out"]:
    """`x @ kernel`: operands in the kernel's dtype, sums and result in float32."""
    return matmul(x, kernel.reshape(kernel.shape[0], -1)).reshape(x.shape[0], *kernel.shape[1:])
