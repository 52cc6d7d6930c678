"""How do both operations run in one launch?  One persistent kernel whose CTAs take their role by number.

CTAs 0 .. M-1 multiply, the others attend.  Each role's shared memory is allocated in its own branch, so that a CTA has room
for the larger of the two, and with it a multiprocessor to itself; no order of launches can keep one waiting for the other.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.inlined import inlined
from pallas_kernels.matmul import mosaic_gpu as matmul
from pallas_kernels.matmul.mosaic_gpu import Config
from pallas_kernels.overlap import sm_exclusive
from pallas_kernels.overlap.shares import Split
from pallas_kernels.paged_attention import mosaic_decode, mosaic_gpu
from pallas_kernels.paged_attention.mosaic_decode_plan import DecodeShape


def run(
    operands: tuple[Array, ...],
    attention: dict[str, Any],
    split: Split,
    *,
    out_dtype: Any,
    config: Config | None = None,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """The product and the attended heads; `attention` as in `sm_exclusive.prepare`."""
    x, kernel, *residual = operands
    shape = matmul.shape_of(
        x, kernel, residual[0] if residual else None, num_ctas=split.matmul, out_dtype=out_dtype, config=config
    )
    call = sm_exclusive.prepare(split.attention, attention, num_workers=1)  # a product has three warpgroups
    q, k_pages, v_pages, table = call.inputs
    k_pages, v_pages, first_page = mosaic_gpu.end_to_end(k_pages, v_pages, call.layer)
    inputs = mosaic_decode.kernel_inputs(q, k_pages, v_pages, first_page, table, call.schedule, call.shape)
    num_parts = call.schedule.parts.shape[0]
    make = _kernel if interpret is None else functools.partial(_make_kernel, interpret=interpret)
    both = make(shape, call.shape, num_parts, q.dtype)
    product, acc, lse = both(x, kernel.reshape(shape.k, shape.n), *residual, *inputs)
    return product, mosaic_decode.merge_parts(acc, lse, q, call.schedule, call.shape, interpret)


def _make_kernel(shape: matmul.Shape, decode: DecodeShape, num_parts: int, dtype: Any, interpret: Any) -> Any:
    num_to_multiply = 3 if shape.has_residual else 2
    out_types = [
        jax.ShapeDtypeStruct((shape.m, shape.n // shape.parts), shape.out_dtype),
        *mosaic_decode.part_types(decode, num_parts),
    ]

    def matmul_and_decode_attention(*refs):
        inputs, (product, *parts) = refs[: -len(out_types)], refs[-len(out_types) :]
        # JAX's GPU interpreter keeps the number of a warpgroup from where it is first asked for: not inside of a branch.
        lax.axis_index("warpgroup")

        def multiply(**scratch):
            refs = (*inputs[:num_to_multiply], product)
            matmul.multiply_tiles(shape, lax.axis_index("cta"), refs, scratch)

        def attend(**scratch):
            refs = (*inputs[num_to_multiply:], *parts)
            mosaic_decode.attend_parts(decode, lax.axis_index("cta") - shape.num_ctas, refs, scratch, interpret)

        # One branch or the other, not two conditions in a row: behind a role that has handed registers from one warpgroup to
        # another the compiler would not know how many there are, give none away and spill.
        lax.cond(
            lax.axis_index("cta") < shape.num_ctas,
            lambda: pl.run_scoped(multiply, collective_axes="warpgroup", **shape.scratch()),
            lambda: pl.run_scoped(attend, collective_axes="warpgroup", **decode.scratch(dtype)),
        )

    return matmul.launch(matmul_and_decode_attention, shape.num_ctas + decode.num_ctas, interpret, out_type=out_types)


@functools.cache
def _kernel(shape: matmul.Shape, decode: DecodeShape, num_parts: int, dtype: Any) -> Any:
    return inlined(_make_kernel(shape, decode, num_parts, dtype, None))
