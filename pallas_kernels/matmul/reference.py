"""What is a matrix product?  One sum per token and column, to check by eye."""

import numpy as np


def matmul(x, kernel) -> np.ndarray:
    """float32 [t, f] of `x` [t, c] and `kernel` [c, f], products and sums in float64 until the end."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    out = np.zeros((x.shape[0], kernel.shape[1]), np.float32)
    for token in range(x.shape[0]):
        for column in range(kernel.shape[1]):
            out[token, column] = sum(x[token, k] * kernel[k, column] for k in range(x.shape[1]))
    return out
