"""Which pipelines are ready-made?  No overlap, nano-batches without overlap, and those of the paper and its release."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from nanojax.pipeline.dependencies import with_dependencies
from nanojax.pipeline.ir import NanoBatch, Node, OpKind, Pipeline

Collectives = Literal["gather", "reduce"] | None
"""Form of the collectives around O (see `OpKind`); None on one device."""

COMPUTE_STREAM, MEMORY_STREAM, NETWORK_STREAM = 0, 1, 2

# Paper, Figure 6: share R of each operation; pairs are of the first and the second nano-batch.  The figure has one prefill
# node (0.6), beside the last decode attention; the first nano-batch's, rarely needed, gets what KQV has.
KQV_SHARE, DECODE_SHARE, PREFILL_SHARES, O_SHARES, FFN_SHARE = 0.4, 0.4, (0.4, 0.6), (0.6, 0.8), 0.9
ATTN_AG_SHARE, O_COLLECTIVE_SHARES, D_COLLECTIVE_SHARES = 0.2, (0.2, 0.1), (0.1, 0.2)
# The paper prints no shares for one device.  These are Figure 6's where prefill and decode attention meet.
ONE_DEVICE_SHARES = {"compute": 0.6, "attention": 0.4}
DECODE_SHARES = (0.227, 0.15)
"""30 and 20 of an H200's 132 multiprocessors, for decode attention beside the second nano-batch's operations and the first's.

Measured best of those tried there (`experiments/LOG.md`, 2026-11-27): both sides take about the same time.
"""

# Release of 2024, `pipeline/config_all/<model>/<B>.json`: sizes of the KQV nano-operations; the first two are the first
# nano-batch, the others the second.
RELEASED_70B = {2048: (256, 384, 768, 640), 1024: (256, 128, 256, 384), 768: (128, 256, 128, 256)}
RELEASED_8B = (384, 640)
RELEASED_MIXTRAL = (1024, 1024, 1024, 1024)
# Figure 6 has nano-batches 0..768 and 768..2048, and four KQV nodes of sizes that it does not print: halves here.
FIGURE_6 = (384, 384, 640, 640)


def sequential(num_tokens: int, *, collectives: Collectives = None, is_moe: bool = False) -> Pipeline:
    """One node per operation, one after the other: the non-overlapping baseline (paper, Figure 4).

    Raises ValueError unless `num_tokens` is positive.
    """
    return _one_stream("sequential", [_whole(num_tokens)], [collectives], is_moe)


def nano_batched(
    num_tokens: int,
    splits: Sequence[int],
    *,
    collectives: Collectives | tuple[Collectives, ...] = None,
    is_moe: bool = False,
) -> Pipeline:
    """Every operation in nano-batches of `splits` tokens, all on one stream: the "nanobatch-only" ablation (Figure 9).

    collectives: one form, or one for each nano-batch.
    Raises ValueError unless the splits are positive and add up to `num_tokens`, and the forms are as many.
    """
    if min(splits, default=0) < 1 or sum(splits) != num_tokens:
        raise ValueError(f"splits={tuple(splits)} must be positive and add up to num_tokens={num_tokens}")
    forms = collectives if isinstance(collectives, tuple) else (collectives,) * len(splits)
    if len(forms) != len(splits):
        raise ValueError(f"collectives={collectives} must be one form, or as many as splits={tuple(splits)}")
    stops = [sum(splits[: i + 1]) for i in range(len(splits))]
    ranges = [NanoBatch(stop - size, stop) for stop, size in zip(stops, splits, strict=True)]
    return _one_stream("nano_batched", ranges, forms, is_moe)


def on_one_stream(pipeline: Pipeline) -> Pipeline:
    """The same nodes in the same order without any overlap: the release's way to run "nanobatch-only"."""
    nodes = tuple(dataclasses.replace(node, stream=COMPUTE_STREAM, share=1.0) for node in pipeline.nodes)
    return dataclasses.replace(pipeline, name=f"{pipeline.name}_on_one_stream", nodes=nodes)


def llama_8b_single_gpu(num_tokens: int = 1024, first: int = 384, *, is_moe: bool = False) -> Pipeline:
    """The paper's pipeline for one device (section 4.1.4): half a layer of software pipelining, two nano-batches.

    While decode attention of one nano-batch runs, the other one is in O, UG and D: the first nano-batch is in the FFN of its
    layer when the second attends in the same layer, the second in the FFN of its layer when the first attends in the next.
    Order on each stream as released (`pipeline/src/pipeline_local.cu`): decode attention in halves, the second prefill
    attention behind the first UG.
    Raises ValueError unless `first` leaves tokens for both nano-batches.
    """
    if not 0 < first < num_tokens:
        raise ValueError(f"first={first} must be between 0 and num_tokens={num_tokens}")
    one, two = NanoBatch(0, first), NanoBatch(first, num_tokens)
    compute = {"stream": COMPUTE_STREAM, "share": ONE_DEVICE_SHARES["compute"]}
    memory = {"stream": MEMORY_STREAM, "share": ONE_DEVICE_SHARES["attention"]}
    router = (OpKind.ROUTER,) if is_moe else ()
    rows: list[_Row] = [_Row(OpKind.KQV, one, **compute)]
    rows += [_Row(OpKind.DEC_ATTN, part, **memory) for part in _halves(one)]
    rows += [_Row(OpKind.PF_ATTN, one, **memory)]
    rows += [_Row(op, two, lag=1, **compute) for op in (OpKind.O, *router, OpKind.UG, OpKind.D)]
    rows += [_Row(OpKind.KQV, two, **compute)]
    rows += [_Row(OpKind.DEC_ATTN, part, **memory) for part in _halves(two)]
    rows += [_Row(op, one, **compute) for op in (OpKind.O, *router, OpKind.UG)]
    rows += [_Row(OpKind.PF_ATTN, two, deps=(len(rows) - 1,), **memory), _Row(OpKind.D, one, **compute)]
    return _pipeline("llama_8b", num_tokens, rows)


def decode_beside_dense(
    num_tokens: int,
    first: int,
    *,
    attention_shares: tuple[float, float] = DECODE_SHARES,
    is_moe: bool = False,
) -> Pipeline:
    """`llama_8b_single_gpu` for GPUs whose kernels take whole multiprocessors: the same half a layer of software pipelining.

    All decode attention of a nano-batch is one node, which begins together with the other one's dense operations, so that it
    never waits for multiprocessors that a product has just taken.  Prefill attention, bound by compute as these are, is on
    their stream, and completes what decode attention of its nano-batch left in the half before.
    attention_shares: of the device, for decode attention of the first and of the second nano-batch.
    Raises ValueError unless `first` leaves tokens for both nano-batches.
    """
    if not 0 < first < num_tokens:
        raise ValueError(f"first={first} must be between 0 and num_tokens={num_tokens}")
    one, two = NanoBatch(0, first), NanoBatch(first, num_tokens)
    dense = (OpKind.O, *((OpKind.ROUTER,) if is_moe else ()), OpKind.UG, OpKind.D)
    memory = [{"stream": MEMORY_STREAM, "share": share} for share in attention_shares]
    # What runs beside the first nano-batch's decode attention, and beside the second's.
    beside = [{"stream": COMPUTE_STREAM, "share": 1 - share} for share in attention_shares]
    decode_one, decode_two = 1, 4 + len(dense)  # in the rows below
    rows = [_Row(OpKind.KQV, one, **beside[1]), _Row(OpKind.DEC_ATTN, one, **memory[0])]
    rows.append(_Row(OpKind.PF_ATTN, two, lag=1, carried_deps=(decode_two,), **beside[0]))
    rows += [_Row(op, two, lag=1, **beside[0]) for op in dense]
    rows += [_Row(OpKind.KQV, two, **beside[0]), _Row(OpKind.DEC_ATTN, two, **memory[1])]
    rows.append(_Row(OpKind.PF_ATTN, one, deps=(decode_one,), **beside[1]))
    rows += [_Row(op, one, **beside[1]) for op in dense]
    return _pipeline("decode_beside_dense", num_tokens, rows)


def llama_70b_figure6(num_tokens: int = 2048, *, collectives: Collectives = "gather", is_moe: bool = False) -> Pipeline:
    """The paper's pipeline for LLaMA-2-70B on 8 devices, with its shares (Figure 6): nano-batches 768 and 1280.

    `collectives` None leaves the network out, for one device; otherwise the first nano-batch gathers, the second reduces.
    """
    return _three_streams("llama_70b_figure6", num_tokens, FIGURE_6, collectives is not None, is_moe)


def llama_70b_released(
    num_tokens: int = 2048, *, collectives: Collectives = "gather", is_moe: bool = False
) -> Pipeline:
    """The released pipeline for the 70B models (`pipeline/src/pipeline.cu`): 640 and 1408 of 2048 tokens, KQV in four.

    Streams and order are the release's, shares are Figure 6's, since the release has none.  2048, 1024 and 768 tokens have
    the released sizes; other numbers are scaled from the smallest of these that is not smaller.  `collectives` as in
    `llama_70b_figure6`.
    """
    sizes = RELEASED_70B[min((n for n in RELEASED_70B if n >= num_tokens), default=max(RELEASED_70B))]
    return _three_streams("llama_70b_released", num_tokens, sizes, collectives is not None, is_moe)


def mixtral_released(num_tokens: int = 4096, *, collectives: Collectives = "gather", is_moe: bool = True) -> Pipeline:
    """The released sizes for Mixtral 8x7B on 8 devices, 2048 and 2048 tokens, in the 70B pipeline with a router.

    The release holds only this configuration, no program for a mixture of experts.  `collectives` as in
    `llama_70b_figure6`.
    """
    return _three_streams("mixtral_released", num_tokens, RELEASED_MIXTRAL, collectives is not None, is_moe)


def _named_sequential(num_tokens: int, is_moe: bool, num_devices: int) -> Pipeline:
    return sequential(num_tokens, collectives=_form(num_devices), is_moe=is_moe)


def _named_nano_batched(num_tokens: int, is_moe: bool, num_devices: int) -> Pipeline:
    if num_tokens < 2:
        return dataclasses.replace(_named_sequential(num_tokens, is_moe, num_devices), name="nano_batched")
    one, two = _nano_batches(num_tokens, RELEASED_70B[2048])
    forms = None if num_devices == 1 else ("gather", "reduce")
    return nano_batched(num_tokens, (one.num_tokens, two.num_tokens), collectives=forms, is_moe=is_moe)


def _for_one_device(name: str, make: Callable[..., Pipeline]) -> Callable[[int, bool, int], Pipeline]:
    """`make(num_tokens, first, is_moe=...)` with the released proportions of two nano-batches."""

    def named(num_tokens: int, is_moe: bool, num_devices: int) -> Pipeline:
        if num_devices > 1:
            raise ValueError(f"pipeline {name!r} is for one device, got num_devices={num_devices}")
        if num_tokens < 2:
            return dataclasses.replace(sequential(num_tokens, is_moe=is_moe), name=name)
        cut = _cut(_whole(num_tokens), RELEASED_8B[0] / sum(RELEASED_8B), _grid(num_tokens, 2), 1)
        return make(num_tokens, cut, is_moe=is_moe)

    return named


ONE_DEVICE = {"llama_8b": llama_8b_single_gpu, "decode_beside_dense": decode_beside_dense}
"""Pipelines without a place for collectives."""

PIPELINES: dict[str, Callable[[int, bool, int], Pipeline]] = {
    "sequential": _named_sequential,
    "nano_batched": _named_nano_batched,
    **{name: _for_one_device(name, make) for name, make in ONE_DEVICE.items()},
    "llama_70b_figure6": lambda n, moe, devices: llama_70b_figure6(n, collectives=_form(devices), is_moe=moe),
    "llama_70b_released": lambda n, moe, devices: llama_70b_released(n, collectives=_form(devices), is_moe=moe),
    "mixtral_released": lambda n, moe, devices: mixtral_released(n, collectives=_form(devices), is_moe=moe),
}
"""Name -> pipeline of (num_tokens, is_moe, num_devices).

Nano-batches keep the released proportions, with cuts at multiples of 128 tokens where there are enough, else of 8 or 1.
A single token cannot be split, so it gets the sequential pipeline.  Collectives are left out on one device.
Raises ValueError unless num_tokens is positive, and for those of `ONE_DEVICE` on several devices.
"""


@dataclasses.dataclass(frozen=True)
class _Row:
    """A `Node` with its range of tokens in place of an index."""

    op: OpKind
    tokens: NanoBatch
    stream: int = COMPUTE_STREAM
    share: float = 1.0
    lag: int = 0
    deps: tuple[int, ...] = ()
    carried_deps: tuple[int, ...] = ()


def _pipeline(name: str, num_tokens: int, rows: Sequence[_Row]) -> Pipeline:
    ranges = tuple(dict.fromkeys(row.tokens for row in rows))
    nodes = tuple(Node(r.op, ranges.index(r.tokens), r.deps, r.share, r.stream, r.lag, r.carried_deps) for r in rows)
    return with_dependencies(Pipeline(name, num_tokens, ranges, nodes))


def _one_stream(name: str, ranges: Sequence[NanoBatch], forms: Sequence[Collectives], is_moe: bool) -> Pipeline:
    """Operation by operation, each in all nano-batches."""
    gathers = [tokens for tokens, form in zip(ranges, forms, strict=True) if form == "gather"]
    reduces = [tokens for tokens, form in zip(ranges, forms, strict=True) if form == "reduce"]
    steps = [
        (OpKind.KQV, ranges), (OpKind.DEC_ATTN, ranges), (OpKind.PF_ATTN, ranges), (OpKind.ATTN_AG, gathers),
        (OpKind.O, ranges), (OpKind.O_AG, gathers), (OpKind.O_AR, reduces), (OpKind.ROUTER, ranges if is_moe else []),
        (OpKind.UG, ranges), (OpKind.D, ranges), (OpKind.D_AR, [*gathers, *reduces]),
    ]  # fmt: skip
    return _pipeline(name, ranges[-1].stop, [_Row(op, tokens) for op, parts in steps for tokens in parts])


def _three_streams(name: str, num_tokens: int, sizes: Sequence[int], has_network: bool, is_moe: bool) -> Pipeline:
    """Figure 6: KQV in four beside decode attention, O and FFN in two beside the network.

    Per stream: KQV 1-4 with prefill attention after the second and the fourth, O 1-2, UG 1, D 1, UG 2, D 2; decode
    attention 1-4; AG of attention 1, AG of O 1, AR of O 2, AR of D 1, AR of D 2 in two, beside the next layer's KQV.
    """
    if num_tokens < 2:
        single = sequential(num_tokens, collectives="gather" if has_network else None, is_moe=is_moe)
        return dataclasses.replace(single, name=name)
    one, two = _nano_batches(num_tokens, sizes)
    grid = _grid(num_tokens, len(sizes))
    rows: list[_Row] = []

    def compute(op: OpKind, tokens: NanoBatch, share: float) -> None:
        rows.append(_Row(op, tokens, COMPUTE_STREAM, share))

    def network(op: OpKind, tokens: NanoBatch, share: float) -> None:
        if has_network:
            rows.append(_Row(op, tokens, NETWORK_STREAM, share))

    parts = _parts(one, sizes[:2], grid), _parts(two, sizes[2:], grid)
    for k, tokens in enumerate((one, two)):
        for part in parts[k]:
            compute(OpKind.KQV, part, KQV_SHARE)
            rows.append(_Row(OpKind.DEC_ATTN, part, MEMORY_STREAM, DECODE_SHARE))
            if part is parts[1][0]:  # launched together with the decode attention that it runs beside
                network(OpKind.ATTN_AG, one, ATTN_AG_SHARE)
        compute(OpKind.PF_ATTN, tokens, PREFILL_SHARES[k])
    for k, (tokens, op) in enumerate(((one, OpKind.O_AG), (two, OpKind.O_AR))):
        compute(OpKind.O, tokens, O_SHARES[k])
        network(op, tokens, O_COLLECTIVE_SHARES[k])
    for k, tokens in enumerate((one, two)):
        for op in (*((OpKind.ROUTER,) if is_moe else ()), OpKind.UG, OpKind.D):
            compute(op, tokens, FFN_SHARE)
        for part in (one,) if k == 0 else parts[1]:
            network(OpKind.D_AR, part, D_COLLECTIVE_SHARES[k])
    return _pipeline(name, num_tokens, rows)


def _form(num_devices: int) -> Collectives:
    return None if num_devices == 1 else "gather"


def _whole(num_tokens: int) -> NanoBatch:
    if num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens} must be positive")
    return NanoBatch(0, num_tokens)


def _nano_batches(num_tokens: int, sizes: Sequence[int]) -> tuple[NanoBatch, NanoBatch]:
    """Two nano-batches, in proportion to the first two and the last two of four `sizes`; each can be cut once more."""
    cut = _cut(_whole(num_tokens), sum(sizes[:2]) / sum(sizes), _grid(num_tokens, 4), 2)
    return NanoBatch(0, cut), NanoBatch(cut, num_tokens)


def _parts(tokens: NanoBatch, sizes: Sequence[int], grid: int) -> tuple[NanoBatch, ...]:
    """Two parts in proportion to two `sizes`; one if there is one token."""
    if tokens.num_tokens < 2:
        return (tokens,)
    cut = _cut(tokens, sizes[0] / sum(sizes), grid, 1)
    return NanoBatch(tokens.start, cut), NanoBatch(cut, tokens.stop)


def _halves(tokens: NanoBatch) -> tuple[NanoBatch, ...]:
    return _parts(tokens, (1, 1), 1)


def _cut(tokens: NanoBatch, fraction: float, grid: int, room: int) -> int:
    """Where to cut so that the first part has about `fraction` of the tokens, and each part at least `room` grid steps."""
    room = min(room * grid, tokens.num_tokens // 2)
    ideal = tokens.start + grid * round(fraction * tokens.num_tokens / grid)
    last = tokens.start + (tokens.num_tokens - room) // grid * grid
    return min(max(ideal, tokens.start + room), last)


def _grid(num_tokens: int, num_parts: int) -> int:
    """The coarsest of 128 (the paper's steps), 8 and 1 tokens that leaves a step for each part."""
    return next((grid for grid in (128, 8) if num_tokens >= grid * num_parts), 1)
