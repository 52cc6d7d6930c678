"""By which kernel, and on how many multiprocessors, does a node run?  Shares become numbers of CTAs where kernels take them.

Nodes of a phase that run on different streams share the device as its scheduler likes, or, where a form is asked for on Hopper,
divide it: products then run as persistent kernels and decode attention as the form says, each with its own multiprocessors;
whatever has no such kernel runs as if it were alone.  Or attention alone is given multiprocessors, by CTAs so large that nothing
fits beside them, and the library's products find the others.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nanojax.array_types import Array, Float
from nanojax.batch import RaggedBatch
from nanojax.kv_cache import KVPages
from nanojax.models.decoder import DecoderLayer, FeedForward
from nanojax.pipeline.ir import OpKind, Pipeline
from pallas_kernels.device import num_multiprocessors, why_not_hopper

DEFAULT, MATMUL = "default", "persistent matmul"
"""What a path may be, besides the names of `pallas_kernels.overlap`'s forms for decode attention."""

ATTENTION_EXCLUSIVE = "attention_exclusive"
"""Decode attention as in the form "sm_exclusive", products the library's."""


@dataclasses.dataclass(frozen=True)
class Room:
    """Multiprocessors for nodes to divide.    form: of attention's kernel.    for_products: they get a number, too."""

    num_sms: int
    form: str
    for_products: bool = True


@dataclasses.dataclass(frozen=True)
class Path:
    """What runs a node.    num_sms: multiprocessors of its own; None where the device decides."""

    kernel: str
    num_sms: int | None
    reason: str


def room_here(form: str, *, use_streams: bool) -> Room | None:
    """Of the device that is traced for; None where nodes run as if alone.

    form: one of those in which two kernels share the device, `ATTENTION_EXCLUSIVE`, or "xla", which leaves operations as they are.
    Raises NotImplementedError for a form that does not exist, or that the device cannot run.
    """
    if form == "xla":
        return None
    from pallas_kernels import overlap  # loads slowly: only where it is used

    known = (*overlap.PREPARE, ATTENTION_EXCLUSIVE)
    if form not in known:
        raise NotImplementedError(f"overlap={form!r} is none of {', '.join(map(repr, known))}, 'xla'")
    reason = why_not_hopper()
    if reason is not None or not use_streams:
        raise NotImplementedError(f"overlap={form!r} {'needs streams' if reason is None else reason}")
    if form == ATTENTION_EXCLUSIVE:
        return Room(num_multiprocessors(), "sm_exclusive", for_products=False)
    return Room(num_multiprocessors(), form)


def divide(pipeline: Pipeline, nodes: Sequence[int], num_sms: int) -> dict[int, int]:
    """Multiprocessors of nodes, by index, that are launched together on several streams; none where all are on one.

    A stream gets what the largest of its nodes' shares is worth, a node of a smaller share the less: at no time are more
    than `num_sms` in use.  Raises ValueError for more streams than multiprocessors.
    """
    from pallas_kernels.overlap import ctas_of_shares

    largest: dict[int, float] = {}
    for i in nodes:
        node = pipeline.nodes[i]
        largest[node.stream] = max(node.share, largest.get(node.stream, 0.0))
    if len(largest) < 2:
        return {}
    counts = dict(zip(largest, ctas_of_shares(list(largest.values()), num_sms), strict=True))
    return {
        i: max(int(counts[node.stream] * (node.share / largest[node.stream])), 1)
        for i, node in ((i, pipeline.nodes[i]) for i in nodes)
    }


def choose(
    pipeline: Pipeline,
    nodes: Sequence[int],
    calls: Mapping[int, tuple[OpKind, ...]],
    room: Room | None,
    layer: DecoderLayer,
    pages: Any,
) -> dict[int, Path]:
    """The path of each of `nodes`, which are launched together.  `calls`: what an attention node computes.

    `layer` and `pages` [L N K p h], of keys or values, may be mere shapes.
    """
    if room is None:
        return dict.fromkeys(nodes, Path(DEFAULT, None, "not asked for"))
    counts = divide(pipeline, nodes, room.num_sms)
    return {i: _path(pipeline, i, calls.get(i), room, counts.get(i), layer, pages) for i in nodes}


def _path(
    pipeline: Pipeline,
    index: int,
    call: tuple[OpKind, ...] | None,
    room: Room,
    num_sms: int | None,
    layer: DecoderLayer,
    pages: Any,
) -> Path:
    from pallas_kernels import overlap
    from pallas_kernels.matmul import mosaic_gpu

    node, num_tokens = pipeline.nodes[index], pipeline.tokens_of(pipeline.nodes[index]).num_tokens
    if num_sms is None:
        return Path(DEFAULT, None, "nothing beside it")
    why = f"share {node.share:g} of {room.num_sms}"
    if call is not None:
        if call != (OpKind.DEC_ATTN,):
            return Path(DEFAULT, None, "only decode attention has a kernel of so many CTAs")
        num_kv_heads, group, head_dim, _ = layer.out.kernel.shape
        q = jax.ShapeDtypeStruct((num_tokens, num_kv_heads * group, head_dim), pages.dtype)
        reason = overlap.why_not_decode(room.form, q, pages, pages)
        return Path(room.form, num_sms, why) if reason is None else Path(DEFAULT, None, f"decode attention {reason}")
    if not room.for_products:
        return Path(DEFAULT, None, "only attention is given multiprocessors")
    kernel = _kernel(layer, node.op)
    if kernel is None:
        return Path(DEFAULT, None, "not a dense product")
    reason = mosaic_gpu.why_not(jax.ShapeDtypeStruct((num_tokens, kernel.shape[0]), kernel.dtype), kernel)
    return Path(MATMUL, num_sms, why) if reason is None else Path(DEFAULT, None, f"{MATMUL} {reason}")


def _kernel(layer: DecoderLayer, op: OpKind) -> jax.ShapeDtypeStruct | None:
    """The weight of a dense operation as `matmul` takes it: [width columns], or [width 2 columns] of gate and up."""
    is_dense = isinstance(layer.ffn, FeedForward)
    if op is OpKind.KQV:
        weight = layer.qkv.kernel
        shape = weight.shape[0], math.prod(weight.shape[1:])
    elif op is OpKind.O:
        weight = layer.out.kernel
        shape = math.prod(weight.shape[:-1]), weight.shape[-1]
    elif op in (OpKind.UG, OpKind.D) and is_dense:
        weight = layer.ffn.gate_up if op is OpKind.UG else layer.ffn.down
        shape = weight.shape
    else:
        return None
    return jax.ShapeDtypeStruct(shape, weight.dtype)


def decode_on(
    num_sms: int, form: str, q: Float[Array, "t H h"], kv: KVPages, layer: int, rows: RaggedBatch
) -> Callable[[Float[Array, "t H h"]], Float[Array, "t H h"]]:
    """Decode attention of `rows`, which have no other rows, on `num_sms` multiprocessors; a stream can run what is returned.

    That takes queries like `q`.  Who attends to what depends on lengths only: it is computed here, outside of the stream, once
    for all layers.
    """
    from pallas_kernels import overlap

    num_rows = min(q.shape[0], rows.kv_lens.shape[0])
    attend = overlap.decode_on(
        form, num_sms, q[:num_rows], kv.k, kv.v, layer, rows.kv_lens[:num_rows], rows.page_indices[:num_rows],
        rows.num_decode,
    )  # fmt: skip
    padding = [(0, q.shape[0] - num_rows, 0), (0, 0, 0), (0, 0, 0)]
    return lambda q: jax.lax.pad(attend(q[:num_rows]), jnp.zeros((), q.dtype), padding)
