"""Which operations does a scheduled program start beside others, on what do they wait, and what runs them?  XLA's text, read.

XLA prints one instruction a line, in the order in which they are launched.  What runs beside the main stream is a pair of
instructions, `*-start` and `*-done`: calls on other streams, collectives, copies.  A collective for which XLA found nothing
to run between the two is launched on the main stream: in jax 0.11 one instruction, in 0.10 a pair as well.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping

LIBRARIES = {
    "__cublas$lt$matmul": "cuBLASLt", "__cublas$gemm": "cuBLAS", "mosaic_gpu_v2": "Mosaic GPU",
    "triton_kernel_call_ffi": "Triton", "triton_kernel_call": "Triton", "__gpu$xla.gpu.triton": "Pallas Triton",
}  # fmt: skip
"""What calls of these targets run; what is none of them is named as it is."""
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
NOTHING_TO_RUN = ("AllocateBuffer", "ShardBarrierFrom", "ShardBarrierTo", "annotate_device_placement")


@dataclasses.dataclass(frozen=True)
class Start:
    """An operation that is started and waited for, or a collective.

    kind: the instruction, as `call-start`, `all-reduce`.    label: of the pipeline's operation, as `O.AG`, else the kind.
    layer: its index, None outside of the layers.    tokens: its range, as `0:768`, empty outside of the layers.
    path: what runs it, as `cuBLASLt`.    needs: bit i is set where it needs the result of start i.
    """

    kind: str
    label: str
    layer: int | None
    tokens: str
    path: str
    needs: int


def starts(hlo: str) -> tuple[Start, ...]:
    """The starts and collectives of the entry computation, in the order of their launch; tuples are looked through."""
    paths = _paths(hlo)
    found: list[Start] = []
    reached: dict[str, int] = {}  # instruction -> starts that it needs
    parts: dict[str, list[str]] = {}
    for line in entry(hlo).splitlines():
        match = re.match(r"  (?:ROOT )?%([\w.-]+) = (.*)", line)
        if match is None:
            continue
        name, rest = match.groups()
        body = rest.split(", metadata=")[0].split(", calls=")[0].split(", to_apply=")[0]
        operands = re.findall(r"%([\w.-]+)", re.sub(r"control-predecessors=\{[^}]*\}", "", body))
        element = re.search(r"get-tuple-element\(.*\), index=(\d+)", body)
        if re.search(r"\) tuple\(", body):
            parts[name] = operands
        if element and operands[0] in parts:
            operands = [parts[operands[0]][int(element[1])]]
        needs = functools.reduce(int.__or__, (reached.get(operand, 0) for operand in operands), 0)
        kind = re.search(rf" ([\w-]+-start|{'|'.join(COLLECTIVES)})\(", body)
        if kind is None:
            reached[name] = needs
            continue
        called = re.search(r"(?:to_apply|calls)=%([\w.-]+)", rest)
        reached[name] = needs | 1 << len(found)
        path = " + ".join(sorted(paths.get(called[1], frozenset()))) if called and kind[1] == "call-start" else ""
        found.append(Start(kind[1], *_label(rest, kind[1]), path or _default_path(kind[1]), needs))
    return tuple(found)


def entry(hlo: str) -> str:
    """The entry computation's instructions, a line each."""
    return hlo[hlo.index("\nENTRY ") :].split("\n}", 1)[0]


def paths_of_main(hlo: str) -> frozenset[str]:
    """What runs the calls of the entry computation itself, on the main stream."""
    return frozenset(_libraries(entry(hlo)))


def _label(text: str, kind: str) -> tuple[str, int | None, str]:
    name = re.search(r'op_name="([^"]*)"', text)
    layer = re.search(r"/layer(\d+)/([\w.+]+)\[([\d:]+)\]", name[1]) if name else None
    if layer:
        return layer[2], int(layer[1]), layer[3]
    return ("logits" if name and "/logits/" in name[1] else kind), None, ""


def _default_path(kind: str) -> str:
    if kind == "call-start":
        return "XLA"
    return "XLA's copies" if kind.startswith("copy") else "NCCL"


def _libraries(text: str) -> list[str]:
    targets: list[str] = re.findall(r'custom_call_target="([^"]+)"', text)
    found = [LIBRARIES.get(target, target) for target in targets if target not in NOTHING_TO_RUN]
    return ["NCCL", *found] if re.search(rf" (?:{'|'.join(COLLECTIVES)})(?:-start)?\(", text) else found


def _paths(hlo: str) -> Mapping[str, frozenset[str]]:
    """Computation -> what its calls run, those of the loops and conditions inside of it included."""
    bodies = dict(re.findall(r"^%([\w.-]+) \([^\n]*\{\n(.*?)^\}", hlo, re.MULTILINE | re.DOTALL))
    found: dict[str, frozenset[str]] = {}

    def paths(name: str) -> frozenset[str]:
        if name not in found:
            found[name] = frozenset()  # no computation calls itself
            body = bodies.get(name, "")
            inner = re.findall(r"(?:to_apply|calls|body|condition)=%([\w.-]+)", body)
            found[name] = frozenset(_libraries(body)).union(*map(paths, inner))
        return found[name]

    for name in bodies:
        paths(name)
    return found
