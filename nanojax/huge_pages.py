"""How does a CPU find the KV cache's bytes?  By the operating system's page table, which huge pages make short.

Attention reads pages of the cache, a few kilobytes each, in no order.  In the system's own pages of 4 kB each one costs a walk
through the page table or two; in pages of 2 MB the core remembers where all of them are.
"""

import ctypes
import mmap
import sys
import threading
from typing import Any

import jax

__all__ = ["use_huge_pages"]

_COLLAPSE = 25  # MADV_COLLAPSE of Linux 6.1 and later: now, and whatever the system's setting is


def use_huge_pages(arrays: Any) -> threading.Thread:
    """Moves what CPU arrays of a pytree hold into huge pages, but for less than one at each end; values and addresses stay.

    It takes a second per gigabyte, in a thread, which is returned; programs may use the arrays, and donate them, meanwhile.  Where
    the system has no huge pages or no memory left for them, all stays as it was.
    """
    shards = [shard.data for array in jax.tree.leaves(arrays) for shard in array.addressable_shards]
    is_here = sys.platform == "linux" and all(
        device.platform == "cpu" for shard in shards for device in shard.devices()
    )
    places = [_whole_pages(shard) for shard in shards] if is_here else []
    thread = threading.Thread(target=_collapse, args=(places,), name="huge_pages", daemon=True)
    thread.start()
    return thread


def _collapse(places: list[tuple[int, int]]) -> None:
    """Asks the system, range by range; one that it refuses stays as it is."""
    for start, length in places:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _COLLAPSE)


def _whole_pages(array: jax.Array) -> tuple[int, int]:
    """Start and length of the system's pages that the array's bytes fill."""
    start = array.unsafe_buffer_pointer()
    first, stop = -(-start // mmap.PAGESIZE), (start + array.nbytes) // mmap.PAGESIZE
    return first * mmap.PAGESIZE, max(stop - first, 0) * mmap.PAGESIZE
