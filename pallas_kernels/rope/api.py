"""What does the rotary embedding promise, and which implementation keeps the promise here?"""

import importlib.util
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.device import cpu_has, platform

LANES = 16
"""Half a head must be a multiple of it for "numba"."""


def rotate_qkv(
    y: Float[Array, "t K w h"],
    cos: Float[Array, "t h2"],
    sin: Float[Array, "t h2"],
    *,
    num_tokens: Int32[Array, ""] | None = None,
    implementation: str | None = None,
    out_dtype: Any = jnp.float32,
) -> tuple[Float[Array, "t H h"], Float[Array, "t K h"], Float[Array, "t K h"]]:
    """Queries and keys, rotated in float32 as `rotate` does, and values; all rounded to `out_dtype`.

    Args:
      y: for each KV head its w - 2 query heads, its key and its value; so H = K (w - 2).
      num_tokens: only the first so many rows are asked for; "numba" leaves the others out, their results are 0.
      implementation: None is "numba" on a CPU where it suits (see `_why_not_numba`), else "xla".

    Raises:
      NotImplementedError: the implementation named does not exist, or cannot run here or on these operands.
    """
    reason = _why_not_numba(y, out_dtype)
    match implementation or ("xla" if reason else "numba"):
        case "xla":
            t, num_kv_heads, width, head_dim = y.shape
            q, k = rotate(y[:, :, :-2], cos, sin), rotate(y[:, :, -2:-1], cos, sin)
            q = q.reshape(t, num_kv_heads * (width - 2), head_dim)
            return q.astype(out_dtype), k[:, :, 0].astype(out_dtype), y[:, :, -1].astype(out_dtype)
        case "numba":
            if reason is not None:
                raise NotImplementedError(f"implementation='numba' {reason}")
            from pallas_kernels.rope import numba_cpu  # takes a second: only where it is used

            count = jnp.int32(y.shape[0]) if num_tokens is None else num_tokens
            own = out_dtype if cpu_has("avx512bf16") else jnp.float32  # else XLA rounds
            q, k, v = numba_cpu.rotate_qkv(y, cos, sin, count, jnp.dtype(own))
            return q.astype(out_dtype), k.astype(out_dtype), v.astype(out_dtype)
        case _:
            raise NotImplementedError(f"implementation={implementation!r} is none of 'numba', 'xla'")


def rotate(x: Float[Array, "t K n h"], cos: Float[Array, "t h2"], sin: Float[Array, "t h2"]) -> Float[Array, "t K n h"]:
    """Rotary embedding, half-split (NeoX) order: dimension i turns with dimension i + h/2."""
    cos, sin = (part[:, None, None] for part in (cos, sin))
    x1, x2 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def _why_not_numba(y: Any, out_dtype: Any) -> str | None:
    """What keeps `numba_cpu` from the call, None if nothing does."""
    if platform() != "cpu":
        return f"runs on 'cpu', not on {platform()!r}"
    if y.shape[-1] % (2 * LANES):
        return f"needs a head_dim that is a multiple of {2 * LANES}, not {y.shape[-1]}"
    if y.dtype != jnp.float32 or out_dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 and gives float32 or bfloat16, not {y.dtype.name} and {jnp.dtype(out_dtype).name}"
    if importlib.util.find_spec("numba") is None:
        return "needs the package numba, which is not installed"
    return None if cpu_has("avx2") else "needs a CPU with avx2"
