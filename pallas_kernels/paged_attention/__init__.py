"""Which names does the paged attention kernel offer?"""

from pallas_kernels.paged_attention.api import Rows, paged_attention

__all__ = ["Rows", "paged_attention"]
