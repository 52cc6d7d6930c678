"""On which multiprocessor does each block of a grid run, and when?  A kernel that does nothing but wait and say so.

Two of these on two streams, with grids and shared memory like those of a matmul and of an attention kernel, show whether
a GPU really runs the two side by side, and on which multiprocessors:

    stamps = occupy(token, num_ctas=88, smem_bytes=229_440, spin_ns=200_000)
    read_stamps(stamps)["sm"]                                                # 88 numbers, distinct if each had its own

The registers are `%smid` and `%globaltimer` (nanoseconds, one clock for the whole device, which may tick only every 32 ns
to 1 us): PTX ISA, "Special Registers".
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

WIDTH = 128
"""int32 values of a row of shared memory and of a stamp: one per thread of a warpgroup."""

ROWS = ("sm", "start_low", "start_high", "end_low", "end_high")


def occupy(
    token: Int32[Array, "128"], *, num_ctas: int, smem_bytes: int, spin_ns: int
) -> Int32[Array, "num_ctas 5 128"]:
    """Starts `num_ctas` blocks of 128 threads that each hold `smem_bytes` of shared memory for `spin_ns` nanoseconds.

    `token` is read once, so that the launch waits for it.  All 128 values of a row are the same.
    Raises ValueError unless all counts are positive.
    """
    if min(num_ctas, smem_bytes, spin_ns) < 1:
        raise ValueError(f"num_ctas={num_ctas}, smem_bytes={smem_bytes}, spin_ns={spin_ns} must be positive")

    def body(token_gmem, stamps_gmem, held_smem):
        block = jax.lax.axis_index("block")
        start = _stamp(None)
        held_smem[0] = token_gmem[...]
        plgpu.commit_smem()
        end = _stamp(spin_ns)
        for row, value in enumerate((*start, *end[1:])):
            stamps_gmem[block, row] = value

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_ctas, len(ROWS), WIDTH), jnp.int32),
        scratch_types=[plgpu.SMEM((-(-smem_bytes // (4 * WIDTH)), WIDTH), jnp.int32)],
        grid=(num_ctas,),
        grid_names=("block",),
    )(token)


def read_stamps(stamps: Int32[Array, "num_ctas 5 128"]) -> dict[str, np.ndarray]:
    """`sm` [num_ctas], `start_ns` and `end_ns` [num_ctas] on the device's clock, int64."""
    rows = dict(zip(ROWS, np.asarray(stamps)[:, :, 0].T, strict=True))

    def joined(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return (high.astype(np.int64) << 32) | low.astype(np.uint32).astype(np.int64)

    return {
        "sm": rows["sm"].astype(np.int64),
        "start_ns": joined(rows["start_low"], rows["start_high"]),
        "end_ns": joined(rows["end_low"], rows["end_high"]),
    }


def _stamp(spin_ns: int | None):
    """(multiprocessor, low and high half of the time), each as [128] int32; `spin_ns` later, if given."""
    layout = plgpu.Layout.WG_STRIDED((WIDTH,), vec_size=1)
    row = plgpu.ShapeDtypeStruct((WIDTH,), jnp.int32, layout=layout)

    def read(_):
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        if spin_ns is not None:
            _asm(None, _SPIN, "l", arith.constant(i64, spin_ns))
        time = _asm(i64, "mov.u64 $0, %globaltimer;", "=l")
        sm = _asm(i32, "mov.u32 $0, %smid;", "=r")
        low = arith.trunci(i32, time)
        high = arith.trunci(i32, arith.shrui(time, arith.constant(i64, 32)))
        strided = mgpu.WGStridedFragLayout((WIDTH,), vec_size=1)
        return tuple(mgpu.FragmentedArray.splat(x, (WIDTH,), strided, is_signed=True) for x in (sm, low, high))

    return plgpu.inline_mgpu(return_type=(row, row, row))(read)()


# Braces keep the registers apart where the text is inlined twice; `${:uid}` does so for the label.
_SPIN = """{
.reg .u64 first, now; .reg .pred early;
mov.u64 first, %globaltimer;
WAIT${:uid}: mov.u64 now, %globaltimer; sub.u64 now, now, first; setp.lt.u64 early, now, $0; @early bra WAIT${:uid};
}"""


def _asm(result: ir.Type | None, text: str, constraints: str, *operands: ir.Value) -> Any:
    return llvm.inline_asm(result, list(operands), text, constraints, asm_dialect=0, has_side_effects=True)
