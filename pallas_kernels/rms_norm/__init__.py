"""RMS norm of each token's vector, rounded for the product that follows.

`rms_norm` (`api.py`) is the contract and the way in.
"""

from pallas_kernels.rms_norm.api import rms_norm

__all__ = ["rms_norm"]
