"""How fast are the kernels that are there already?  XLA's, cuDNN's and JAX's own, in the jobs of the report.

Decode attention gets the same pages where a kernel takes pages, and the same tokens end to end where it does not.
Sources: jax.nn.dot_product_attention; jax._src.cudnn.fused_attention_stablehlo.paged_attention (a private module: a
baseline only); jax.experimental.pallas.ops.gpu.paged_attention (Triton, deprecated in jax 0.11); XLA's cuBLAS calls.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.gpu_report import forms
from experiments.gpu_report.cases import Case, Setting
from experiments.gpu_report.jobs import (
    attention_columns,
    decode_specs,
    num_inner,
    prefill_specs,
)
from experiments.gpu_report.programs import Comparison, timing_case
from pallas_kernels.paged_attention.arg_specs import ArgSpec


def cases(setting: Setting) -> list[Case]:
    """Prefill, then decode.  cuBLAS is timed beside the report's own products, in `kernel_speed` and `cta_curves`."""
    return [timing_case(comparison, setting) for comparison in comparisons(setting.is_smoke)]


def comparisons(is_smoke: bool) -> list[Comparison]:
    """Everything that is timed."""
    found = [_prefill(spec, is_smoke) for spec in prefill_specs(is_smoke)[:2]]
    return found + [_decode(spec, is_smoke) for spec in decode_specs(is_smoke)]


def _prefill(spec: ArgSpec, is_smoke: bool) -> Comparison:
    """Whole prompts, contiguous: [B, T, H, h]."""
    num_rows, length, inner = len(spec.q_lens), spec.q_lens[0], num_inner(is_smoke)

    def args() -> tuple:
        keys = jax.random.split(jax.random.key(0), 3)
        heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        return tuple(
            jax.random.normal(key, (num_rows, length, n, spec.head_dim), jnp.bfloat16)
            for key, n in zip(keys, heads, strict=True)
        )

    programs = {"jax.nn cudnn": _dense_attention("cudnn", inner), "jax.nn xla": _dense_attention("xla", inner)}
    if is_smoke:
        del programs["jax.nn cudnn"]
    if length > 1024:  # the scores of all heads would not leave room for anything else
        del programs["jax.nn xla"]
    pairs = num_rows * length * (length + 1) // 2
    values = num_rows * length * spec.head_dim * (2 * spec.num_heads + 2 * spec.num_kv_heads)
    return Comparison(
        f"contiguous {spec.name}", args, programs, flops=4.0 * pairs * spec.num_heads * spec.head_dim,
        num_bytes=2.0 * values, num_inner=inner, columns={"job": f"prefill-{num_rows}x{length}"},
    )  # fmt: skip


def _dense_attention(implementation: Any, num_runs: int) -> Callable[..., Any]:
    def attend(q, k, v):
        for _ in range(num_runs):
            q = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
        return q

    return attend


def _decode(spec: ArgSpec, is_smoke: bool) -> Comparison:
    """One query per row.  The pool of pages is as cuDNN demands, exactly the table's size."""
    num_pages, inner = spec.num_rows * spec.pages_per_row, num_inner(is_smoke)

    def args() -> tuple:
        keys = jax.random.split(jax.random.key(0), 2 * inner + 1)
        q = jax.random.normal(keys[0], (spec.num_rows, spec.num_heads, spec.head_dim), jnp.bfloat16)
        pool = (num_pages, spec.num_kv_heads, spec.page_size, spec.head_dim)
        layers = [jax.random.normal(key, pool, jnp.bfloat16) for key in keys[1:]]
        table = np.random.default_rng(0).permutation(num_pages).reshape(spec.num_rows, -1)
        kv_lens = [*spec.kv_lens, *[1] * (spec.num_rows - len(spec.kv_lens))]
        return q, layers[::2], layers[1::2], jnp.asarray(kv_lens, jnp.int32), jnp.asarray(table, jnp.int32)

    programs: dict[str, Callable[..., Any]] = {"nanojax reference": _in_layers(_nanojax("reference"))}
    if not is_smoke:
        programs = {
            "nanojax xla": _in_layers(_nanojax("xla")),
            "cudnn paged": _in_layers(_cudnn_paged),
            "pallas ops paged_attention": _in_layers(_pallas_paged),
            "jax.nn cudnn, contiguous": _in_layers(_contiguous),
        }
    spec = dataclasses.replace(spec, q_lens=(1,) * len(spec.q_lens))
    return Comparison(
        f"decode {spec.name}", args, programs, flops=spec.flops(), num_bytes=spec.kv_bytes(jnp.bfloat16),
        num_inner=inner, columns=attention_columns(spec),
    )  # fmt: skip


def _in_layers(attend: Callable[..., Any]) -> Callable[..., Any]:
    """One call per layer, each result being the next query."""

    def run(q, ks, vs, kv_lens, table):
        for k, v in zip(ks, vs, strict=True):
            q = attend(q, k, v, kv_lens, table).astype(q.dtype)
        return q

    return run


def _nanojax(implementation: str) -> Callable[..., Any]:
    def attend(q, k, v, kv_lens, table):
        num_rows = q.shape[0]
        cu_q_lens = jnp.arange(num_rows + 1, dtype=jnp.int32)
        call = forms.attention(implementation, 0)
        return call(q, k[None], v[None], kv_lens, table, cu_q_lens, jnp.int32(num_rows))

    return attend


def _cudnn_paged(q, k, v, kv_lens, table):
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, paged_attention

    pages = table[:, None, :, None]
    result: Any = paged_attention(
        q[:, :, None], k, v, jnp.ones_like(kv_lens), kv_lens, pages, pages, scale=q.shape[-1] ** -0.5,
        mask_type=MaskType.PADDING, qkv_layout="BNTH",
    )  # fmt: skip
    return jnp.reshape(result, q.shape)


def _pallas_paged(q, k, v, kv_lens, table):
    """JAX's kernel has the heads in front: the same memory, read as if they were."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    num_pages, num_kv_heads, page_size, head_dim = k.shape
    pages = [x.reshape(num_kv_heads, num_pages, page_size, head_dim) for x in (k, v)]
    per_row = table.shape[1]
    splits = next(n for n in (16, 8, 4, 2, 1) if per_row % n == 0)
    block = next(n for n in (8, 4, 2, 1) if per_row // splits % n == 0)
    scaled = (q * head_dim**-0.5).astype(q.dtype)
    return paged_attention(scaled, *pages, table, kv_lens, k_splits=splits, pages_per_compute_block=block)


def _contiguous(q, k, v, kv_lens, table):
    """Keys and values of each row end to end, padded to the longest: the same memory again."""
    shape = (q.shape[0], table.shape[1] * k.shape[2], k.shape[1], k.shape[3])
    k, v = k.reshape(shape), v.reshape(shape)
    result = jax.nn.dot_product_attention(
        q[:, None],
        k,
        v,
        key_value_seq_lengths=kv_lens,
        query_seq_lengths=jnp.ones_like(kv_lens),
        implementation="cudnn",
    )
    return result[:, 0]
