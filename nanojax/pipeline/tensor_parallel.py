"""How do several devices share every layer?  Weights and KV heads split over a mesh axis, completed by the pipeline's collectives.

Each device has `K / tp` KV heads with their queries and pages, `F / tp` columns of the feed-forward (of every expert in a
mixture) and `V / tp` rows of the head; the residual stream, the norms, the embedding and the router are on all of them.
O's weight is split by KV head for nodes that are reduced (`O_AR`) and by columns for nodes that are gathered (`O_AG`).
Pipelines that use both forms need both splits: then each device holds O's weight twice, `2 H h D / tp` values per layer.
"""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from nanojax import batch as batches
from nanojax.array_types import Array, Float32, Params, PyTree
from nanojax.batch import RaggedBatch
from nanojax.config import ModelConfig
from nanojax.kv_cache import KVPages
from nanojax.models import decoder
from nanojax.pipeline.execute import check
from nanojax.pipeline.ir import OpKind, Pipeline
from nanojax.pipeline.layer_loop import Network, run_layers

_BOTH = "out_columns"
"""Where the second split of O's weights is, by layer, in params that have both."""


@dataclasses.dataclass(frozen=True)
class TensorParallel:
    """A model on the devices of a mesh axis.

    arrange: params of the whole model -> the params that `forward` takes, still whole: the head is a table of its own,
      padded to a multiple of the devices, and O's weights are there twice if both forms need them.
    params: sharding of each leaf of what `arrange` gives.    kv: sharding of the pages, keys and values alike.
    replicated: sharding of the batch and of all else.
    forward: (params, kv, batch) -> (logits, kv) as `execute.forward`, the batch's size choosing the pipeline.
    """

    arrange: Callable[[Params], Params]
    params: PyTree
    kv: NamedSharding
    replicated: NamedSharding
    forward: Callable[[Params, KVPages, RaggedBatch], tuple[Float32[Array, "R V"], KVPages]]


def tensor_parallel(
    config: ModelConfig,
    mesh: Mesh | AbstractMesh,
    pipelines: Iterable[Pipeline],
    *,
    axis: str = "tp",
    attention: str | None = None,
    use_streams: bool = False,
) -> TensorParallel:
    """The model split over mesh axis `axis`, for batches of the sizes of `pipelines`; other axes hold copies.

    `attention` and `use_streams` as in `execute.forward`.  Raises ValueError when the axis does not exist or its size does
    not divide what it splits, for a pipeline that is not valid on so many devices or not for this model.
    """
    if axis not in mesh.shape:
        raise ValueError(f"mesh axes {tuple(mesh.shape)} have no {axis!r}")
    size = mesh.shape[axis]
    by_size = {pipeline.num_tokens: pipeline for pipeline in pipelines}
    for pipeline in by_size.values():
        check(pipeline, config, pipeline.num_tokens, num_devices=size)
    forms = {node.op for pipeline in by_size.values() for node in pipeline.nodes} & {OpKind.O_AG, OpKind.O_AR}
    _check_divides(config, axis, size, is_gathered=OpKind.O_AG in forms)

    specs = _specs(config, axis, forms)
    pages = PartitionSpec(None, None, axis)
    split = dataclasses.replace(config, tied_head=False)

    def local(params: Params, kv: KVPages, batch: RaggedBatch) -> tuple[Array, KVPages]:
        params, columns = _views(params)
        model = decoder.bind(split, params)
        network = Network(
            columns=list(decoder.bind(split, columns).layers),
            gather=lambda part, dimension: jax.lax.all_gather(part, axis, axis=dimension, tiled=True),
            add=lambda part: jax.lax.psum(part, axis),
        )
        rope = jax.lax.optimization_barrier(decoder.rope_angles(config, batch.positions))
        x, kv = run_layers(
            list(model.layers), model.embed_tokens(batch.tokens), rope, kv, batch, by_size[batch.tokens.shape[0]],
            network=network, attention=attention, use_streams=use_streams,
        )  # fmt: skip
        with jax.named_scope("logits"):
            logits = model.logits(x[batches.last_tokens(batch)], batches.num_rows(batch))
            return network.gather(logits, 1)[:, : config.vocab_size], kv

    whole = PartitionSpec()
    shared = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, pages, whole), out_specs=(whole, pages),
        check_vma=False,  # what `all_gather` gives is the same everywhere, but not marked so
    )  # fmt: skip

    def forward(params: Params, kv: KVPages, batch: RaggedBatch) -> tuple[Float32[Array, "R V"], KVPages]:
        if batch.tokens.shape[0] not in by_size:
            raise ValueError(f"no pipeline is for {batch.tokens.shape[0]} tokens, only for {sorted(by_size)}")
        return shared(params, kv, batch)

    return TensorParallel(
        arrange=lambda params: _arrange(config, params, size, has_both=len(forms) == 2),
        params=jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs),
        kv=NamedSharding(mesh, pages),
        replicated=NamedSharding(mesh, whole),
        forward=forward,
    )


def _check_divides(config: ModelConfig, axis: str, size: int, *, is_gathered: bool) -> None:
    for name in ("num_kv_heads", "d_ff", *(["d_model"] if is_gathered else [])):
        if getattr(config, name) % size:
            raise ValueError(
                f"{config.name}: {name}={getattr(config, name)} is no multiple of the {size} devices of {axis!r}"
            )


def _arrange(config: ModelConfig, params: Params, size: int, *, has_both: bool) -> Params:
    table = params["embed" if config.tied_head else "head"]["table"]
    padded = jnp.pad(table, ((0, -config.vocab_size % size), (0, 0)))
    second = {_BOTH: {i: layer["out"]["kernel"] for i, layer in params["layers"].items()}} if has_both else {}
    return {**params, "head": {"table": padded}, **second}


def _views(params: Params) -> tuple[Params, Params]:
    """The params of a decoder as O is reduced, and as it is gathered; the same where there is one form only."""
    plain = {name: value for name, value in params.items() if name != _BOTH}
    if _BOTH not in params:
        return plain, plain
    layers = {i: {**layer, "out": {"kernel": params[_BOTH][i]}} for i, layer in params["layers"].items()}
    return plain, {**plain, "layers": layers}


def _specs(config: ModelConfig, axis: str, forms: set[OpKind]) -> PyTree:
    """Which dimension of each array of the arranged params is split."""
    rows, columns = PartitionSpec(axis), PartitionSpec(None, None, None, axis)
    per_expert = (None,) * bool(config.num_experts)
    by_name = {
        ("qkv", "kernel"): PartitionSpec(None, axis),
        ("qkv", "bias"): PartitionSpec(axis),
        ("out", "kernel"): columns if forms == {OpKind.O_AG} else rows,
        ("ffn", "gate_up"): PartitionSpec(*per_expert, None, None, axis),
        ("ffn", "down"): PartitionSpec(*per_expert, axis),
        ("head", "table"): PartitionSpec(axis),
    }
    tree = decoder.abstract_params(dataclasses.replace(config, tied_head=False))
    specs = jax.tree_util.tree_map_with_path(
        lambda path, _: by_name.get(tuple(key.key for key in path[-2:]), PartitionSpec()), tree
    )
    return {**specs, _BOTH: dict.fromkeys(tree["layers"], columns)} if len(forms) == 2 else specs
