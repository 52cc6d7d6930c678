"""What does one block of a compiled kernel take of a streaming multiprocessor?  Registers, spills, shared memory, threads.

XLA, Triton and Mosaic GPU each tell in their own way; here all end as `Kernel`.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
import re
import subprocess
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.thunk_plan import Thunk

RESERVED_SMEM_BYTES = 1024
"""What each resident block takes beyond its own (CUDA programming guide, compute capability 8.0 and later)."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled kernel and how it is launched.

    compiler: xla, triton or mosaic.    num_launches: launches in the program.    smem_bytes: static and dynamic.
    registers: of a thread.    spill_bytes: stored and loaded.    None where nobody has assembled the PTX yet.
    """

    name: str
    compiler: str
    num_launches: int
    num_blocks: int
    num_threads: int
    smem_bytes: int
    registers: int | None
    spill_bytes: int | None
    ptx: str = dataclasses.field(default="", repr=False)

    def assembled(self, capability: int) -> "Kernel":
        """The same with the registers, spills and static shared memory that its PTX, if there is one, compiles to."""
        if self.registers is not None or not self.ptx:
            return self
        registers, spill_bytes, static_bytes = assemble(self.ptx, architecture(capability))
        smem_bytes = self.smem_bytes + static_bytes
        return dataclasses.replace(self, registers=registers, spill_bytes=spill_bytes, smem_bytes=smem_bytes)

    def blocks_per_core(self, *, smem_bytes: int, registers: int, threads: int) -> int:
        """Blocks that one multiprocessor with so much of each holds at once (registers are handed out by 8 per thread)."""
        limits = [smem_bytes // (self.smem_bytes + RESERVED_SMEM_BYTES), threads // self.num_threads]
        if self.registers:
            limits.append(registers // (-(-self.registers // 8) * 8 * self.num_threads))
        return min(limits)


@contextlib.contextmanager
def mosaic_dump(folder: pathlib.Path) -> Iterator[None]:
    """Inside, Mosaic GPU writes what it compiles to `folder`; it takes no other orders than the environment's."""
    names = {"MOSAIC_GPU_DUMP_TO": str(folder), "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def kernels(dump: pathlib.Path, plan: Sequence[Thunk], lowered: Any, capability: int) -> tuple[Kernel, ...]:
    """All kernels of a program, by name; those that XLA made not yet `assembled`."""
    return (*_of_xla(dump, plan), *_of_mosaic(dump), *_of_triton(lowered, capability))


def _of_xla(dump: pathlib.Path, plan: Sequence[Thunk]) -> Iterator[Kernel]:
    texts = [path.read_text() for path in dump.glob("*.ptx")]
    sources = {name: text for text in texts for name in re.findall(r"\.entry (\w+)\(", text)}
    found: dict[tuple, int] = {}
    for launch in (thunk.kernel for thunk in plan):
        if launch is not None:
            found[launch] = found.get(launch, 0) + 1
    for (name, grid, threads, smem_bytes), count in found.items():
        yield Kernel(
            name, "xla", count, math.prod(grid), math.prod(threads), smem_bytes, None, None, sources.get(name, "")
        )


def _of_mosaic(dump: pathlib.Path) -> Iterator[Kernel]:
    for log in sorted(dump.glob("*.ptxas")):
        registers, spill_bytes, static_bytes = _ptxas_report(log.read_text())
        grid, threads, smem_bytes = _mosaic_launch(log.with_suffix(".mlir-passes.log").read_text())
        yield Kernel(log.stem, "mosaic", 1, grid, threads, smem_bytes + static_bytes, registers, spill_bytes)


def _mosaic_launch(passes: str) -> tuple[int, int, int]:
    """Blocks, threads and dynamic shared memory of the first `gpu.launch`, whose numbers are constants defined above it."""
    at = passes.index("gpu.launch ")
    line = passes[at : passes.index("\n", at)]
    constants = dict(re.findall(r"(%[\w.-]+) = arith\.constant (\d+)", passes[:at]))
    sizes = [int(constants[name]) for name in re.findall(r"%[\w.-]+ = (%[\w.-]+)", line)]
    smem = re.search(r"dynamic_shared_memory_size (%[\w.-]+)", line)
    return math.prod(sizes[:3]), math.prod(sizes[3:6]), int(constants[smem[1]]) if smem else 0


def _of_triton(lowered: Any, capability: int) -> Iterator[Kernel]:
    """Kernels of `triton_kernel_call_ffi` calls: each call has its kernel's PTX and grid inside."""
    found: dict[bytes, int] = {}
    for operation in _custom_calls(lowered.compiler_ir()):
        attributes = operation.attributes
        if attributes["call_target_name"].value == "triton_kernel_call_ffi":
            opaque = attributes["mhlo.backend_config"]["opaque"].value_bytes
            found[opaque] = found.get(opaque, 0) + 1
    for opaque, count in found.items():
        # AnnotatedKernelCall{KernelCall{Kernel{name, warps, shared bytes, PTX}, grid of three}}
        call = _fields(_fields(zlib.decompress(opaque))[1][0])
        kernel = _fields(call[1][0])
        (name,), (warps,), (ptx,) = kernel[1], kernel[2], kernel[4]
        registers, spill_bytes, static_bytes = assemble(ptx.decode(), architecture(capability))
        smem_bytes = max(kernel.get(3, [0])[0], static_bytes)
        blocks = math.prod(call.get(axis, [1])[0] for axis in (2, 3, 4))
        yield Kernel(name.decode(), "triton", count, blocks, 32 * warps, smem_bytes, registers, spill_bytes)


def _custom_calls(module: Any) -> Iterator[Any]:
    pending = [module.operation]
    while pending:
        operation = pending.pop()
        if operation.name == "stablehlo.custom_call":
            yield operation
        pending += [inner for region in operation.regions for block in region.blocks for inner in block.operations]


def _fields(message: bytes) -> dict[int, list]:
    """A protocol buffer's fields by number: integers, or bytes (strings and messages alike)."""
    found: dict[int, list] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
            if byte < 0x80:
                return value

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            value: Any = varint()
        else:
            size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
            value, at = message[at : at + size], at + size
        found.setdefault(number, []).append(value)
    return found


def ptxas() -> pathlib.Path:
    """NVIDIA's assembler, of the CUDA compiler's or Triton's package.  Raises FileNotFoundError."""
    places = [("nvidia", "cuda_nvcc/bin"), ("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")]
    for package, folder in places:
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            if (path := pathlib.Path(root, folder, "ptxas")).exists():
                return path
    raise FileNotFoundError("ptxas is in none of the packages nvidia-cuda-nvcc and triton")


def architecture(capability: int) -> str:
    """What the assembler calls a compute capability: Hopper's with its own instructions."""
    return f"sm_{capability}{'a' if capability >= 90 else ''}"


@functools.lru_cache(maxsize=256)
def assemble(ptx: str, architecture: str) -> tuple[int, int, int]:
    """Registers of a thread, bytes spilled, and static shared memory of a PTX text with one kernel.

    architecture: as `sm_90a`.  Raises subprocess.CalledProcessError when the assembler refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas(), f"-arch={architecture}", "-v", source, "-o", f"{folder}/kernel.cubin"]
        return _ptxas_report(subprocess.run(command, check=True, capture_output=True, text=True).stderr)


def _ptxas_report(text: str) -> tuple[int, int, int]:
    used = re.findall(r"Used (\d+) registers", text)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
    static = re.findall(r"(\d+) bytes smem", text)
    return max(map(int, used)), sum(map(int, spilled)), max(map(int, static), default=0)
