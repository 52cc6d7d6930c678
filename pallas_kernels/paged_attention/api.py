"""What does paged attention promise, and which implementation keeps the promise here?"""

import functools
import importlib.util
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt16

from pallas_kernels.device import platform, why_not_hopper
from pallas_kernels.paged_attention import reference, triton_gpu, xla
from pallas_kernels.paged_attention.arg_specs import Rows


def paged_attention(
    q: Float[Array, "T H h"],
    k_pages: Float[Array, "L N K p h"] | UInt16[Array, "L N K p h"],
    v_pages: Float[Array, "L N K p h"] | UInt16[Array, "L N K p h"],
    layer: int,
    kv_lens: Int32[Array, "R"],
    page_indices: Int32[Array, "R P"],
    cu_q_lens: Int32[Array, "R+1"],
    num_decode: Int32[Array, ""],
    *,
    sm_scale: float | None = None,
    implementation: str | None = None,
    only: Rows | None = None,
    others: Float[Array, "T H h"] | None = None,
) -> Float[Array, "T H h"]:
    """Causal attention of a flat ragged batch over keys and values in pages.

    The first `num_decode` rows have one query token each, the others (prefill chunks) any number; rows without query
    tokens come last.  Query token i of row r, `cu_q_lens[r] <= i < cu_q_lens[r + 1]`, sits at position
    `kv_lens[r] - cu_q_lens[r + 1] + i` and sees the positions up to its own.  Their keys and values are in the pages
    already: position s of row r lies in page `page_indices[r, s // p]` at offset `s % p`.  Nothing else is read into
    a result, so other pages and the rest of a row's last page may hold anything, NaN too.

    Args:
      q: query heads in order of their KV head, `G = H // K` for each.
      k_pages, v_pages: the caches of all layers; uint16 pages hold the bits of bfloat16 values.
      layer: which of the L caches to read.
      kv_lens: tokens of each row, this step's included; at least the row's query tokens.
      page_indices: entries beyond `ceil(kv_lens[r] / p)` are ignored; all are in [0, N).
      cu_q_lens: prefix sum of query tokens; tokens from `cu_q_lens[-1]` on are padding.
      num_decode: at most min(R, T).
      sm_scale: factor on the scores, positive; 1 / sqrt(h) if None.
      implementation: None is the best one for the default platform: "triton" on an NVIDIA GPU where Triton is installed,
        without it "mosaic_gpu" on compute capability 9 for the shapes and dtypes it has kernels for; "numba" on a CPU for
        pages of uint16 or float32 where numba is installed; else "xla".
      only: the rows whose results are wanted, if not all: on a GPU the other kind's kernels are not launched then.
      others: with `only="prefill"`, results of the decode rows, to be given back among the others; their memory is reused.

    Returns:
      Weighted values in the dtype of `q`, accumulated in float32; 0 for padding tokens, anything for rows not wanted.

    Raises:
      ValueError: H is no multiple of K, `layer` is not in [0, L), `sm_scale` is not positive, or `others` are given without
        `only="prefill"`.
      NotImplementedError: the implementation named does not exist, or cannot run here or on these dtypes.
    """
    num_heads, head_dim = q.shape[1:]
    num_layers, _, num_kv_heads = k_pages.shape[:3]
    if num_heads % num_kv_heads:
        raise ValueError(f"H={num_heads} query heads are no multiple of K={num_kv_heads} KV heads")
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer={layer} is not in [0, {num_layers})")
    if sm_scale is not None and not sm_scale > 0:
        raise ValueError(f"sm_scale={sm_scale} must be positive")
    if others is not None and only != "prefill":
        raise ValueError(f"others are the decode rows of only='prefill', not of only={only!r}")
    if implementation is None:
        reasons = {
            "triton": _why_not_triton(q, k_pages, v_pages),
            "mosaic_gpu": _why_not_mosaic_gpu(q, k_pages, v_pages),
            "numba": _why_not_numba(k_pages, v_pages),
        }
        implementation = next((name for name, reason in reasons.items() if reason is None), "xla")
    match implementation:
        case "xla":
            attend = xla.paged_attention
        case "numba":
            reason = _why_not_numba(k_pages, v_pages)
            if reason is not None:
                raise NotImplementedError(f"implementation='numba' {reason}")
            from pallas_kernels.paged_attention import numba_cpu  # takes a second: only where it is used

            attend = numba_cpu.paged_attention
        case "triton":
            reason = _why_not_triton(q, k_pages, v_pages)
            if reason is not None:
                raise NotImplementedError(f"implementation='triton' {reason}")
            attend = functools.partial(triton_gpu.paged_attention, only=only, others=others)
        case "mosaic_gpu":
            reason = _why_not_mosaic_gpu(q, k_pages, v_pages)
            if reason is not None:
                raise NotImplementedError(f"implementation='mosaic_gpu' {reason}")
            from pallas_kernels.paged_attention import mosaic_gpu  # Mosaic GPU loads slowly: only where it is used

            attend = functools.partial(mosaic_gpu.paged_attention, only=only)
        case "reference":
            attend = reference.paged_attention
        case _:
            names = "'mosaic_gpu', 'numba', 'reference', 'triton', 'xla'"
            raise NotImplementedError(f"implementation={implementation!r} is none of {names}")
    scale = 1 / math.sqrt(head_dim) if sm_scale is None else sm_scale
    out = attend(q, k_pages, v_pages, layer, kv_lens, page_indices, cu_q_lens, num_decode, sm_scale=scale)
    if others is None or implementation == "triton":
        return out
    return jnp.where((jnp.arange(q.shape[0]) < num_decode)[:, None, None], others, out)


def _why_not_triton(q, k_pages, v_pages) -> str | None:
    """What keeps `triton_gpu` from the call, None if nothing does."""
    return triton_gpu.why_not(q.shape[1], k_pages.shape[2], q.shape[2], q.dtype, k_pages.dtype, v_pages.dtype)


def _why_not_numba(k_pages, v_pages) -> str | None:
    """What keeps `numba_cpu` from the call, None if nothing does."""
    if platform() != "cpu":
        return f"runs on 'cpu', not on {platform()!r}"
    if importlib.util.find_spec("numba") is None:
        return "needs the package numba, which is not installed"
    dtypes = (k_pages.dtype.name, v_pages.dtype.name)
    if dtypes not in (("uint16", "uint16"), ("float32", "float32")):
        return f"reads keys and values both in uint16 (the bits of bfloat16) or both in float32, not in {dtypes}"
    return None


def _why_not_mosaic_gpu(q, k_pages, v_pages) -> str | None:
    """What keeps `mosaic_gpu` from the call, None if nothing does."""
    reason = why_not_hopper()
    if reason is not None:
        return reason
    from pallas_kernels.paged_attention import mosaic_gpu

    return mosaic_gpu.why_not(q, k_pages, v_pages)
