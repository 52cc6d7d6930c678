"""How does attention over pages run on NVIDIA GPUs from Ampere on?  Launches of the kernels in `triton_kernels`.

Three kernels one after another: decode rows by splits of their keys, the merge of the splits, prefill chunks by tiles of their
queries; those that are wanted.  All they read is the step's own arrays, so the call is custom calls and nothing else: it fits
into a CUDA graph, and into a call on a stream of its own.
"""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, UInt16

from pallas_kernels.device import compute_capability, num_multiprocessors
from pallas_kernels.paged_attention.arg_specs import Rows
from pallas_kernels.triton_call import triton_call
from pallas_kernels.triton_call import why_not as why_not_triton

HEAD_DIMS = (16, 32, 64, 128)
MAX_GROUP = 32


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the kernels' tiles and grids.

    decode_block, prefill_block: keys that a program takes at a time, a power of 2.
    prefill_tile: queries times query heads of a KV head in a program, a power of 2.
    *_warps, *_stages: warps of a program; blocks on their way from memory.
    min_split: keys of a decode row are not cut into pieces of fewer tokens.
    splits_per_program: pieces for each program of the decode kernel, about; more of them balance better.
    num_programs: programs of each kernel; None takes `programs_per_core` for each streaming multiprocessor.  A small number
      leaves multiprocessors free for work beside.
    """

    decode_block: int = 32
    decode_warps: int = 4
    decode_stages: int = 4
    prefill_tile: int = 128
    prefill_block: int = 64
    prefill_warps: int = 8
    prefill_stages: int = 3
    merge_warps: int = 4
    min_split: int = 256
    splits_per_program: int = 4
    programs_per_core: int = 4
    num_programs: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:  # num_programs
                continue
            if value <= 0:
                raise ValueError(f"{field.name}={value} must be positive")
            if field.name.endswith(("_block", "_tile", "_warps")) and value & (value - 1):
                raise ValueError(f"{field.name}={value} must be a power of 2")
        for name in ("decode_block", "prefill_block", "prefill_tile"):
            if getattr(self, name) < 16:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 16, what a tensor core multiplies")


def default_config(dtype: DTypeLike, capability: int) -> Config:
    """Sizes for products in `dtype` that spill no registers, for GPUs of that compute capability."""
    if jnp.dtype(dtype).itemsize == 4:  # for tests: these products run outside of the tensor cores
        return Config(decode_stages=2, prefill_tile=32, prefill_block=32, prefill_stages=2)
    return Config() if capability >= 90 else Config(prefill_block=32)


def why_not(num_heads: int, num_kv_heads: int, head_dim: int, *dtypes: DTypeLike) -> str | None:
    """What keeps the kernels from a call, None if nothing does."""
    reason = why_not_triton()
    if reason is not None:
        return reason
    if head_dim not in HEAD_DIMS:
        return f"takes heads of {HEAD_DIMS} values, not of {head_dim}"
    if num_heads // num_kv_heads > MAX_GROUP:
        return f"takes up to {MAX_GROUP} query heads for each KV head, not {num_heads // num_kv_heads}"
    names = [jnp.dtype(dtype).name for dtype in dtypes]
    if not set(names) <= {"bfloat16", "float16", "float32", "uint16"}:
        return f"takes bfloat16, float16, float32 and bits of bfloat16 as uint16, not {names}"
    return None


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
    sm_scale: float,
    config: Config | None = None,
    only: Rows | None = None,
    others: Float[Array, "T H h"] | None = None,
) -> Float[Array, "T H h"]:
    """Attention as `api.paged_attention` defines it; products in the wider of the dtypes of `q` and the pages.

    Temporary memory: float32 results of the splits, `(min(R, T) + splits) * H * (h + 1)` values.

    Raises NotImplementedError as `triton_call.triton_call` does; the caller has asked `why_not`.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[2]
    from pallas_kernels.paged_attention import triton_kernels  # imports Triton: only where it is used

    value_dtypes = [jnp.bfloat16 if pages.dtype == jnp.uint16 else pages.dtype for pages in (k_pages, v_pages)]
    dtype = jnp.result_type(q.dtype, *value_dtypes)
    if config is None:
        config = default_config(dtype, compute_capability() or 0)
    group = num_heads // num_kv_heads
    if config.prefill_tile < group:
        raise ValueError(f"prefill_tile={config.prefill_tile} holds no query of {group} heads")
    programs = config.num_programs or config.programs_per_core * num_multiprocessors()
    num_rows = kv_lens.shape[0]
    extra_splits = -(-config.splits_per_program * programs // num_kv_heads)
    num_splits = min(num_rows, num_tokens) + extra_splits

    rows = {"ROWS": _power_of_2(num_rows)}
    cache = {"K": num_kv_heads, "PAGE": k_pages.shape[3], "D": head_dim, "G": group, **rows}
    splits = {"BLOCK": config.decode_block, "MIN_SPLIT": config.min_split, "EXTRA_SPLITS": extra_splits}
    # Products in units of log2: exp2 is an instruction, exp is not.
    product = {"SCALE": float(sm_scale) * math.log2(math.e), "DTYPE": _triton_dtype(dtype)}
    views = {1: value_dtypes[0], 2: value_dtypes[1]}
    scalars = {"layer": layer, "N": k_pages.shape[1], "P": page_indices.shape[1], "R": num_rows}

    out = jnp.zeros(q.shape, q.dtype) if others is None else others
    out_shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    if only != "prefill":
        partial, lse = triton_call(
            triton_kernels.decode,
            (q, k_pages, v_pages, kv_lens, page_indices, num_decode),
            [jax.ShapeDtypeStruct((num_splits, num_heads, *tail), jnp.float32) for tail in ((head_dim,), ())],
            scalars,
            {**cache, "TILE": max(16, _power_of_2(group)), **splits, **product},
            num_programs=programs,
            num_warps=config.decode_warps,
            num_stages=config.decode_stages,
            views=views,
        )
        (out,) = triton_call(
            triton_kernels.merge,
            (kv_lens, cu_q_lens, num_decode, partial, lse),
            [out_shape],
            {"T": num_tokens, "R": num_rows},
            {"H": num_heads, "HEADS": _power_of_2(num_heads), "D": head_dim, **rows, **splits},
            num_programs=min(programs, num_tokens),
            num_warps=config.merge_warps,
            num_stages=1,
        )
    if only == "decode":
        return out
    (out,) = triton_call(
        triton_kernels.prefill,
        (q, k_pages, v_pages, kv_lens, page_indices, cu_q_lens, num_decode, out),
        [out_shape],
        scalars,
        {**cache, "TILE": config.prefill_tile, "BLOCK": config.prefill_block, **product},
        num_programs=programs,
        num_warps=config.prefill_warps,
        num_stages=config.prefill_stages,
        views=views,
        aliases={7: 0},
    )
    return out


def _power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _triton_dtype(dtype: DTypeLike) -> typing.Any:
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    return getattr(tl, jnp.dtype(dtype).name)
