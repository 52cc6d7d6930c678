"""For which device is the program being traced?  The abstract device where one is set (code for a GPU that is not there)."""

import ctypes
import functools
import importlib.util
import sys

import jax

# Compute capabilities of GPUs that code is compiled for where there is none.
CAPABILITIES = {"A100": 80, "A30": 80, "A10": 86, "L4": 89, "L40": 89, "L40S": 89, "H100": 90, "H200": 90, "GH200": 90}

ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = (
    158,
    0x1023,
    18,
)  # x86-64 Linux: a call, what it asks for, the tiles


def platform() -> str:
    """cpu, gpu or tpu."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None or device.platform is None else device.platform


@functools.cache
def cpu_has(feature: str) -> bool:
    """Whether this CPU has a feature by LLVM's name; False where LLVM's Python package is not installed."""
    if importlib.util.find_spec("llvmlite") is None:
        return False
    import llvmlite.binding

    return llvmlite.binding.get_host_cpu_features().get(feature, False)


@functools.cache
def cpu_has_amx() -> bool:
    """Whether this CPU has a matrix unit for bfloat16 and the kernel of the system lets this process use it, which must be asked."""
    if not (cpu_has("amx-tile") and cpu_has("amx-bf16") and sys.platform == "linux"):
        return False
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0


def num_multiprocessors() -> int:
    """Streaming multiprocessors of one GPU.  Raises ValueError on a device that has no such count (a CPU)."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    count = getattr(jax.devices()[0], "core_count", None) if device is None else device.num_cores
    if not count:
        raise ValueError(f"{jax.devices()[0].device_kind!r} has no count of multiprocessors")
    return count


def compute_capability() -> int | None:
    """10 * major + minor version of the GPU that JAX traces for, None if it traces for none that is known."""
    device = jax.devices()[0]
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.device_kind != device.device_kind:
        names = [name for name in abstract.device_kind.replace("-", " ").split() if name in CAPABILITIES]
        return CAPABILITIES[names[0]] if names else None
    if device.platform != "gpu":
        return None
    return int(device.compute_capability.replace(".", ""))


def why_not_hopper() -> str | None:
    """What keeps kernels made of Hopper's wgmma and TMA from the device, None if nothing does."""
    if platform() != "gpu":
        return f"runs on 'gpu', not on {platform()!r}"
    capability = compute_capability()
    if capability is None or capability // 10 != 9:
        return f"is made of Hopper's wgmma, compute capability 9, which this GPU ({capability}) does not have"
    return None
