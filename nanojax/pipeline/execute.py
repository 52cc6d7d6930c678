"""How is a step's forward pass run?  The operations of every layer, in order or cut up by a pipeline, over the paged KV cache."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.typing import DTypeLike

from nanojax import batch as batches
from nanojax import kv_cache
from nanojax.array_types import Array, Float32, Params
from nanojax.batch import RaggedBatch
from nanojax.config import ModelConfig
from nanojax.kv_cache import KVPages
from nanojax.models import decoder
from nanojax.models.layers import Extent
from nanojax.pipeline.ir import OpKind, Pipeline
from nanojax.pipeline.kernel_paths import Path, choose, room_here
from nanojax.pipeline.layer_loop import attention_calls, phases, run_layers
from nanojax.pipeline.validate import validate
from pallas_kernels.paged_attention import paged_attention


def forward(
    config: ModelConfig,
    params: Params,
    kv: KVPages,
    batch: RaggedBatch,
    *,
    pipeline: Pipeline | None = None,
    attention: str | None = None,
    use_streams: bool = False,
    overlap: str = "xla",
) -> tuple[Float32[Array, "R V"], KVPages]:
    """Logits after the last token of each row, and the cache with this step's keys and values; on one device.

    pipeline: how each layer is cut and ordered; None runs whole operations one after another.  Any pipeline gives the
      same logits but for rounding.
    attention: names the implementation of `paged_attention`; None lets it choose.
    use_streams: put each node on the GPU stream that it names (see `streams`), if these are several; of no use on a CPU.
    overlap: how nodes side by side divide a Hopper GPU (see `kernel_paths`): a form of `pallas_kernels.overlap`, or "xla",
      which leaves it to the GPU's scheduler (`experiments/LOG.md`, 2026-11-26, has what each gives on an H200).

    Layers are unrolled: a scan would copy each layer's weights and keep XLA from overlapping operations of neighbouring
    layers.  Raises ValueError as `check` does, NotImplementedError for a form that does not exist.
    """
    model = decoder.bind(config, params)
    # Behind a barrier, or XLA computes the sines and cosines again inside every layer's fusion.
    rope = jax.lax.optimization_barrier(decoder.rope_angles(config, batch.positions))
    x = model.embed_tokens(batch.tokens)
    if pipeline is None:
        x, kv = _run_in_order(model, x, rope, kv, batch, attention)
    else:
        check(pipeline, config, batch.tokens.shape[0])
        x, kv = run_layers(
            list(model.layers), x, rope, kv, batch, pipeline, attention=attention, use_streams=use_streams,
            room=room_here(overlap, use_streams=use_streams),
        )  # fmt: skip
    with jax.named_scope("logits"):
        return model.logits(x[batches.last_tokens(batch)], batches.num_rows(batch)), kv


def check(pipeline: Pipeline, config: ModelConfig, num_tokens: int, *, num_devices: int = 1) -> None:
    """Raises ValueError unless this model can run the pipeline on batches of `num_tokens` tokens on `num_devices` devices."""
    validate(pipeline, num_devices=num_devices, check_shares=False)
    if pipeline.num_tokens != num_tokens:
        raise ValueError(
            f"pipeline {pipeline.name!r} is for {pipeline.num_tokens} tokens, not for batches of {num_tokens}"
        )
    if not config.num_experts and any(node.op is OpKind.ROUTER for node in pipeline.nodes):
        raise ValueError(f"pipeline {pipeline.name!r} has a router, but {config.name} has no experts")


@dataclasses.dataclass(frozen=True)
class NodePath:
    """How a node runs in `num_layers` of the layers.    node: its label in the pipeline."""

    node: str
    num_layers: int
    path: Path


def paths(
    config: ModelConfig,
    pipeline: Pipeline,
    *,
    dtype: DTypeLike,
    pages: jax.ShapeDtypeStruct,
    use_streams: bool,
    overlap: str = "xla",
) -> tuple[NodePath, ...]:
    """What runs each node of `forward` on the device that is traced for, and why: for a record.  Nothing is computed.

    dtype: of the weights.    pages: [L N K p h], of keys or values.    The rest as in `forward`.
    A node may run in several ways: in the first and the last layer it has other company than in those between.
    """
    one_layer = dataclasses.replace(config, num_layers=1)
    layer = decoder.bind(one_layer, decoder.abstract_params(one_layer, dtype)).layers[0]
    calls, room = attention_calls(pipeline), room_here(overlap, use_streams=use_streams)
    found: collections.Counter[tuple[int, Path]] = collections.Counter()
    for phase in phases(pipeline, config.num_layers, use_streams=use_streams):
        found.update(choose(pipeline, [i for _, i in phase], calls, room, layer, pages).items())
    return tuple(
        NodePath(pipeline.label(i), count, path)
        for (i, path), count in sorted(found.items(), key=lambda one: one[0][0])
    )


def forward_per_budget(
    config: ModelConfig,
    budgets: Sequence[int],
    pipelines: Mapping[int, Pipeline],
    *,
    attention: str | None = None,
    use_streams: bool = False,
    overlap: str = "xla",
) -> dict[int, Callable[[Params, KVPages, RaggedBatch], tuple[Float32[Array, "R V"], KVPages]]]:
    """`forward` for batches of each of `budgets` tokens, with the pipeline of that budget where there is one.

    Raises ValueError for a pipeline of no budget, and as `check` does.
    """
    for budget, pipeline in pipelines.items():
        if budget not in budgets:
            raise ValueError(f"pipeline {pipeline.name!r} is for budget {budget}, which is none of {tuple(budgets)}")
        check(pipeline, config, budget)
    return {
        budget: functools.partial(
            forward,
            config,
            pipeline=pipelines.get(budget),
            attention=attention,
            use_streams=use_streams,
            overlap=overlap,
        )
        for budget in budgets
    }


def _run_in_order(
    model: decoder.Decoder, x: Array, rope: decoder.Rope, kv: KVPages, batch: RaggedBatch, attention: str | None
) -> tuple[Array, KVPages]:
    """The residual stream after the last layer, and the cache."""
    offset, extent = batch.positions % kv.k.shape[3], Extent(batch.cu_q_lens[-1])
    for index, layer in enumerate(model.layers):
        with jax.named_scope(f"layer{index}"):
            with jax.named_scope("KQV"):
                q, k, v = layer.project_qkv(x, rope, extent, kv.value_dtype)
                kv = kv_cache.write(kv, index, k, v, batch.pages, offset)
            with jax.named_scope("Attn"):
                attended = paged_attention(
                    q, kv.k, kv.v, index, batch.kv_lens, batch.page_indices, batch.cu_q_lens,
                    batch.num_decode, implementation=attention,
                )  # fmt: skip
            with jax.named_scope("O"):
                x = layer.project_out(x, attended, extent)
            with jax.named_scope("UG"):
                hidden = layer.up_gate(x, extent=extent)
            with jax.named_scope("D"):
                x = layer.down(x, hidden, extent)
    return x, kv
