"""Which names does the placement probe offer?"""

from pallas_kernels.placement.probe import occupy, read_stamps

__all__ = ["occupy", "read_stamps"]
