"""What runs the model, and how fast can it be?  Published accelerators, the device here, and its measured peaks.

Everything that looks at the device is in this file.  Published numbers and measured ones never mix: `HardwareSpec`
is what a maker or the paper prints, `Measurement` is what this device did.
"""

import dataclasses
import functools
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.matmul import matmul, pack

__all__ = [
    "PAPER_TABLE_1", "REAL_HARDWARE", "Device", "HardwareSpec", "Measurement",
    "detect", "hardware_spec", "measure_copy_bandwidth", "measure_peak_flops",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HardwareSpec:
    """One accelerator as published.

    network_bytes_per_s: both directions together, as Table 1 prints it; one way is half.
    peak_flops: dense FP16 / BF16 FLOP/s with float32 accumulation.
    num_cores: streaming multiprocessors (NVIDIA); None where the source does not say.
    """

    name: str
    year: int
    memory_bytes: float
    memory_bytes_per_s: float
    network_bytes_per_s: float
    peak_flops: float
    num_cores: int | None
    source: str

    @property
    def memory_sweep_s(self) -> float:
        """Time to read the whole memory once: paper Eq. 1, `MemSize / MemBW`."""
        return self.memory_bytes / self.memory_bytes_per_s

    @property
    def flops_per_byte(self) -> float:
        """`Compute / MemBW`: arithmetic intensity at which compute and memory take equally long."""
        return self.peak_flops / self.memory_bytes_per_s

    @property
    def network_per_memory_bandwidth(self) -> float:
        """`NetBW / MemBW`."""
        return self.network_bytes_per_s / self.memory_bytes_per_s


def _table_1(name: str, year: int, memory_gb: int, memory_gb_s: int, network_gb_s: int, gflops: int) -> HardwareSpec:
    source = "NanoFlow, arXiv 2408.12757v2, Table 1"
    return HardwareSpec(name, year, memory_gb * 1e9, memory_gb_s * 1e9, network_gb_s * 1e9, gflops * 1e9, None, source)


# As printed, to reproduce the paper.  The printed H200 has 96 GB; a real one (`h200-sxm` below) has 141 GB.
PAPER_TABLE_1: dict[str, HardwareSpec] = {
    spec.name: spec
    for spec in (
        _table_1("v100", 2017, 16, 900, 300, 125_000),
        _table_1("a100-40", 2020, 40, 1_555, 600, 312_000),
        _table_1("a100-80", 2021, 80, 2_000, 600, 312_000),
        _table_1("h100", 2023, 80, 3_352, 900, 989_000),
        _table_1("h200", 2024, 96, 4_800, 900, 989_000),
        _table_1("b100", 2024, 120, 8_000, 1_800, 1_800_000),
        _table_1("b200", 2024, 120, 8_000, 1_800, 2_250_000),
        _table_1("mi250", 2021, 128, 3_352, 800, 362_000),
        _table_1("mi300", 2023, 192, 5_300, 1_024, 1_307_000),
        _table_1("mi325x", 2024, 256, 6_000, 1_024, 1_307_000),
        _table_1("gaudi-2", 2022, 96, 2_400, 600, 1_000_000),
        _table_1("gaudi-3", 2024, 128, 3_700, 1_200, 1_800_000),
        _table_1("ada-6000", 2022, 48, 960, 64, 182_000),
    )
}

# As the makers' data sheets give them.
REAL_HARDWARE: dict[str, HardwareSpec] = {
    spec.name: spec
    for spec in (
        HardwareSpec("a100-80-sxm", 2020, 80e9, 2.039e12, 600e9, 312e12, 108, "NVIDIA A100 80GB SXM data sheet"),
        HardwareSpec("h100-sxm", 2022, 80e9, 3.35e12, 900e9, 989.5e12, 132, "NVIDIA H100 SXM data sheet"),
        HardwareSpec("h200-sxm", 2024, 141e9, 4.8e12, 900e9, 989.5e12, 132, "NVIDIA H200 SXM data sheet"),
    )
}

# What JAX calls a device -> name in REAL_HARDWARE.
DEVICE_KINDS = (
    (r"\bA100\b.*\b80GB\b", "a100-80-sxm"),
    (r"\bH100\b(?!.*(PCIe|NVL))", "h100-sxm"),
    (r"\bH200\b(?!.*NVL)", "h200-sxm"),
)


def hardware_spec(name: str) -> HardwareSpec:
    """The published numbers of `name`: `PAPER_TABLE_1` or `REAL_HARDWARE`.  Raises ValueError listing the names."""
    known = PAPER_TABLE_1 | REAL_HARDWARE
    if name not in known:
        raise ValueError(f"hardware {name!r} is unknown: {', '.join(known)}")
    return known[name]


@dataclasses.dataclass(frozen=True)
class Device:
    """The device that JAX uses by default.

    name: model of the processor or accelerator.    kind: JAX's platform: cpu, gpu, tpu.
    num_cores: processors that this process may use (CPU) or multiprocessors (GPU).    num_devices: devices of the kind.
    spec: published numbers, where the accelerator is in `REAL_HARDWARE`.
    """

    name: str
    kind: str
    num_cores: int
    num_devices: int
    spec: HardwareSpec | None = None


def detect() -> Device:
    """What JAX runs on."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return Device(_cpu_name(), "cpu", _num_usable_cpus(), jax.device_count())
    spec = next((REAL_HARDWARE[name] for kind, name in DEVICE_KINDS if re.search(kind, device.device_kind)), None)
    num_cores = getattr(device, "core_count", None) or (spec.num_cores if spec else None) or 1
    return Device(device.device_kind, device.platform, num_cores, jax.device_count(), spec)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Rate over repeated timings: `median`, with `low` and `high` (the slowest and fastest), each per second.

    what: what was run, for the record.
    """

    median: float
    low: float
    high: float
    num_repeats: int
    what: str

    @property
    def spread_fraction(self) -> float:
        """`(high - low) / median`."""
        return (self.high - self.low) / self.median


def measure_peak_flops(
    dtype: Any = jnp.float32, *, sizes: Sequence[int] | None = None, num_repeats: int = 10
) -> Measurement:
    """FLOP/s (2 per multiply-add) of the best of some square matmuls: the "measured peak" of the paper's Eq. 5.

    By XLA, and on a CPU by the product that the model runs there.  Operands in `dtype`, float32 accumulation and result, as in the
    model.  `sizes` defaults to 1024, 1536, 2048 on a CPU and 4096, 8192 elsewhere; repeats are interleaved over the sizes, since
    shared machines drift.  Takes about 8 s on two CPU cores.  Raises ValueError unless `num_repeats >= 1` and all sizes are positive.
    """
    is_cpu = jax.default_backend() == "cpu"
    sizes = ((1024, 1536, 2048) if is_cpu else (4096, 8192)) if sizes is None else tuple(sizes)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes={sizes} must be positive, and at least one")
    dtype = jnp.dtype(dtype)
    products = {"XLA's": jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))}
    if is_cpu:  # XLA's is not the fastest there
        products["the model's"] = jax.jit(matmul)
    operands = {
        n: tuple(jax.random.normal(key, (n, n), dtype) for key in jax.random.split(jax.random.key(n))) for n in sizes
    }
    launches = 1 if is_cpu else 10
    runs = {
        (n, name): functools.partial(product, a, b if name == "XLA's" else pack(b, 1))
        for n, (a, b) in operands.items()
        for name, product in products.items()
    }
    rates = [
        _rates(f"{name} {n}x{n}x{n} matmul, {dtype.name} operands, float32 accumulation", 2.0 * n**3, seconds)
        for (n, name), seconds in _time_interleaved(runs, num_repeats, launches).items()
    ]
    return max(rates, key=lambda rate: rate.median)


def measure_copy_bandwidth(*, num_bytes: int = 256 << 20, num_repeats: int = 10) -> Measurement:
    """Bytes/s of memory traffic, reads plus writes, of negating an array of `num_bytes` (larger than every cache).

    In place (donated), because fresh pages from the operating system would otherwise dominate on a CPU.
    Raises ValueError for fewer than 4 bytes.
    """
    if num_bytes < 4:
        raise ValueError(f"num_bytes={num_bytes} must be >= 4")
    negate = jax.jit(jnp.negative, donate_argnums=0)
    array = jnp.ones(num_bytes // 4, jnp.float32)

    def run() -> jax.Array:
        nonlocal array
        array = negate(array)
        return array

    launches = 1 if jax.default_backend() == "cpu" else 10
    seconds = _time_interleaved({"negate": run}, num_repeats, launches)["negate"]
    return _rates(f"negating {array.nbytes} bytes of float32 in place, read and written", 2.0 * array.nbytes, seconds)


def _time_interleaved(
    runs: dict[Any, Callable[[], jax.Array]], num_repeats: int, launches: int
) -> dict[Any, list[float]]:
    """Seconds per call, `num_repeats` times each, in turn.  `launches` calls are queued before waiting for the last."""
    if num_repeats < 1:
        raise ValueError(f"num_repeats={num_repeats} must be >= 1")
    for run in runs.values():
        run().block_until_ready()
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(num_repeats):
        for name, run in runs.items():
            start_s = time.perf_counter()
            [run() for _ in range(launches)][-1].block_until_ready()
            seconds[name].append((time.perf_counter() - start_s) / launches)
    return seconds


def _rates(what: str, amount: float, seconds: list[float]) -> Measurement:
    rates = [amount / s for s in seconds]
    return Measurement(float(np.median(rates)), min(rates), max(rates), len(rates), what)


def _num_usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = re.findall(r"^model name\s*:\s*(.+)$", file.read(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
