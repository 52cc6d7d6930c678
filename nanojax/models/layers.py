"""Which pieces do all layers share?  RMS norm, the one matrix product, weight initialisation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from nanojax.array_types import Array, Float, Int32
from pallas_kernels.matmul import PackedKernel, matmul
from pallas_kernels.rms_norm import rms_norm


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale` over the last axis, in float32."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(
        self,
        x: Float[Array, "*t D"],
        num_tokens: Int32[Array, ""] | None = None,
        out_dtype: DTypeLike = jnp.float32,
    ) -> Float[Array, "*t D"]:
        """Of the first `num_tokens` tokens, if only they are asked for; rounded to `out_dtype`."""
        return rms_norm(x, self.scale[...], self.eps, num_tokens=num_tokens, out_dtype=out_dtype)


def normal(rngs: nnx.Rngs | None, shape: tuple[int, ...], dtype: jnp.dtype, scale: float = 0.02) -> nnx.Param:
    """A weight drawn from a normal distribution, drawn in `dtype` so that a large model never exists in float32.

    Without `rngs` zeros, for those who only want its shape: tracing how hundreds of weights are drawn takes half a second.
    """
    if rngs is None:
        return nnx.Param(jnp.zeros(shape, dtype))
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(scale, dtype))


@dataclasses.dataclass(frozen=True)
class Extent:
    """How much of the tokens, and of the device, the products of an operation are about.

    num_tokens: only so many tokens are asked for, the rest is padding; None asks for all.
    num_ctas: multiprocessors of a Hopper GPU that shall compute it, for which `matmul` has a kernel; None leaves it to the
      platform's best one.
    """

    num_tokens: Int32[Array, ""] | None = None
    num_ctas: int | None = None

    def for_matmul(self) -> dict[str, Any]:
        """What `matmul` has to be told."""
        on_ctas = {} if self.num_ctas is None else {"implementation": "mosaic_gpu", "num_ctas": self.num_ctas}
        return {"num_tokens": self.num_tokens} | on_ctas


WHOLE = Extent()


def contract(
    x: Float[Array, "t c"],
    kernel: Float[Array, "c *out"] | PackedKernel,
    extent: Extent = WHOLE,
    out_dtype: DTypeLike = jnp.float32,
) -> Float[Array, "t *out"]:
    """`x @ kernel`, packed or not, as `matmul` multiplies."""
    product = matmul(x, kernel.reshape(kernel.shape[0], -1), out_dtype=out_dtype, **extent.for_matmul())
    return product.reshape(x.shape[0], *kernel.shape[1:])
