"""How are multiprocessors divided without the driver's help?  Two kernels so fat that no two of their CTAs share one.

As many CTAs in all as there are multiprocessors, each with more than half of one's shared memory: whichever kernel is
launched first, each CTA finds a multiprocessor of its own, none waits and none moves.  Clusters would need their
multiprocessors free at the same time, so there are none.
"""

from typing import Any

from jaxtyping import Array

from pallas_kernels.matmul.mosaic_gpu import Config
from pallas_kernels.overlap import decode, two_streams
from pallas_kernels.overlap.shares import Split

SM_SMEM_BYTES, RESERVED_BYTES = 233_472, 1024  # of a Hopper multiprocessor; taken by each CTA beside its own
ALONE_BYTES = SM_SMEM_BYTES // 2 - RESERVED_BYTES  # two CTAs of more than this do not fit one multiprocessor
NUM_BLOCKS = 6
"""Blocks of keys and values in flight: at head_dim 128 they fill 192 KB a multiprocessor; 4.8 TB/s x 0.8 us is 3.8 MB."""
NUM_WORKERS = 3
"""In a CTA of attention: a multiprocessor is faster than one of them."""


def num_stages(q, k_pages, num_workers: int = NUM_WORKERS) -> int:
    """Enough blocks in flight to fill more than half of a multiprocessor, for narrow heads more than `NUM_BLOCKS`."""
    stages = NUM_BLOCKS // num_workers
    while decode.smem_bytes(q, k_pages, stages, num_workers) <= ALONE_BYTES:
        stages += 1
    return stages


def prepare(num_sms: int, attention: dict[str, Any], num_workers: int = NUM_WORKERS) -> decode.Decode:
    """Decode attention with `num_sms` multiprocessors to itself.  `attention`: the other arguments of `decode.prepare`."""
    stages = num_stages(attention["q"], attention["k_pages"], num_workers)
    return decode.prepare(**attention, num_ctas=num_sms, num_stages=stages, num_workers=num_workers)


def run(
    operands: tuple[Array, ...],
    attention: dict[str, Any],
    split: Split,
    *,
    out_dtype: Any,
    config: Config | None = None,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """The product and the attended heads; `attention` as in `prepare`."""
    call = prepare(split.attention, attention)
    return two_streams.run(
        operands, call, num_ctas=split.matmul, out_dtype=out_dtype, config=config, interpret=interpret
    )
