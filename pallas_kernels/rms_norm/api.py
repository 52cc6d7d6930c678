"""What does the root-mean-square norm promise, and which implementation keeps the promise here?"""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.device import cpu_has, platform

LANES = 16
"""The width must be a multiple of it for "numba"."""


def rms_norm(
    x: Float[Array, "*t D"],
    scale: Float[Array, "D"],
    eps: float,
    *,
    num_tokens: Int32[Array, ""] | None = None,
    implementation: str | None = None,
    out_dtype: Any = jnp.float32,
) -> Float[Array, "*t D"]:
    """`x / sqrt(mean(x**2) + eps) * scale` over the last axis, in float32, then rounded to `out_dtype`.

    Args:
      num_tokens: only the first so many rows are asked for; "numba" leaves the others out, their norm is 0.
      implementation: None is "numba" on a CPU where it suits (see `_why_not_numba`), else "xla".

    Raises:
      NotImplementedError: the implementation named does not exist, or cannot run here or on these operands.
    """
    reason = _why_not_numba(x.shape[-1], out_dtype)
    match implementation or ("xla" if reason else "numba"):
        case "xla":
            x = x.astype(jnp.float32)
            normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale
            return normed.astype(out_dtype)
        case "numba":
            if reason is not None:
                raise NotImplementedError(f"implementation='numba' {reason}")
            from pallas_kernels.rms_norm import numba_cpu  # takes a second: only where it is used

            rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
            count = jnp.int32(rows.shape[0]) if num_tokens is None else num_tokens
            normed = numba_cpu.rms_norm(rows, scale.astype(jnp.float32), eps, count, jnp.dtype(out_dtype))
            return normed.reshape(x.shape)
        case _:
            raise NotImplementedError(f"implementation={implementation!r} is none of 'numba', 'xla'")


def _why_not_numba(width: int, out_dtype: Any) -> str | None:
    """What keeps `numba_cpu` from the call, None if nothing does."""
    if platform() != "cpu":
        return f"runs on 'cpu', not on {platform()!r}"
    if width % LANES:
        return f"needs a width that is a multiple of {LANES}, not {width}"
    if out_dtype not in (jnp.float32, jnp.bfloat16):
        return f"gives float32 or bfloat16, not {jnp.dtype(out_dtype).name}"
    if importlib.util.find_spec("numba") is None:
        return "needs the package numba, which is not installed"
    feature = "avx512bf16" if out_dtype == jnp.bfloat16 else "avx2"
    return None if cpu_has(feature) else f"needs a CPU with {feature}"
