"""What does XLA make of a program for a GPU that is not there?  Compiles for a described GPU and reads the result.

Everything here is origin `compiled`: read off real code for the GPU named, never run.  Needs JAX's CUDA plugin, no GPU.
"""

import collections
import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import kernel_resources, scheduled_hlo, thunk_plan
from experiments.kernel_resources import Kernel
from experiments.scheduled_hlo import Start
from experiments.thunk_plan import Region, Thunk
from nanojax import hardware
from nanojax.pipeline.compiler_options import Graphs, gpu_options

TARGETS = {"h200": "h200-sxm", "a100": "a100-80-sxm"}
"""GPUs that code can be compiled for, and their names in `nanojax.hardware`."""

# Without a GPU nothing is tuned, and XLA's untuned Triton products are far too small; and what each kernel became.
_DEVICELESS_OPTIONS = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_dump_hlo_as_text": True,
    "xla_dump_hlo_module_re": ".*",
    "xla_dump_emitter_re": ".*",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU as XLA is told of it (`experiments/gpu_targets`), and its published speeds."""

    name: str
    config: str
    spec: hardware.HardwareSpec

    def number(self, field: str) -> int:
        """A number of the configuration, e.g. `core_count`, `shared_memory_per_block_optin`.  Raises ValueError."""
        match = re.search(rf"\b{field}: (\d+)", self.config)
        if match is None:
            raise ValueError(f"target {self.name!r} has no number {field!r}")
        return int(match[1])

    @property
    def capability(self) -> int:
        """10 * major + minor version of its instruction set."""
        return 10 * self.number("major")

    def blocks_per_core(self, kernel: Kernel) -> int:
        """Blocks of the kernel that one multiprocessor holds at once; 0 where one is too large for it."""
        if kernel.smem_bytes > self.number("shared_memory_per_block_optin"):
            return 0
        return kernel.blocks_per_core(
            smem_bytes=self.number("shared_memory_per_core"), registers=self.number("registers_per_core_limit"),
            threads=self.number("threads_per_core_limit"),
        )  # fmt: skip

    def mesh(self, num_devices: int = 1, axis: str = "tp") -> Mesh:
        """GPUs of one host, along `axis`.  Raises what JAX raises without a CUDA plugin."""
        topology = topologies.get_topology_desc(
            platform="cuda", topology=f"1x1x{num_devices}", target_config=self.config
        )
        return topologies.make_mesh(topology, (num_devices,), (axis,))


def target(name: str) -> Target:
    """The target called `name`.  Raises ValueError listing the names."""
    if name not in TARGETS:
        raise ValueError(f"target {name!r} is none of {', '.join(TARGETS)}")
    path = pathlib.Path(__file__).parent / "gpu_targets" / f"{name}.textproto"
    return Target(name, path.read_text(), hardware.hardware_spec(TARGETS[name]))


def why_not() -> str | None:
    """What keeps this process from compiling for a GPU that is not there, None if nothing does."""
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return "needs JAX's CUDA plugin: `make test-gpu-compile` makes an environment with it"
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        return "needs JAX_PLATFORMS=cpu, else the plugin looks for a GPU's driver"
    return None


@dataclasses.dataclass(frozen=True)
class CompiledCode:
    """A compiled program.

    hlo: optimised and scheduled.    plan: its launches, in order.    captured: the same after grouping into CUDA graphs.
    kernels: those that are not library calls; registers and spills where the compiler reported them.
    argument_bytes, output_bytes, alias_bytes, temp_bytes: per device; aliased outputs are arguments updated in place.
    """

    target: Target
    hlo: str
    plan: tuple[Thunk, ...]
    captured: tuple[Thunk, ...]
    kernels: tuple[Kernel, ...]
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Device memory while it runs."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes

    @functools.cached_property
    def regions(self) -> tuple[Region, ...]:
        """What is started and waited for at the top of the plan: stream calls, copies, collectives, these on any stream."""
        return thunk_plan.regions(self.plan)

    @property
    def graphs(self) -> tuple[str, ...]:
        """What the host launches, by kind: one `kCommandBuffer` and nothing else is one CUDA graph."""
        return thunk_plan.graphs(self.captured)

    @functools.cached_property
    def overlap(self) -> "Overlap":
        """Which regions run beside others, and which could.  Raises ValueError where plan and HLO do not tell the same."""
        found, starts = self.regions, scheduled_hlo.starts(self.hlo)
        kinds = [(region.collective, start.path == "NCCL") for region, start in zip(found, starts, strict=False)]
        if len(starts) != len(found) or any((collective is not None) != is_nccl for collective, is_nccl in kinds):
            raise ValueError(f"{len(starts)} starts in the HLO, {len(found)} in the plan, or not in the same order")
        return Overlap(found, starts)

    def copies_of(self, shape: Sequence[int]) -> int:
        """Copies of an array of that shape, whatever its layout, and of any reshape that keeps the last three axes."""
        text = ",".join(map(str, shape))
        return len(re.findall(rf"= \(?\w+\[{text}\]\S* (?:copy|copy-start|dynamic-update-slice-copy)\(", self.hlo))

    @property
    def matmuls(self) -> Mapping[tuple[int, ...], int]:
        """Library matrix products by shape of the result."""
        found = re.findall(
            r"= \(?\w+\[([\d,]*)\]\S*(?:, \w+\[\d+\]\S*\))? custom-call\([^)]*\), custom_call_target=\"__cublas",
            self.hlo,
        )
        return collections.Counter(tuple(map(int, dims.split(","))) for dims in found)

    @property
    def mosaic_results(self) -> Mapping[tuple[int, ...], int]:
        """Calls of Mosaic kernels with one result, by its shape."""
        found = re.findall(r"= \w+\[([\d,]*)\]\S* custom-call\([^)]*\), custom_call_target=\"mosaic_gpu", self.hlo)
        return collections.Counter(tuple(map(int, dims.split(","))) for dims in found)


@dataclasses.dataclass(frozen=True)
class Overlap:
    """The regions of a plan and, in the same order, what the HLO says of them."""

    regions: tuple[Region, ...]
    starts: tuple[Start, ...]

    @functools.cached_property
    def is_possible(self) -> tuple[bool, ...]:
        """For each region whether an independent one of another stream exists."""
        num = len(self.starts)
        after = [0] * num  # bit j of i: start j needs start i
        for j, start in enumerate(self.starts):
            for i in range(num):
                after[i] |= (start.needs >> i & 1) << j
        on_stream: dict[str, int] = collections.defaultdict(int)
        for i, region in enumerate(self.regions):
            on_stream[region.stream] |= 1 << i
        everything = (1 << num) - 1
        return tuple(
            bool(everything & ~(start.needs | after[i] | on_stream[region.stream]))
            for i, (start, region) in enumerate(zip(self.starts, self.regions, strict=True))
        )

    @functools.cached_property
    def beside(self) -> tuple[tuple[int, ...], ...]:
        """For each region those of other streams that are under way at the same time, by index."""
        return thunk_plan.beside(self.regions)

    @property
    def is_there(self) -> tuple[bool, ...]:
        """For each region whether one of another stream is under way at the same time."""
        return tuple(map(bool, self.beside))

    @property
    def fraction(self) -> float:
        """Regions that overlap, of those that could."""
        possible = sum(self.is_possible)
        return sum(a and b for a, b in zip(self.is_possible, self.is_there, strict=True)) / max(possible, 1)


def compile_for(
    gpu: Target,
    f: Callable,
    args: Sequence[Any],
    *,
    mesh: Mesh | None = None,
    donate: Sequence[int] = (),
    graphs: Graphs = Graphs.ONE,
) -> CompiledCode:
    """`jax.jit(f)` compiled for GPUs that are not there.

    args: pytrees of `jax.ShapeDtypeStruct`; leaves without a sharding are whole on every device.
    mesh: the GPUs, as `gpu.mesh` gives them; one if None.
    graphs: as in `nanojax.pipeline.compiler_options`.
    Raises what JAX and XLA raise.
    """
    mesh = gpu.mesh() if mesh is None else mesh
    whole = NamedSharding(mesh, PartitionSpec())

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding if sharding is not None else whole)

    args = jax.tree.map(placed, tuple(args))
    with tempfile.TemporaryDirectory() as folder:
        dump = pathlib.Path(folder)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # kernels ask it for the GPU
            lowered = jax.jit(f, donate_argnums=tuple(donate)).lower(*args)
        with kernel_resources.mosaic_dump(dump):
            options = {**gpu_options(graphs, num_devices=mesh.size), **_DEVICELESS_OPTIONS, "xla_dump_to": folder}
            compiled: Any = lowered.compile(options)  # pyright: ignore[reportArgumentType]
        plan = _read(dump, "thunk_sequence.txt")
        captured = _read(dump, "thunk_sequence_after_thunk_passes.txt") or plan  # written where a pass changed it
        thunks = thunk_plan.parse(plan)
        memory = compiled.memory_analysis()
        return CompiledCode(
            target=gpu, hlo=compiled.as_text(), plan=thunks, captured=thunk_plan.parse(captured),
            kernels=kernel_resources.kernels(dump, thunks, lowered, gpu.capability),
            argument_bytes=memory.argument_size_in_bytes, output_bytes=memory.output_size_in_bytes,
            alias_bytes=memory.alias_size_in_bytes, temp_bytes=memory.temp_size_in_bytes,
        )  # fmt: skip


def _read(dump: pathlib.Path, suffix: str) -> str:
    """The dump of the largest module that ends so; XLA compiles small helpers too."""
    return max((path.read_text() for path in dump.glob(f"*.{suffix}")), key=len, default="")
