"""Which calls of our kernels are compiled for GPUs that are not there, and what should each need at least?  One list of real shapes.

A program is one call at one shape; its roofline is that of the call's work, whatever runs it.
"""

import dataclasses
import functools
import math
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments import compiled_code
from pallas_kernels.matmul import mosaic_gpu as persistent
from pallas_kernels.overlap import arg_specs as overlap_specs
from pallas_kernels.overlap import matmul_and_decode_attention
from pallas_kernels.overlap.api import FORMS
from pallas_kernels.overlap.arg_specs import Work
from pallas_kernels.paged_attention import arg_specs as attention_specs
from pallas_kernels.paged_attention import paged_attention

NUM_LAYERS, NUM_PAGES, LAYER = 32, 4096, 31
"""The cache that kernels read; its size changes no kernel."""
MAX_LEN = 4096  # of a row of the page table, in tokens

MOSAIC_ROLES = {
    "persistent_matmul": "matmul", "decode_attention_parts": "decode", "decode_attention_merge": "merge",
    "prefill_attention_tiles": "prefill", "matmul_and_decode_attention": "matmul or decode",
}  # fmt: skip
"""By the Python function that Mosaic names a kernel after, a number behind it."""
ASSUMED_CTAS: Mapping[tuple[str, str, str], int] = {
    ("triton", "decode", "h200"): 4, ("triton", "merge", "h200"): 4, ("triton", "prefill", "h200"): 1,
    ("triton", "decode", "a100"): 3, ("triton", "merge", "a100"): 4, ("triton", "prefill", "a100"): 1,
    ("mosaic_gpu", "decode", "h200"): 1, ("mosaic_gpu", "prefill", "h200"): 1, ("mosaic_gpu", "matmul", "h200"): 1,
    ("sm_exclusive", "decode", "h200"): 1, ("sm_exclusive", "matmul", "h200"): 1,
    ("capped_grid", "decode", "h200"): 2, ("capped_grid", "matmul", "h200"): 1,
    ("fused", "matmul or decode", "h200"): 1,
}  # fmt: skip
"""CTAs on a multiprocessor that tiles and grids were chosen for, by implementation, kernel and target."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A call.

    operation: paged_attention, matmul or overlap.    implementation: what runs it.    shape: name of its arguments.
    targets: GPUs that it can be compiled for.    args: shapes of the arrays.
    """

    operation: str
    implementation: str
    shape: str
    targets: tuple[str, ...]
    call: Callable[..., Any]
    args: Sequence[Any]
    work: Work

    @property
    def name(self) -> str:
        """Unique."""
        return f"{self.operation}/{self.implementation}/{self.shape}"


@functools.cache
def programs() -> dict[str, Program]:
    """Name -> program."""
    return {program.name: program for program in (*_attention(), *_matmul(), *_overlap())}


def compile_program(gpu_name: str, name: str) -> list[dict[str, Any]]:
    """A row per kernel of ours in the program.  Raises what JAX and XLA raise."""
    program, gpu = programs()[name], compiled_code.target(gpu_name)
    code = compiled_code.compile_for(gpu, program.call, program.args)
    rows = []
    for kernel in code.kernels:
        if kernel.compiler == "xla":
            continue
        role = MOSAIC_ROLES[kernel.name.rpartition("_")[0]] if kernel.compiler == "mosaic" else kernel.name
        rows.append({
            "operation": program.operation, "implementation": program.implementation, "shape": program.shape,
            "kernel": role, "compiler": kernel.compiler, "ctas": kernel.num_blocks, "registers": kernel.registers,
            "threads": kernel.num_threads, "spill_bytes": kernel.spill_bytes, "smem_bytes": kernel.smem_bytes,
            "smem_limit_bytes": gpu.number("shared_memory_per_block_optin"),
            "ctas_per_sm": gpu.blocks_per_core(kernel),
            "assumed_ctas_per_sm": ASSUMED_CTAS.get((program.implementation, role, gpu_name)),
        })  # fmt: skip
    if not rows:
        raise ValueError(f"program {name!r} has no kernel of ours on {gpu_name}")
    return rows


def compile_apart(gpu_name: str, names: Sequence[str], num_processes: int) -> list[dict[str, Any]]:
    """`compile_program` of each, in processes of their own: Mosaic compiles, and reports on, a kernel once in a process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(num_processes, maxtasksperchild=1) as pool:
        found = pool.imap(functools.partial(compile_program, gpu_name), names, chunksize=1)
        return [row for rows in found for row in rows]


def _bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _int32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _attention():
    for spec in attention_specs.GPU_SPECS:
        args = attention_specs.arg_shapes(spec, jnp.bfloat16, num_layers=NUM_LAYERS, num_pages=NUM_PAGES)
        q_and_out_bytes = 2 * spec.num_tokens * spec.num_heads * spec.head_dim * overlap_specs.BF16_BYTES
        work = Work(spec.flops(), spec.kv_bytes(jnp.bfloat16) + q_and_out_bytes)
        for implementation, targets in (("triton", ("h200", "a100")), ("mosaic_gpu", ("h200",))):
            attend = functools.partial(paged_attention, layer=LAYER, implementation=implementation)
            yield Program(
                "paged_attention", implementation, spec.name, targets, lambda args, f=attend: f(**args), (args,), work
            )


def _operands(spec: overlap_specs.ArgSpec) -> tuple[tuple[Any, ...], Any]:
    """Shapes of activations, weights and, if there is one, the residual stream; dtype of the result."""
    kernel = _bf16(spec.width, *((2,) if spec.is_gated else ()), spec.num_columns)
    residual = (jax.ShapeDtypeStruct((spec.num_tokens, spec.num_columns), jnp.float32),) if spec.has_residual else ()
    return (_bf16(spec.num_tokens, spec.width), kernel, *residual), jnp.float32 if residual else jnp.bfloat16


def _matmul():
    num_ctas = compiled_code.target("h200").number("core_count")
    for spec in overlap_specs.ARG_SPECS:
        operands, out_dtype = _operands(spec)
        multiply = functools.partial(persistent.matmul, num_ctas=num_ctas, out_dtype=out_dtype)
        yield Program("matmul", "mosaic_gpu", spec.name, ("h200",), multiply, operands, spec.matmul)


def _overlap():
    for spec in overlap_specs.ARG_SPECS:
        operands, out_dtype = _operands(spec)
        pages = _bf16(NUM_LAYERS, NUM_PAGES, spec.num_kv_heads, spec.page_size, spec.head_dim)
        rows = {
            "q": _bf16(spec.num_rows, spec.num_heads, spec.head_dim), "k_pages": pages, "v_pages": pages,
            "kv_lens": _int32(spec.num_rows), "page_indices": _int32(spec.num_rows, math.ceil(MAX_LEN / spec.page_size)),
            "num_decode": _int32(),
        }  # fmt: skip
        for form in FORMS:

            def pair(operands, rows, form=form, out_dtype=out_dtype):
                x, kernel, *residual = operands
                return matmul_and_decode_attention(
                    x, kernel, residual[0] if residual else None, layer=LAYER, form=form, out_dtype=out_dtype, **rows
                )

            yield Program("overlap", form, spec.name, ("h200",), pair, (operands, rows), spec.matmul + spec.attention)
