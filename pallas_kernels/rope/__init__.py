"""Queries, keys and values out of their joint projection: cut apart, rotated by position, rounded for the cache.

`rotate_qkv` (`api.py`) is the contract and the way in.
"""

from pallas_kernels.rope.api import rotate_qkv

__all__ = ["rotate_qkv"]
