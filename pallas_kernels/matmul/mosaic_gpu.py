"""How does a given number of Hopper's multiprocessors multiply matrices?  Persistent CTAs, each with a fixed list of tiles.

CTA i of C takes output tiles i, i + C, i + 2C, ...: rows first, so that CTAs at work at the same time share columns of the
weights, which memory then delivers once.  One warpgroup fetches operands by TMA into a ring of shared memory, two multiply,
64 rows of the tile each.  What follows the product on the same values - SwiGLU, adding the residual stream, rounding - is
done in registers, one pass over memory less.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.inlined import inlined

NUM_CONSUMERS, PRODUCER = 2, 2
NUM_WARPGROUPS = 3
ROWS = 64  # of a consumer's share of a tile: those of one wgmma
ROW_BYTES = 128  # of a tile in shared memory, swizzled
SMEM_BYTES = 232_448  # what one CTA may use on Hopper
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232  # of 65,536 for 384 threads, which start with 168 each
BARRIER_BYTES = 1024  # more than all barriers take, with alignment
NARROW_COST = (
    1.15  # time per column of a tile of 128, assumed: it reads a third more shared memory for the same products
)

Epilogue = Literal["swiglu"] | None
Interpret = Any  # `InterpretGPUParams`, whose place in JAX depends on the version; None compiles for the GPU


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes: `tile_n` columns of the weights (with SwiGLU, half of them gate and half up); blocks of operands in flight."""

    tile_n: int = 256
    tile_k: int = 64
    num_stages: int = 4

    def __post_init__(self) -> None:
        if self.tile_n not in (128, 256) or self.tile_k != 64 or self.num_stages < 2:
            raise ValueError(f"{self} must have tile_n 128 or 256, tile_k 64 and num_stages >= 2")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for: [m k] x [k n] by `num_ctas` CTAs; the result is [m n], with SwiGLU [m n/2]."""

    m: int
    k: int
    n: int
    dtype: jnp.dtype
    out_dtype: jnp.dtype
    epilogue: Epilogue
    has_residual: bool
    config: Config
    num_ctas: int

    @property
    def tile_m(self) -> int:
        """Rows of a tile."""
        return NUM_CONSUMERS * ROWS

    @property
    def parts(self) -> int:
        """Column ranges of the weights that make up a tile."""
        return 2 if self.epilogue == "swiglu" else 1

    @property
    def out_tile_n(self) -> int:
        """Columns of the result that a tile gives."""
        return self.config.tile_n // self.parts

    @property
    def num_tiles(self) -> int:
        """Of all CTAs."""
        return self.m // self.tile_m * (self.n // self.config.tile_n)

    @property
    def slice_n(self) -> int:
        """Columns of the result that are written at a time."""
        return ROW_BYTES // jnp.dtype(self.out_dtype).itemsize

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA, barriers rounded up."""
        itemsize = jnp.dtype(self.dtype).itemsize
        ring = self.config.num_stages * self.config.tile_k * (self.tile_m + self.config.tile_n) * itemsize
        return ring + NUM_CONSUMERS * 2 * ROWS * ROW_BYTES + BARRIER_BYTES

    def scratch(self) -> dict[str, Any]:
        """Shared memory and barriers."""
        config, stages = self.config, self.config.num_stages
        return {
            "x_smem": _tile((stages, self.tile_m, config.tile_k), self.dtype),
            "kernel_smem": _tile((stages, self.parts, config.tile_k, self.out_tile_n), self.dtype),
            "out_smem": _tile((NUM_CONSUMERS, 2, ROWS, self.slice_n), self.out_dtype),
            "full": plgpu.Barrier(num_arrivals=1 + self.parts, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=NUM_CONSUMERS, num_barriers=stages),
            "added": plgpu.Barrier(num_arrivals=1, num_barriers=2 * NUM_CONSUMERS),
        }


def _tile(shape: tuple[int, ...], dtype) -> Any:
    swizzled = ROW_BYTES // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, swizzled)), plgpu.SwizzleTransform(ROW_BYTES))
    )


def why_not(x, kernel) -> str | None:
    """What keeps the kernel from operands of these shapes [m k] and [k n] or [k 2 f] and dtypes; None if nothing does."""
    if x.dtype != kernel.dtype or kernel.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs operands both bfloat16 or both float16, not {x.dtype.name} and {kernel.dtype.name}"
    m, k, columns = *x.shape, kernel.shape[-1]
    step = 128 // (kernel.ndim - 1)
    if not m or m % 128 or k % 64 or columns % step:
        return f"needs [multiple of 128, of 64] x [.., multiple of {step}], not {list(x.shape)} x {list(kernel.shape)}"
    return None


def choose_config(m: int, n: int, num_ctas: int) -> Config:
    """The wider tile unless the narrower one, at `NARROW_COST`, has its last tile done sooner."""

    def time(tile_n: int) -> int:
        return -(-(m // 128 * (n // tile_n)) // num_ctas) * tile_n

    is_narrow = bool(n % 256) or NARROW_COST * time(128) < time(256)
    return Config(tile_n=128, num_stages=6) if is_narrow else Config()


def matmul(
    x: Float[Array, "m k"],
    kernel: Float[Array, "k n"] | Float[Array, "k 2 f"],
    residual: Float[Array, "m out"] | None = None,
    *,
    num_ctas: int,
    out_dtype=jnp.float32,
    config: Config | None = None,
    interpret: Interpret = None,
) -> Float[Array, "m out"]:
    """`x @ kernel`, sums in float32; a kernel of gate and up columns [k 2 f] gives `silu(gate) * up`, [m f].

    Args:
      residual: is added before the result is rounded; in `out_dtype`.
      num_ctas: each fills a multiprocessor for as long as the kernel runs.
      config: chosen by the shapes if None.

    Raises:
      NotImplementedError: as `why_not` says.
      ValueError: `num_ctas` is not positive, or `config` needs more shared memory than there is or does not divide n.
    """
    reason = why_not(x, kernel)
    if reason is not None:
        raise NotImplementedError(f"the persistent matmul {reason}")
    shape = shape_of(x, kernel, residual, num_ctas=num_ctas, out_dtype=out_dtype, config=config)
    run = _kernel(shape) if interpret is None else _make_kernel(shape, interpret)
    return run(x, kernel.reshape(shape.k, shape.n), *(() if residual is None else (residual,)))


def _make_kernel(shape: Shape, interpret: Interpret) -> Callable[..., Array]:
    scratch = shape.scratch()

    def persistent_matmul(*refs):
        inputs, buffers = refs[: -len(scratch)], refs[-len(scratch) :]
        multiply_tiles(shape, lax.axis_index("cta"), inputs, dict(zip(scratch, buffers, strict=True)))

    return launch(
        persistent_matmul,
        shape.num_ctas,
        interpret,
        out_type=jax.ShapeDtypeStruct((shape.m, shape.n // shape.parts), shape.out_dtype),
        scratch_types=list(scratch.values()),
    )


@functools.cache
def _kernel(shape: Shape) -> Callable[..., Array]:
    return inlined(_make_kernel(shape, None))


def shape_of(x, kernel, residual, *, num_ctas: int, out_dtype=jnp.float32, config: Config | None = None) -> Shape:
    """The `Shape` of a call.  Raises ValueError as `matmul` does."""
    if num_ctas < 1:
        raise ValueError(f"num_ctas={num_ctas} must be positive")
    (m, k), n = x.shape, kernel.size // kernel.shape[0]
    config = choose_config(m, n, num_ctas) if config is None else config
    epilogue: Epilogue = "swiglu" if kernel.ndim == 3 else None
    shape = Shape(m, k, n, x.dtype, jnp.dtype(out_dtype), epilogue, residual is not None, config, num_ctas)
    if n % config.tile_n or shape.smem_bytes > SMEM_BYTES or shape.out_tile_n % shape.slice_n:
        raise ValueError(f"{config} does not fit n={n} and {SMEM_BYTES} B of shared memory ({shape.smem_bytes} B)")
    return shape


def launch(body, num_ctas: int, interpret: Interpret, **options):
    """`plgpu.kernel` of `num_ctas` CTAs (axis "cta") with three warpgroups (axis "warpgroup")."""
    params = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
    interpreted = {} if interpret is None else {"interpret": interpret}
    return plgpu.kernel(
        body, grid=(num_ctas,), grid_names=("cta",), num_threads=NUM_WARPGROUPS, thread_name="warpgroup",
        compiler_params=params, **interpreted, **options,
    )  # fmt: skip


def multiply_tiles(shape: Shape, cta, refs, scratch: dict[str, Any]) -> None:
    """What CTA `cta` of `shape.num_ctas` does, with three warpgroups.

    refs: x [m k], kernel [k n], the residual if there is one, and the result, all in global memory.
    """
    x, kernel, *residual, out = refs
    num_tiles = (shape.num_tiles - cta + shape.num_ctas - 1) // shape.num_ctas
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == PRODUCER)
    def produce():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _fetch(shape, cta, num_tiles, x, kernel, scratch)

    @pl.when(warpgroup < NUM_CONSUMERS)
    def consume():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        lax.fori_loop(
            0, num_tiles, lambda i, _: _tile_of_consumer(shape, cta, i, warpgroup, residual, out, scratch), None
        )
        plgpu.wait_smem_to_gmem(0)


def _corner(shape: Shape, cta, i):
    """First row, and number of the column block, of the CTA's i-th tile."""
    tile, tiles_m = cta + i * shape.num_ctas, shape.m // shape.tile_m
    return lax.rem(tile, jnp.int32(tiles_m)) * shape.tile_m, tile // tiles_m


def _fetch(shape: Shape, cta, num_tiles, x, kernel, s) -> None:
    """The producer: all blocks of all tiles in order, as far ahead as the ring allows."""
    config, steps = shape.config, shape.k // shape.config.tile_k

    def wait_for_slot(step, _=None):
        @pl.when(step >= config.num_stages)
        def wait():
            plgpu.barrier_wait(s["free"].at[lax.rem(step, jnp.int32(config.num_stages))])

    def block(step, _):
        slot, k = lax.rem(step, jnp.int32(config.num_stages)), lax.rem(step, jnp.int32(steps)) * config.tile_k
        row, column_block = _corner(shape, cta, step // steps)
        wait_for_slot(step)
        depth, full = pl.ds(k, config.tile_k), s["full"].at[slot]
        plgpu.copy_gmem_to_smem(x.at[pl.ds(row, shape.tile_m), depth], s["x_smem"].at[slot], full)
        width = shape.out_tile_n
        for part in range(shape.parts):
            columns = pl.ds(column_block * width + part * (shape.n // shape.parts), width)
            plgpu.copy_gmem_to_smem(kernel.at[depth, columns], s["kernel_smem"].at[slot, part], full)

    lax.fori_loop(0, num_tiles * steps, block, None)
    # Nothing in flight is left behind: shared memory and barriers may serve another purpose next.
    lax.fori_loop(num_tiles * steps, num_tiles * steps + config.num_stages, wait_for_slot, None)


def _tile_of_consumer(shape: Shape, cta, i, warpgroup, residual, out, s) -> None:
    """One consumer's rows of the CTA's i-th tile: products, then the epilogue in slices of columns."""
    config, steps = shape.config, shape.k // shape.config.tile_k
    row, column_block = _corner(shape, cta, i)
    rows = pl.ds(row + warpgroup * ROWS, ROWS)
    num_slices = shape.out_tile_n // shape.slice_n

    def columns(j):
        return pl.ds(column_block * shape.out_tile_n + j * shape.slice_n, shape.slice_n)

    def load_residual(j):
        barrier = s["added"].at[2 * warpgroup + j % 2]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the buffer's last slice has left
        plgpu.copy_gmem_to_smem(residual[0].at[rows, columns(j)], s["out_smem"].at[warpgroup, j % 2], barrier)

    if residual:
        load_residual(0)  # on its way while the products are taken

    def multiply(*accs):
        def block(k, _):
            step = i * steps + k
            slot = lax.rem(step, jnp.int32(config.num_stages))
            plgpu.barrier_wait(s["full"].at[slot])
            for part, acc in enumerate(accs):
                x_rows = s["x_smem"].at[slot, pl.ds(warpgroup * ROWS, ROWS)]
                plgpu.wgmma(acc, x_rows, s["kernel_smem"].at[slot, part])
            plgpu.wgmma_wait(shape.parts)  # the products before these are complete: their operands may go

            @pl.when(k > 0)
            def release():
                plgpu.barrier_arrive(s["free"].at[lax.rem(step - 1, jnp.int32(config.num_stages))])

        lax.fori_loop(0, steps, block, None)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(s["free"].at[lax.rem(i * steps + steps - 1, jnp.int32(config.num_stages))])
        return [acc[...] for acc in accs]

    sums = pl.run_scoped(multiply, *[plgpu.ACC((ROWS, shape.out_tile_n), jnp.float32)] * shape.parts)
    if shape.epilogue == "swiglu":
        gate, up = sums
        total = gate / (1 + jnp.exp(-gate)) * up
    else:
        (total,) = sums
    for j in range(num_slices):
        buffer = s["out_smem"].at[warpgroup, j % 2]
        value = total[:, j * shape.slice_n : (j + 1) * shape.slice_n]
        if residual:
            if j + 1 < num_slices:
                load_residual(j + 1)
            plgpu.barrier_wait(s["added"].at[2 * warpgroup + j % 2])
            value += buffer[...].astype(jnp.float32)
        else:
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        buffer[...] = value.astype(shape.out_dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, out.at[rows, columns(j)])
