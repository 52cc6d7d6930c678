"""How do Mosaic GPU kernels multiply, mask and fetch tiles, on a GPU and in JAX's GPU interpreter alike?

The interpreters (jax 0.10 and 0.11) know no wgmma operand that is transposed or lies in registers, and no register
layouts.  There, and only there, a tile is loaded and multiplied in plain JAX; barriers, TMA copies and every access to
shared memory are the same, so that races and out-of-bounds accesses are found as if on a GPU.
"""

import inspect
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

MASKED = -1e30  # below each real score, yet finite: differences and exp2 stay free of NaN
SUBLANES, SWIZZLE_BYTES = 8, 128  # a tile in shared memory as wgmma reads it: 8 rows of 128 swizzled bytes
HALF = 64  # rows of one wgmma
SMEM_BYTES = 232_448  # what one CTA may use on Hopper
# jax 0.10 wants an index of what is loaded, jax 0.11 warns of one.
NO_INDEX = ((),) if inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty else ()

# None compiles for the GPU; else `InterpretGPUParams`, whose place in JAX depends on the version.
Interpret = typing.Any


def operand(shape: tuple[int, ...], dtype):
    """Shared memory that wgmma can read; the last dimension is a multiple of 64."""
    minor = SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((SUBLANES, minor)), plgpu.SwizzleTransform(128)))


def kernel(body, *, interpret: Interpret, approx_math: bool = True, **options):
    """`plgpu.kernel` for `body` with layouts inferred, which is the default from jax 0.11 on."""
    params = plgpu.CompilerParams(approx_math=approx_math, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
    interpreted = {} if interpret is None else {"interpret": interpret}
    return plgpu.kernel(body, compiler_params=params, **interpreted, **options)


def transposed(ref):
    """The [n m] view of an [m n] reference."""
    return ref.transpose((1, 0))


def matmul(
    a,
    b,
    interpret: Interpret,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    acc=None,
    meanwhile=lambda: None,
) -> typing.Any:
    """[m k] x [k n] -> float32 [m n] in registers; `a` is a reference or a value in registers, `b` a reference.

    With `acc` [m n], it plus the product.  `meanwhile()` is called while the tensor cores work.
    """
    if interpret is not None:
        a, b = a[...], b[...]
        plgpu.commit_smem()  # wgmma's reads, which these stand for, need no fence before TMA writes to the same memory
        a, b = a.T if transpose_a else a, b.T if transpose_b else b
        product = jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        meanwhile()
        return product if acc is None else acc + product
    a, b = transposed(a) if transpose_a else a, transposed(b) if transpose_b else b

    def multiply(ref):
        plgpu.wgmma(ref, a, b)
        meanwhile()

    def multiply_anew(ref):
        multiply(ref)
        return ref[...]

    if acc is None:
        return pl.run_scoped(multiply_anew, plgpu.ACC((int(a.shape[0]), int(b.shape[1])), jnp.float32))
    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def store_transposed(ref, value, interpret: Interpret) -> None:
    """Write a [m n] value to an [n m] reference."""
    if interpret is not None:
        ref[...] = value.T
    else:
        transposed(ref)[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)


def as_accumulator(x, interpret: Interpret):
    """`x` in the registers in which wgmma leaves its results."""
    return x if interpret is not None else plgpu.layout_cast(x, plgpu.Layout.WGMMA)


def iota(shape: tuple[int, int], dimension: int, interpret: Interpret):
    """Row or column numbers, int32, laid out as wgmma leaves its results."""
    if interpret is not None:
        return lax.broadcasted_iota(jnp.int32, shape, dimension)
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=plgpu.Layout.WGMMA)


def row_accumulator(num_rows: int, value: float, interpret: Interpret):
    """float32 [num_rows], one value for each row of what wgmma leaves."""
    column = jnp.full((num_rows,), value, jnp.float32)
    return column if interpret is not None else plgpu.layout_cast(column, plgpu.Layout.WGMMA.reduce(1))


def iota_of_rows(num_rows: int, interpret: Interpret):
    """int32 [num_rows], laid out as `row_accumulator`."""
    if interpret is not None:
        return lax.iota(jnp.int32, num_rows)
    return plgpu.broadcasted_iota(jnp.int32, (num_rows,), 0, layout=plgpu.Layout.WGMMA.reduce(1))


def load(ref, layout, interpret: Interpret):
    """The values of a reference in registers of the given layout."""
    return ref[...] if interpret is not None else plgpu.load(ref, *NO_INDEX, layout=layout, optimized=False)


def spread(vector, shape: tuple[int, ...], dimension: int):
    """A vector along `dimension` of a matrix, repeated along the other."""
    return lax.broadcast_in_dim(vector, shape, [dimension])


def clear_beyond(tile, num_valid, interpret: Interpret, rows: range) -> None:
    """Zero the rows from `num_valid` on among `rows` of a tile: weight 0 times whatever is there must be 0."""
    for first in rows[::HALF]:
        half = tile.at[pl.ds(first, HALF)]
        row = first + iota(half.shape, 0, interpret)
        value = load(half, plgpu.Layout.WGMMA, interpret)
        half[...] = jnp.where(row < num_valid, value, jnp.zeros((), value.dtype))
    plgpu.commit_smem()


def fetch_pages(pages, kv_head, page_ids, num_pages, tile, barrier) -> None:
    """Start one TMA copy for each page of a tile; a page that the row does not have just counts as arrived.

    pages: [L*N K p h] in global memory.  page_ids: scalars, the tile's pages in order.  tile: [pages*p h].  The
    barrier takes one arrival for each page.
    """
    page_size = pages.shape[2]
    for i, page_id in enumerate(page_ids):

        def copy(i=i, page_id=page_id):
            place = tile.at[pl.ds(i * page_size, page_size)]
            plgpu.copy_gmem_to_smem(pages.at[page_id, kv_head], place, barrier)

        lax.cond(i < num_pages, copy, lambda: plgpu.barrier_arrive(barrier))


def page_ids_of(table, row, first, num_pages, first_of_layer, count: int) -> list[jax.Array]:
    """Places in the flat page axis of `count` pages of a row from its page `first` on; the last one repeats."""
    last = first + jnp.maximum(num_pages, 1) - 1
    return [first_of_layer + table[row, jnp.minimum(first + i, last)] for i in range(count)]
