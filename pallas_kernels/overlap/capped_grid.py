"""How do small CTAs fill what a capped matmul leaves?  Its grid ends before the device does; attention brings several a core.

The matmul's CTAs own their multiprocessors as in `sm_exclusive`; attention's are small, so that several share one and hide
one another's waiting.  Launched first, attention's spread over the whole device and hold up the matmul until they are done:
that is the price of not filling the multiprocessors.
"""

from typing import Any

from jaxtyping import Array

from pallas_kernels.matmul.mosaic_gpu import Config
from pallas_kernels.overlap import decode, two_streams
from pallas_kernels.overlap.shares import Split

NUM_STAGES = 3
CTAS_PER_SM = 2  # at head_dim 128 each has 109 KB and 98 registers x 256 threads: registers leave no room for a third


def prepare(num_sms: int, attention: dict[str, Any]) -> decode.Decode:
    """As many CTAs of decode attention as fill `num_sms` multiprocessors.  `attention`: the other arguments of `decode.prepare`."""
    return decode.prepare(**attention, num_ctas=CTAS_PER_SM * num_sms, num_stages=NUM_STAGES)


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
