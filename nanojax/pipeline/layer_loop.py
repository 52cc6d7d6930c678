"""How does a pipeline run all layers?  Its nodes, iteration after iteration, each on its layer and its range of tokens.

To XLA the order of the nodes is their data flow; what a pipeline adds is where operations are cut.  The results of nodes
are pieces by token range; whoever needs another range cuts and joins them.  The KV cache is one value that nodes write
and read in turn, never a copy.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nanojax import batch as batches
from nanojax import kv_cache
from nanojax.array_types import Array, Bool, Float, Int32
from nanojax.batch import RaggedBatch
from nanojax.kv_cache import KVPages
from nanojax.models.decoder import DecoderLayer, FeedForward, Rope
from nanojax.models.layers import Extent
from nanojax.pipeline import streams
from nanojax.pipeline.dependencies import waits_for_decode
from nanojax.pipeline.ir import NanoBatch, Node, OpKind, Pipeline
from nanojax.pipeline.kernel_paths import Path, Room, choose, decode_on
from nanojax.pipeline.pieces import Pieces
from pallas_kernels.paged_attention import Rows, paged_attention

ATTENTION = (OpKind.DEC_ATTN, OpKind.PF_ATTN)
_KINDS: dict[tuple[OpKind, ...], Rows] = {(OpKind.DEC_ATTN,): "decode", (OpKind.PF_ATTN,): "prefill"}
INPUT, MIDDLE = "the residual stream before the layer", "the residual stream after attention"

Step = tuple[int, int]
"""A node, by index, in an iteration of the loop over layers."""


@dataclasses.dataclass(frozen=True)
class Network:
    """How the devices that share each layer complete one another's results, and the weights for it.

    columns: layers with O's weight split by columns, for O nodes whose results are gathered.
    gather: joins the devices' parts along an axis.    add: sums them up.
    """

    columns: Sequence[DecoderLayer]
    gather: Callable[[Array, int], Array]
    add: Callable[[Array], Array]


def run_layers(
    layers: Sequence[DecoderLayer], x: Float[Array, "T D"], rope: Rope, kv: KVPages, batch: RaggedBatch,
    pipeline: Pipeline, *, network: Network | None = None, attention: str | None = None, use_streams: bool = False,
    room: Room | None = None,
) -> tuple[Float[Array, "T D"], KVPages]:  # fmt: skip
    """The residual stream after the last layer, and the cache with this step's keys and values.

    The pipeline is valid and of `T` tokens; `network` is None on one device; `room` is what nodes side by side divide, if they do; the
    rest is as in `execute.forward`.
    """
    # On one stream nothing overlaps, and no join would keep the cache's reads before its writes: XLA copies it then.
    use_streams = use_streams and pipeline.num_streams > 1
    calls = attention_calls(pipeline)
    with jax.named_scope("cut"):
        loop = _Loop(
            layers, rope, kv, pipeline, network or Network(layers, lambda part, axis: part, lambda part: part), attention,
            use_streams, room, calls, _rows_of_calls(pipeline, calls, batch), _completing(pipeline, calls),
            num_tokens=batch.cu_q_lens[-1], is_decode=jnp.arange(batch.tokens.shape[0]) < batch.num_decode,
            pages=batch.pages, offset=batch.positions % kv.k.shape[3],
        )  # fmt: skip
    whole = NanoBatch(0, pipeline.num_tokens)
    loop.pieces.put(INPUT, 0, whole, x)
    loop.pieces.settle()
    for phase in phases(pipeline, len(layers), use_streams=use_streams):
        loop.run([(i, iteration - pipeline.nodes[i].lag) for iteration, i in phase])
    return loop.pieces.get(INPUT, len(layers), whole), loop.kv


def attention_calls(pipeline: Pipeline) -> dict[int, tuple[OpKind, ...]]:
    """What each attention node computes: its own rows, those of its twin too, or nothing.

    Twins are the two operations on one range and one stream with nothing but attention launched in between; one call
    serves both.
    """
    calls: dict[int, tuple[OpKind, ...]] = {
        i: (node.op,) for i, node in enumerate(pipeline.nodes) if node.op in ATTENTION
    }
    for i in calls:
        for j in range(i + 1, len(pipeline.nodes)):
            one, two = pipeline.nodes[i], pipeline.nodes[j]
            if two.op not in ATTENTION:
                break
            are_near = (one.nano_batch, one.stream, one.lag) == (two.nano_batch, two.stream, two.lag)
            if are_near and one.op is not two.op:
                calls[i], calls[j] = ATTENTION, ()
    return calls


def _completing(pipeline: Pipeline, calls: Mapping[int, tuple[OpKind, ...]]) -> frozenset[NanoBatch]:
    prefill = [i for i, ops in calls.items() if ops == (OpKind.PF_ATTN,) and waits_for_decode(pipeline, i)]
    return frozenset(pipeline.tokens_of(pipeline.nodes[i]) for i in prefill)


def _steps(pipeline: Pipeline, num_layers: int) -> Iterator[Step]:
    """All nodes of all layers in launch order, as (iteration, node)."""
    for iteration in range(num_layers + max(node.lag for node in pipeline.nodes)):
        for i, node in enumerate(pipeline.nodes):
            if 0 <= iteration - node.lag < num_layers:
                yield iteration, i


def phases(pipeline: Pipeline, num_layers: int, *, use_streams: bool = True) -> Iterator[list[Step]]:
    """The steps in launch order, cut where one needs what another stream began since the last cut; else one by one.

    XLA overlaps calls on different streams well where what they give is joined before anything goes on, so each phase ends
    with a join; inside of it streams do not wait for each other.  Attention also begins a phase after the projection of its
    keys and values, which reach the cache at the join.
    """
    if not use_streams:
        yield from ([step] for step in _steps(pipeline, num_layers))
        return
    nodes, phase = pipeline.nodes, []
    for iteration, i in _steps(pipeline, num_layers):
        needed = [(iteration, dep) for dep in nodes[i].deps] + [(iteration - 1, dep) for dep in nodes[i].carried_deps]
        if any(
            step in phase
            and (
                nodes[step[1]].stream != nodes[i].stream
                or (nodes[i].op in ATTENTION and nodes[step[1]].op is OpKind.KQV)
            )
            for step in needed
        ):
            yield phase
            phase = []
        phase.append((iteration, i))
    yield phase


@dataclasses.dataclass
class _Loop:
    """What the nodes share while a step is traced; `kv`, `pieces`, `reads` and `paths` move on from node to node.

    calls: see `attention_calls`.    rows: the batch of each call, by range and operations.
    completing: ranges whose prefill attention depends on their decode attention, and is given its results to complete them.
    reads: results of attention that no write to the cache has waited for yet.    paths: of the nodes of this phase.
    """

    layers: Sequence[DecoderLayer]
    rope: Rope
    kv: KVPages
    pipeline: Pipeline
    network: Network
    attention: str | None
    use_streams: bool
    room: Room | None
    calls: Mapping[int, tuple[OpKind, ...]]
    rows: Mapping[tuple[NanoBatch, tuple[OpKind, ...]], RaggedBatch]
    completing: frozenset[NanoBatch]
    num_tokens: Int32[Array, ""]
    is_decode: Bool[Array, "T"]
    pages: Int32[Array, "T"]
    offset: Int32[Array, "T"]
    pieces: Pieces = dataclasses.field(default_factory=Pieces)
    reads: list = dataclasses.field(default_factory=list)
    paths: dict[int, Path] = dataclasses.field(default_factory=dict)

    def run(self, phase: Sequence[tuple[int, int]]) -> None:
        """A phase, nodes given with their layers; then joined, and its keys and values written."""
        phase = [(i, layer) for i, layer in phase if self.calls.get(i) != ()]  # else a twin does it
        self.paths = choose(self.pipeline, [i for i, _ in phase], self.calls, self.room, self.layers[0], self.kv.k)
        for i, layer in phase:
            self._store(i, layer, self._compute(i, layer))
        self.pieces.settle(is_join=len({self.pipeline.nodes[i].stream for i, _ in phase}) > 1)
        for i, layer in phase:
            if self.pipeline.nodes[i].op is OpKind.KQV:
                self._write(layer, self.pipeline.tokens_of(self.pipeline.nodes[i]))

    def _compute(self, index: int, layer: int) -> Any:
        """The result of node `index`."""
        node, path = self.pipeline.nodes[index], self.paths[index]
        tokens = self.pipeline.tokens_of(node)
        extent = Extent(jnp.clip(self.num_tokens - tokens.start, 0, tokens.stop - tokens.start), path.num_sms)
        name = "+".join(op.value for op in self.calls.get(index, (node.op,)))
        with jax.named_scope(f"layer{layer}"), jax.named_scope(f"{name}[{tokens.start}:{tokens.stop}]"):
            match node.op:
                case OpKind.KQV:
                    return self._project_qkv(node, layer, tokens, extent)
                case OpKind.DEC_ATTN | OpKind.PF_ATTN:
                    return self._attend(index, layer, tokens, path)
                case OpKind.ATTN_AG:
                    return self.network.gather(self._attended(layer, tokens), 1)
                case OpKind.O:
                    return self._project_out(node, layer, tokens, extent)
                case OpKind.O_AG:
                    return self.network.gather(self.pieces.get(OpKind.O, layer, tokens), 1)
                case OpKind.O_AR:
                    return self.network.add(self.pieces.get(OpKind.O, layer, tokens))
                case OpKind.ROUTER:
                    return self._launch(node, lambda: self.layers[layer].route(self.pieces.get(MIDDLE, layer, tokens)))
                case OpKind.UG:
                    return self._up_gate(node, layer, tokens, extent)
                case OpKind.D:
                    return self._down(node, layer, tokens, extent)
                case OpKind.D_AR:
                    return self.network.add(self.pieces.get(OpKind.D, layer, tokens))

    def _store(self, index: int, layer: int, value: Any) -> None:
        """Keeps the result; a complete one moves the residual stream on."""
        node = self.pipeline.nodes[index]
        tokens = self.pipeline.tokens_of(node)
        for op in self.calls.get(index, (node.op,)):
            self.pieces.put(op, layer, tokens, value)
        if node.op in (OpKind.O_AG, OpKind.O_AR):
            self.pieces.put(MIDDLE, layer, tokens, self.pieces.get(INPUT, layer, tokens) + value)
        elif node.op is OpKind.D_AR:
            self.pieces.put(INPUT, layer + 1, tokens, self.pieces.get(MIDDLE, layer, tokens) + value)
        elif not self.pipeline.is_tensor_parallel and node.op is OpKind.O:
            self.pieces.put(MIDDLE, layer, tokens, value)
        elif not self.pipeline.is_tensor_parallel and node.op is OpKind.D:
            self.pieces.put(INPUT, layer + 1, tokens, value)

    def _launch(self, node: Node, operation: Callable[[], Any]) -> Any:
        if not self.use_streams:
            return operation()
        return streams.launch(node.stream, operation, has_loops=node.op in ATTENTION)

    def _project_qkv(self, node: Node, layer: int, tokens: NanoBatch, extent: Extent) -> Any:
        """Queries, keys and values; a stream gives them as one array."""
        # Outside of the stream's part: equal slices of all layers become one.
        cos, sin = (part[tokens.start : tokens.stop] for part in self.rope)

        def project() -> Any:
            x = self.pieces.get(INPUT, layer, tokens)
            results = self.layers[layer].project_qkv(x, (cos, sin), extent, self.kv.value_dtype)
            return jnp.concatenate(results, axis=1) if self.use_streams else results

        return self._launch(node, project)

    def _projected(self, layer: int, tokens: NanoBatch) -> tuple[Array, Array, Array]:
        value = self.pieces.get(OpKind.KQV, layer, tokens)
        if isinstance(value, tuple):
            return value
        num_kv_heads = self.kv.k.shape[2]
        q, k, v = jnp.split(value, (value.shape[1] - 2 * num_kv_heads, value.shape[1] - num_kv_heads), axis=1)
        return q, k, v

    def _write(self, layer: int, tokens: NanoBatch) -> None:
        """Keys and values go to the cache."""
        part = slice(tokens.start, tokens.stop)
        _, k, v = self._projected(layer, tokens)
        pages = self.pages[part] if self.use_streams else _after(self.reads, self.pages[part], self.kv)
        self.reads = []
        self.kv = kv_cache.write(self.kv, layer, k, v, pages, self.offset[part])

    def _attend(self, index: int, layer: int, tokens: NanoBatch, path: Path) -> Float[Array, "t H h"]:
        rows = self.rows[tokens, self.calls[index]]
        only: Rows | None = _KINDS.get(self.calls[index])

        def attend_to_pages(q: Array) -> Array:
            others = (
                self.pieces.get(OpKind.DEC_ATTN, layer, tokens)
                if tokens in self.completing and only == "prefill"
                else None
            )
            return paged_attention(
                q, self.kv.k, self.kv.v, layer, rows.kv_lens, rows.page_indices, rows.cu_q_lens, rows.num_decode,
                implementation=self.attention, only=only, others=others,
            )  # fmt: skip

        attend: Callable[[Array], Array] = attend_to_pages
        if path.num_sms is not None:
            attend = decode_on(path.num_sms, path.kernel, self._projected(layer, tokens)[0], self.kv, layer, rows)
        # The queries are cut inside of the call: what it waits for is there at the join, so XLA launches it at once.
        self.reads.append(self._launch(self.pipeline.nodes[index], lambda: attend(self._projected(layer, tokens)[0])))
        return self.reads[-1]

    def _attended(self, layer: int, tokens: NanoBatch) -> Float[Array, "t H h"]:
        """Attention's result for decode and prefill rows, the heads of this device."""
        decode, prefill = ([id(value) for _, value in self.pieces.touching(op, layer, tokens)] for op in ATTENTION)
        from_prefill = self.pieces.get(OpKind.PF_ATTN, layer, tokens)
        parts = self.pieces.touching(OpKind.PF_ATTN, layer, tokens)
        if decode == prefill or all(own in self.completing for own, _ in parts):
            return from_prefill
        is_decode = self.is_decode[tokens.start : tokens.stop, None, None]
        return jnp.where(is_decode, self.pieces.get(OpKind.DEC_ATTN, layer, tokens), from_prefill)

    def _project_out(self, node: Node, layer: int, tokens: NanoBatch, extent: Extent) -> Float[Array, "t D"]:
        """The residual stream after attention; only what O adds to it where several devices share the layer."""
        own, shared = self.layers[layer], self.network.columns[layer]

        def project() -> Array:
            if not self.pipeline.is_tensor_parallel:
                x, attended = self.pieces.get(INPUT, layer, tokens), self._attended(layer, tokens)
                return own.project_out(x, attended, extent)
            if any(
                other.op is OpKind.O_AG and self.pipeline.tokens_of(other).intersects(tokens)
                for other in self.pipeline.nodes
            ):
                return shared.out(self.pieces.get(OpKind.ATTN_AG, layer, tokens), extent=extent)
            return own.out(self._attended(layer, tokens), extent=extent)

        return self._launch(node, project)

    def _up_gate(self, node: Node, layer: int, tokens: NanoBatch, extent: Extent) -> Any:
        has_router = any(other.op is OpKind.ROUTER for other in self.pipeline.nodes)

        def up_gate() -> Any:
            routes = [self.pieces.get(OpKind.ROUTER, layer, tokens)] if has_router else []
            return self.layers[layer].up_gate(self.pieces.get(MIDDLE, layer, tokens), *routes, extent=extent)

        return self._launch(node, up_gate)

    def _down(self, node: Node, layer: int, tokens: NanoBatch, extent: Extent) -> Float[Array, "t D"]:
        """The residual stream after the layer; only what D adds to it where several devices share the layer."""
        ffn = self.layers[layer].ffn

        def down() -> Array:
            residual = None if self.pipeline.is_tensor_parallel else self.pieces.get(MIDDLE, layer, tokens)
            if isinstance(ffn, FeedForward):
                return ffn.project_down(self.pieces.get(OpKind.UG, layer, tokens), residual, extent)
            # Sorted by expert and hence not to be joined: each piece is projected by itself.
            change = jnp.concatenate(
                [
                    ffn.project_down(
                        hidden.cut(max(own.start, tokens.start) - own.start, min(own.stop, tokens.stop) - own.start)
                    )
                    for own, hidden in self.pieces.touching(OpKind.UG, layer, tokens)
                ]
            )
            return change if residual is None else residual + change

        return self._launch(node, down)


def _rows_of_calls(
    pipeline: Pipeline, calls: Mapping[int, tuple[OpKind, ...]], batch: RaggedBatch
) -> dict[tuple[NanoBatch, tuple[OpKind, ...]], RaggedBatch]:
    """The rows of each attention call, the same in every layer."""
    choose = {
        ATTENTION: lambda rows: rows,
        (OpKind.DEC_ATTN,): batches.decode_part,
        (OpKind.PF_ATTN,): batches.prefill_part,
    }
    wanted = dict.fromkeys((pipeline.tokens_of(pipeline.nodes[i]), ops) for i, ops in calls.items() if ops)
    return {(tokens, ops): choose[ops](batches.cut(batch, tokens.start, tokens.stop)) for tokens, ops in wanted}


def _after(reads: Sequence[Array], pages: Int32[Array, "t"], kv: KVPages) -> Int32[Array, "t"]:
    """`pages`, but not before the results `reads` are there.

    Unless the write visibly depends on them, XLA for CPUs lets attention read a copy of the whole cache; an
    `optimization_barrier` is not visible enough before jax 0.11.  So a value that no result has says "no page".
    """
    for read in reads:
        bits = jax.lax.bitcast_convert_type(read[0, 0, 0].astype(jnp.float32), jnp.int32)
        pages = jnp.where(bits == _NO_RESULT, kv.k.shape[1], pages)
    return pages


_NO_RESULT = 0x7FC0DEAD
"""A NaN that arithmetic does not make."""
