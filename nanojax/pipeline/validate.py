"""Is a pipeline right?  Every token passes every operation once, and nothing is read before it is written."""

from collections.abc import Iterable, Iterator

from nanojax.pipeline.dependencies import ancestors, needs, order_problem
from nanojax.pipeline.ir import COLLECTIVES, NanoBatch, OpKind, Pipeline

ALWAYS = (OpKind.KQV, OpKind.DEC_ATTN, OpKind.PF_ATTN, OpKind.O, OpKind.UG, OpKind.D)
SHARE_ROUNDING = 1e-9


def validate(pipeline: Pipeline, *, num_devices: int | None = None, check_shares: bool = True) -> None:
    """Raises ValueError that lists what is wrong and names the nodes.

    Dependencies count where `deps` and `carried_deps` state them, directly or through other nodes; that two nodes share a
    stream is an order, but not a dependency, because a stream is a choice of the launcher.
    Shares are added up over nodes that overlap whatever their durations are, because they wait for exactly the same nodes.
    Whether others ever meet depends on durations: `simulate` makes them wait for room and says so in its spans.

    num_devices: 1 refuses collectives, more than 1 asks for them; None takes the pipeline as it is.
    check_shares: False leaves shares out, for a plan whose resources are not yet decided (stage I of the search).
    """
    problems = list(_structure_problems(pipeline))
    if not problems:
        problems = [*_coverage_problems(pipeline, num_devices), *_dependency_problems(pipeline)]
        if check_shares:
            problems += _share_problems(pipeline)
    if problems:
        raise ValueError(f"pipeline {pipeline.name!r}: " + "; ".join(problems))


def _structure_problems(pipeline: Pipeline) -> Iterator[str]:
    """What keeps the other checks from making sense: indices and numbers out of range, cycles, a wrong launch order."""
    if pipeline.num_tokens < 1:
        yield f"num_tokens={pipeline.num_tokens} must be positive"
    for i, tokens in enumerate(pipeline.nano_batches):
        if not 0 <= tokens.start < tokens.stop <= pipeline.num_tokens:
            bounds = f"0 <= start < stop <= {pipeline.num_tokens}"
            yield f"nano_batches[{i}] = {tokens.start}..{tokens.stop} must satisfy {bounds}"
        if tokens in pipeline.nano_batches[:i]:
            yield f"nano_batches[{i}] = {tokens.start}..{tokens.stop} is there twice"
    is_sound = True
    for i, node in enumerate(pipeline.nodes):
        if not 0 <= node.nano_batch < len(pipeline.nano_batches):
            is_sound = False
            limit = len(pipeline.nano_batches)
            yield f"node {i} ({node.op.value}): nano_batch={node.nano_batch} is none of the {limit} nano-batches"
            continue
        name = pipeline.describe(i)
        if not 0 < node.share <= 1:
            yield f"{name}: share={node.share} must be above 0 and at most 1"
        if node.stream < 0:
            yield f"{name}: stream={node.stream} must not be negative"
        if node.lag not in (0, 1):
            yield f"{name}: lag={node.lag} must be 0 or 1"
        for field, deps in (("deps", node.deps), ("carried_deps", node.carried_deps)):
            for dep in deps:
                if not 0 <= dep < len(pipeline.nodes):
                    is_sound = False
                    yield f"{name}: {field} has {dep}, which is none of the {len(pipeline.nodes)} nodes"
    if is_sound:
        yield from _launch_order_problems(pipeline)


def _launch_order_problems(pipeline: Pipeline) -> Iterator[str]:
    cycle = _cycle(pipeline)
    if cycle:
        yield f"these wait for each other: {', '.join(pipeline.describe(i) for i in cycle)}"
    for i, node in enumerate(pipeline.nodes):
        for dep in node.deps:
            if dep >= i and not (dep in cycle and i in cycle):
                yield f"{pipeline.describe(i)} waits for {pipeline.describe(dep)}, which is launched after it"


def _cycle(pipeline: Pipeline) -> list[int]:
    """Nodes left over when those that wait for nothing are taken away again and again, without their mere followers."""
    left = set(range(len(pipeline.nodes)))
    for forward in (True, False):
        size = -1
        while size != len(left):
            size = len(left)
            waiting = {i for i in left if left & set(pipeline.nodes[i].deps)}
            left = waiting if forward else {dep for i in left for dep in pipeline.nodes[i].deps if dep in left}
    return sorted(left)


def _coverage_problems(pipeline: Pipeline, num_devices: int | None) -> Iterator[str]:
    """Every operation on every token once; each O range in one form of collectives; D always reduced."""
    whole = [NanoBatch(0, pipeline.num_tokens)]
    for op in ALWAYS:
        yield from _partition_problems(pipeline, (op,), whole)
    if any(node.op is OpKind.ROUTER for node in pipeline.nodes):
        yield from _partition_problems(pipeline, (OpKind.ROUTER,), whole)
    if not pipeline.is_tensor_parallel:
        if num_devices is not None and num_devices > 1:
            yield f"it has no collectives, but is to run on {num_devices} devices"
        return
    if num_devices == 1:
        network = [pipeline.describe(i) for i, node in enumerate(pipeline.nodes) if node.op in COLLECTIVES]
        yield f"it is to run on one device, but has collectives: {', '.join(network)}"
        return
    yield from _partition_problems(pipeline, (OpKind.D_AR,), whole)
    yield from _partition_problems(pipeline, (OpKind.O_AG, OpKind.O_AR), whole)
    gathered = [pipeline.tokens_of(node) for node in pipeline.nodes if node.op is OpKind.O_AG]
    yield from _partition_problems(pipeline, (OpKind.ATTN_AG,), gathered)
    for i, node in enumerate(pipeline.nodes):
        forms = {
            other.op
            for other in pipeline.nodes
            if other.op in (OpKind.O_AG, OpKind.O_AR) and pipeline.tokens_of(other).intersects(pipeline.tokens_of(node))
        }
        if node.op is OpKind.O and len(forms) > 1:
            yield f"{pipeline.describe(i)} is partly gathered (O.AG) and partly reduced (O.AR)"


def _partition_problems(pipeline: Pipeline, ops: tuple[OpKind, ...], tokens: Iterable[NanoBatch]) -> Iterator[str]:
    """What keeps the nodes of `ops` from covering `tokens` exactly once."""
    name = " or ".join(op.value for op in ops)
    nodes = [i for i, node in enumerate(pipeline.nodes) if node.op in ops]
    wanted = _merged(tokens)
    if wanted and not nodes:
        yield f"operation {name} is missing"
        return
    ranges = {i: pipeline.tokens_of(pipeline.nodes[i]) for i in nodes}
    for k, i in enumerate(nodes):
        for j in nodes[:k]:
            if ranges[i].intersects(ranges[j]):
                yield f"{pipeline.describe(j)} and {pipeline.describe(i)} overlap"
        for extra in _without(ranges[i], wanted):
            yield f"{pipeline.describe(i)} has tokens {extra.start}..{extra.stop}, on which {name} has nothing to do"
    covered = _merged(ranges.values())
    for part in wanted:
        for gap in _without(part, covered):
            yield f"tokens {gap.start}..{gap.stop} are in no {name} node"


def _merged(ranges: Iterable[NanoBatch]) -> list[NanoBatch]:
    """The same tokens as disjoint ascending ranges that do not touch."""
    found: list[NanoBatch] = []
    for tokens in sorted(ranges):
        if found and tokens.start <= found[-1].stop:
            found[-1] = NanoBatch(found[-1].start, max(found[-1].stop, tokens.stop))
        else:
            found.append(tokens)
    return found


def _without(tokens: NanoBatch, covered: Iterable[NanoBatch]) -> Iterator[NanoBatch]:
    """The parts of `tokens` outside of `covered`, which is as `_merged` gives it."""
    start = tokens.start
    for part in covered:
        if part.start >= tokens.stop:
            break
        if part.start > start:
            yield NanoBatch(start, part.start)
        start = max(start, part.stop)
    if start < tokens.stop:
        yield NanoBatch(start, tokens.stop)


def _dependency_problems(pipeline: Pipeline) -> Iterator[str]:
    """Reads that no chain of dependencies puts after the write: within a layer, between layers, of keys and values."""
    reach = ancestors(pipeline, 2)
    for need in needs(pipeline):
        if (problem := order_problem(pipeline, need)) is not None:
            yield problem
        elif not reach[1][need.consumer] >> ((1 - need.distance) * len(pipeline.nodes) + need.producer) & 1:
            field = "carried_deps" if need.distance else "deps"
            consumer, producer = pipeline.describe(need.consumer), pipeline.describe(need.producer)
            what = "the keys and values that" if pipeline.nodes[need.consumer].op is OpKind.PF_ATTN else "what"
            yield f"{consumer} reads {what} {producer} writes, but does not wait for it: add {need.producer} to its {field}"


def _share_problems(pipeline: Pipeline) -> Iterator[str]:
    """Nodes that wait for exactly the same nodes start together; their shares must fit into the device.

    Looked at deep in the loop: the last two of four iterations.
    """
    groups: dict[int, list[tuple[int, int]]] = {}
    for iteration, row in list(enumerate(ancestors(pipeline, 4, with_streams=True)))[2:]:
        for index, bits in enumerate(row):
            groups.setdefault(bits, []).append((iteration, index))
    for group in groups.values():
        total = sum(pipeline.nodes[index].share for _, index in group)
        if total > 1 + SHARE_ROUNDING and any(iteration == 3 for iteration, _ in group):
            names = ", ".join(f"{pipeline.describe(i)} with {pipeline.nodes[i].share:g}" for _, i in group)
            yield f"these start together, but their shares add up to {total:g} > 1: {names}"
