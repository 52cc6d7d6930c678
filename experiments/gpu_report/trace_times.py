"""Where does a profiler's trace say that the device's time went?  By operation, and how much of it ran side by side.

A kernel of a trace bears the name of the instruction of the optimised program that launched it; the program's text says
which named scopes that came from (`layer3/KQV`).  Of the kernels of a CUDA graph a trace says neither, and puts all on one
stream: a program to be traced is compiled without graphs.
"""

import collections
import dataclasses
import pathlib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

from jax.profiler import ProfileData


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One execution on the device, or of an operation on a CPU.  Times are nanoseconds on the trace's clock."""

    name: str
    stream: str
    start_ns: float
    end_ns: float
    instruction: str


def read_trace(folder: pathlib.Path) -> list[Kernel]:
    """The kernels of the newest trace in `folder`: those of the GPUs' streams, else of the CPU's operations.

    Raises FileNotFoundError without a trace.
    """
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"no *.xplane.pb in {folder.name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # jaxlib's own type, in jax 0.11
        planes = list(ProfileData.from_file(str(files[-1])).planes)
        on_gpu = [plane for plane in planes if plane.name.startswith("/device:GPU")]
        kernels = []
        for plane in on_gpu or planes:
            for line in plane.lines:
                if on_gpu and "Stream" not in line.name:
                    continue  # summaries of the same kernels by module and by operation
                for event in line.events:
                    stats = {str(key): value for key, value in event.stats}
                    instruction = str(stats.get("hlo_op", ""))
                    if on_gpu or instruction:
                        stream = f"{plane.name} {line.name}"
                        kernels.append(Kernel(event.name, stream, event.start_ns, event.end_ns, instruction))
    return kernels


def scopes_of(program_text: str) -> dict[str, str]:
    """Instruction -> its `op_name`, of an optimised program as text."""
    pattern = r"^\s*(?:ROOT )?%?([\w.\-]+) = .*metadata=\{[^}]*op_name=\"([^\"]*)\""
    return dict(re.findall(pattern, program_text, re.MULTILINE))


def operation(scope: str) -> str:
    """`jit(step)/layer3/KQV[0:384]/dot` -> KQV; a scope outside of the layers is its first one; else `rest`."""
    inside = re.search(r"layer\d+/([A-Za-z.+]+)", scope)
    if inside:
        return inside[1]
    for name in ("logits", "sample", "cut"):
        if f"/{name}" in scope:
            return name
    return "rest"


def busy_by_operation(kernels: Iterable[Kernel], scopes: Mapping[str, str]) -> dict[str, tuple[float, int]]:
    """Operation -> (seconds of its kernels, added up, and their number)."""
    found: dict[str, tuple[float, int]] = collections.defaultdict(lambda: (0.0, 0))
    for kernel in kernels:
        name = operation(scopes.get(kernel.instruction, ""))
        seconds, count = found[name]
        found[name] = (seconds + 1e-9 * (kernel.end_ns - kernel.start_ns), count + 1)
    return dict(found)


def seconds_by_depth(kernels: Sequence[Kernel]) -> list[float]:
    """Seconds in which exactly 0, 1, 2, ... streams were busy, from the first kernel's start to the last one's end."""
    by_stream: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    for kernel in kernels:
        by_stream[kernel.stream].append((kernel.start_ns, kernel.end_ns))
    changes = [
        change for spans in by_stream.values() for span in _union(spans) for change in zip(span, (1, -1), strict=True)
    ]
    depths = [0.0] * (len(by_stream) + 1)
    depth, last_ns = 0, None
    for at_ns, change in sorted(changes):
        if last_ns is not None:
            depths[depth] += 1e-9 * (at_ns - last_ns)
        depth, last_ns = depth + change, at_ns
    return depths


def busy_fraction(kernels: Sequence[Kernel]) -> float:
    """Of the time from the first kernel's start to the last one's end: when at least one ran.  Needs no streams."""
    spans = _union((kernel.start_ns, kernel.end_ns) for kernel in kernels)
    return sum(end - start for start, end in spans) / (spans[-1][1] - spans[0][0])


def _union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans, those that touch joined: a kernel's events may nest."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
