"""For which device is the program being traced?  The abstract device where one is set (code for a GPU that is not there)."""

import jax


def platform() -> str:
    """cpu, gpu or tpu."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None or device.platform is None else device.platform


def num_multiprocessors() -> int:
    """Streaming multiprocessors of one GPU.  Raises ValueError on a device that has no such count (a CPU)."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    count = getattr(jax.devices()[0], "core_count", None) if device is None else device.num_cores
    if not count:
        raise ValueError(f"{jax.devices()[0].device_kind!r} has no count of multiprocessors")
    return count
