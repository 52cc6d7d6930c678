"""What do a matrix product and decode attention side by side promise, and which form keeps the promise here?"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.device import num_multiprocessors
from pallas_kernels.device import platform as device_platform
from pallas_kernels.matmul import matmul
from pallas_kernels.matmul import mosaic_gpu as persistent
from pallas_kernels.overlap import capped_grid, decode, fused, sm_exclusive
from pallas_kernels.overlap.shares import Split, split_of_share
from pallas_kernels.paged_attention import paged_attention

FORMS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "sm_exclusive": sm_exclusive.run,
    "capped_grid": capped_grid.run,
    "fused": fused.run,
}
PREPARE: dict[str, Callable[[int, dict[str, Any]], decode.Decode]] = {
    "sm_exclusive": sm_exclusive.prepare,
    "capped_grid": capped_grid.prepare,
}
"""Forms of two kernels: number of multiprocessors, arguments of attention -> a call that a stream may run beside a product."""
DEFAULT_FORM = "sm_exclusive"


@dataclasses.dataclass(frozen=True)
class Path:
    """What runs: a form's name, or "xla" for one operation after the other; and why, for the record."""

    form: str
    reason: str


def path_for(form: str | None, x: Any, kernel: Any, q: Any, k_pages: Any, v_pages: Any, *, platform: str) -> Path:
    """The form that arrays of these shapes and dtypes take on a platform ("gpu" is Hopper), if `form` is wished for.

    None wishes for the default form.  Raises NotImplementedError for a form that does not exist.
    """
    wish = DEFAULT_FORM if form is None else form
    if wish == "xla":
        return Path("xla", "asked for")
    if wish not in FORMS:
        raise NotImplementedError(f"form={form!r} is none of {', '.join(map(repr, FORMS))}, 'xla'")
    if platform != "gpu":
        return Path("xla", f"{wish} runs on 'gpu', not on {platform!r}")
    for operation, reason in (
        ("the product", persistent.why_not(x, kernel)),
        ("attention", why_not_decode(wish, q, k_pages, v_pages)),
    ):
        if reason is not None:
            return Path("xla", f"{operation} of {wish} {reason}")
    return Path(wish, "default" if form is None else "asked for")


def why_not_decode(form: str, q: Any, k_pages: Any, v_pages: Any) -> str | None:
    """What keeps a form's attention from arrays of these shapes [R H h] and [L N K p h] and dtypes; None if nothing does."""
    reason = decode.why_not(q, k_pages, v_pages)
    if reason is None:
        try:
            if form == "capped_grid":
                decode.smem_bytes(q, k_pages, capped_grid.NUM_STAGES)
            else:
                sm_exclusive.num_stages(q, k_pages)
        except ValueError as error:
            return f"does not fit: {error}"
    return reason


def decode_on(
    form: str,
    num_sms: int,
    q: Float[Array, "R H h"],
    k_pages: Float[Array, "L N K p h"],
    v_pages: Float[Array, "L N K p h"],
    layer: int,
    kv_lens: Int32[Array, "R"],
    page_indices: Int32[Array, "R P"],
    num_decode: Int32[Array, ""],
    *,
    sm_scale: float | None = None,
    interpret: Any = None,
) -> Callable[[Float[Array, "R H h"]], Float[Array, "R H h"]]:
    """A form's attention alone, on `num_sms` multiprocessors, for whoever launches the product beside it himself.

    What is returned takes queries like `q` and has no jit in it, so that a stream can run it.  Arguments as in
    `matmul_and_decode_attention`.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if sm_scale is None else sm_scale
    attention = {
        "q": q, "k_pages": k_pages, "v_pages": v_pages, "layer": layer, "kv_lens": kv_lens,
        "page_indices": page_indices, "num_decode": num_decode, "sm_scale": scale,
    }  # fmt: skip
    call = PREPARE[form](num_sms, attention)
    return lambda q: decode.attend(call, (q, *call.inputs[1:]), call.schedule, interpret)


def matmul_and_decode_attention(
    x: Float[Array, "m k"],
    kernel: Float[Array, "k n"] | Float[Array, "k 2 f"],
    residual: Float[Array, "m out"] | None,
    q: Float[Array, "R H h"],
    k_pages: Float[Array, "L N K p h"],
    v_pages: Float[Array, "L N K p h"],
    layer: int,
    kv_lens: Int32[Array, "R"],
    page_indices: Int32[Array, "R P"],
    num_decode: Int32[Array, ""],
    *,
    form: str | None = None,
    share: float | Split = 0.6,
    num_sms: int | None = None,
    out_dtype: Any = jnp.float32,
    sm_scale: float | None = None,
    config: persistent.Config | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "m out"], Float[Array, "R H h"]]:
    """A product of one nano-batch, and attention of the first `num_decode` rows of another, one token each.

    The product is `x @ kernel` with sums in float32, for a kernel of gate and up columns `silu(gate) * up`, plus
    `residual`, in `out_dtype`.  Attention is that of `paged_attention`, 0 for rows from `num_decode` on.

    Args:
      form: None is the best one for the default platform, "xla" where that cannot be (see `path_for`).
      share: of the multiprocessors, for the product; attention has the others.  Or both counts.
      num_sms: multiprocessors; those of the device, or of the abstract device, if None.
      config: tiles of the product; chosen by its shape if None.
      interpret: runs the kernels in JAX's GPU interpreter, on a CPU.

    Raises:
      ValueError: the share is not between 0 and 1, or a split that adds up to more multiprocessors than there are.
      NotImplementedError: the form named does not exist, or cannot run here or on these operands.
    """
    platform = "gpu" if interpret is not None else device_platform()
    path = path_for(form, x, kernel, q, k_pages, v_pages, platform=platform)
    if form is not None and path.form != form:
        raise NotImplementedError(f"form={form!r}: {path.reason}")
    scale = 1 / math.sqrt(q.shape[-1]) if sm_scale is None else sm_scale
    attention = {
        "q": q, "k_pages": k_pages, "v_pages": v_pages, "layer": layer, "kv_lens": kv_lens,
        "page_indices": page_indices, "num_decode": num_decode, "sm_scale": scale,
    }  # fmt: skip
    if path.form == "xla":
        return _in_order(x, kernel, residual, attention, out_dtype)
    num_sms = num_multiprocessors() if num_sms is None else num_sms
    split = share if isinstance(share, Split) else split_of_share(share, num_sms)
    if split.num_sms > num_sms:
        raise ValueError(f"{split} is more than num_sms={num_sms}")
    operands = (x, kernel) if residual is None else (x, kernel, residual)
    return FORMS[path.form](operands, attention, split, out_dtype=out_dtype, config=config, interpret=interpret)


def _in_order(x, kernel, residual, attention: dict[str, Any], out_dtype) -> tuple[Array, Array]:
    """Both operations as their own folders run them, one after the other."""
    product = matmul(x, kernel, residual, out_dtype=out_dtype)
    num_rows = attention["kv_lens"].shape[0]
    cu_q_lens = jnp.minimum(jnp.arange(num_rows + 1, dtype=jnp.int32), attention["num_decode"])
    attended = paged_attention(cu_q_lens=cu_q_lens, implementation="xla", **attention)
    return product, attended
