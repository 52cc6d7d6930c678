"""In which order, on which streams and in which CUDA graphs does XLA launch a compiled program?  Its thunks, as dumped.

XLA writes the plan as text, one thunk a line, nested ones indented.  The host walks it from top to bottom: an async region
starts on its stream when the main stream has come that far, and the main stream waits for it where the region is done.
A collective that has nothing else of the main stream to run beside it is launched on the main stream itself; regions that
were started before it and are not done run on beside it.
"""

import dataclasses
import re
from collections.abc import Sequence

MAIN = "main"
COLLECTIVES = ("kAllGather", "kAllReduce", "kReduceScatter", "kAllToAll", "kCollectivePermute")
_THUNK = re.compile(r"(?P<indent>\s*)(?P<id>\d+): (?P<kind>k\w+)\s*(?:\[.*?\])?\s*(?P<rest>.*)")
_KERNEL = re.compile(r"(\S+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\]\s+shared_memory: (\d+) bytes")


@dataclasses.dataclass(frozen=True)
class Thunk:
    """One launch.  `depth`: how many thunks it is inside of.    stream, region: of an async start (region: of its end)."""

    kind: str
    depth: int
    text: str
    stream: str | None = None
    region: int | None = None

    @property
    def kernel(self) -> tuple[str, tuple[int, ...], tuple[int, ...], int] | None:
        """Name, grid, threads and shared bytes beyond the kernel's static ones, of a kernel that XLA compiled."""
        found = _KERNEL.match(self.text)
        if self.kind != "kCustomKernel" or found is None:
            return None
        name, grid, threads, shared = found.groups()
        return name, tuple(map(int, grid.split(","))), tuple(map(int, threads.split(","))), int(shared)


@dataclasses.dataclass(frozen=True)
class Region:
    """What is on its way on `stream` from the thunk at `start` to the one at `done` (places in the plan)."""

    stream: str
    start: int
    done: int
    thunks: tuple[Thunk, ...]

    @property
    def collective(self) -> str | None:
        """The collective that this is, None if it is none."""
        return next((thunk.kind for thunk in self.thunks if thunk.kind in COLLECTIVES), None)

    def meets(self, other: "Region") -> bool:
        """Whether both are under way at the same time, on different streams."""
        return self.stream != other.stream and self.start < other.done and other.start < self.done


def parse(text: str) -> tuple[Thunk, ...]:
    """The thunks of a `*.thunk_sequence*.txt`, in order.  Raises ValueError where there are none."""
    thunks, stack = [], []
    for line in text.splitlines():
        match = _THUNK.match(line)
        if match is None:  # "body:", "condition:" and the like
            continue
        indent = len(match["indent"])
        stack = [own for own in stack if own < indent]
        stream = re.search(r"stream=(\w+\[\d+\])", match["rest"])
        region = re.search(r"async_id=(\d+)", match["rest"])
        thunks.append(
            Thunk(
                kind=match["kind"],
                depth=len(stack),
                text=match["rest"].strip(),
                stream=stream and stream[1],
                region=region and int(region[1]),
            )
        )
        stack.append(indent)
    if not thunks:
        raise ValueError("no thunks in what XLA dumped")
    return tuple(thunks)


def regions(thunks: Sequence[Thunk]) -> tuple[Region, ...]:
    """The async regions at the top of the plan and the collectives on the main stream, in the order of their starts."""
    done = {thunk.region: i for i, thunk in enumerate(thunks) if thunk.kind == "kAsyncDone"}
    found = []
    for i, thunk in enumerate(thunks):
        if thunk.depth == 0 and thunk.kind == "kAsyncStart":
            end = next((j for j in range(i + 1, len(thunks)) if thunks[j].depth <= thunk.depth), len(thunks))
            found.append(Region(thunk.stream or MAIN, i, done[thunk.region], tuple(thunks[i + 1 : end])))
        elif thunk.depth == 0 and thunk.kind in COLLECTIVES:
            found.append(Region(MAIN, i, i + 1, (thunk,)))
    return tuple(found)


def beside(found: Sequence[Region]) -> tuple[tuple[int, ...], ...]:
    """For each region those of other streams that are under way at the same time, by index."""
    return tuple(tuple(j for j, other in enumerate(found) if region.meets(other)) for region in found)


def graphs(thunks: Sequence[Thunk]) -> tuple[str, ...]:
    """What the host launches one by one, by kind: `kCommandBuffer` is a CUDA graph."""
    return tuple(thunk.kind for thunk in thunks if thunk.depth == 0)
