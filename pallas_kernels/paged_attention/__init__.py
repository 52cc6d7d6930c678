"""Which names does the paged attention kernel offer?"""

from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_attention.arg_specs import Rows

__all__ = ["Rows", "paged_attention"]
