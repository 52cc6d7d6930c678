"""How does a CPU find the KV cache's bytes?  By the operating system's page table, which huge pages make short.

Attention reads pages of the cache, a few kilobytes each, in no order.  In the system's own pages of 4 kB each one costs a walk
through the page table or two; in pages of 2 MB the core remembers where all of them are.
"""

import ctypes
import mmap
import sys
from typing import Any

import jax

__all__ = ["use_huge_pages"]

_COLLAPSE = 25  # MADV_COLLAPSE of Linux 6.1 and later: now, and whatever the system's setting is


def use_huge_pages(arrays: Any) -> bool:
    """Moves what CPU arrays of a pytree hold into huge pages, but for less than one at each end; values and addresses stay.

    Returns whether the system did so for all of them: False where it has no huge pages or no memory left for them.
    """
    shards = [shard.data for array in jax.tree.leaves(arrays) for shard in array.addressable_shards]
    if sys.platform != "linux" or any(device.platform != "cpu" for shard in shards for device in shard.devices()):
        return False
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    errors = [madvise(*_whole_pages(shard), _COLLAPSE) for shard in shards]
    return not any(errors)


def _whole_pages(array: jax.Array) -> tuple[int, int]:
    """Start and length of the system's pages that the array's bytes fill."""
    start = array.unsafe_buffer_pointer()
    first, stop = -(-start // mmap.PAGESIZE), (start + array.nbytes) // mmap.PAGESIZE
    return first * mmap.PAGESIZE, max(stop - first, 0) * mmap.PAGESIZE
