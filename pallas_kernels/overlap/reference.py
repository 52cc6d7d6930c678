"""What are the two operations?  One after the other, to check by eye."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.matmul import reference as matmul
from pallas_kernels.paged_attention import reference as paged_attention


def matmul_and_decode_attention(
    x, kernel, residual, q, k_pages, v_pages, layer, kv_lens, page_indices, num_decode, *, sm_scale
) -> tuple[np.ndarray, np.ndarray]:
    """float32 [m out] and [R H h], as `api.matmul_and_decode_attention` defines them."""
    kernel = np.asarray(kernel, np.float32)
    product = matmul.matmul(np.asarray(x, np.float32), kernel.reshape(kernel.shape[0], -1))
    if kernel.ndim == 3:
        gate, up = np.split(product, 2, axis=1)
        product = gate / (1 + np.exp(-gate)) * up
    if residual is not None:
        product = product + np.asarray(residual, np.float32)
    cu_q_lens = jnp.minimum(jnp.arange(len(kv_lens) + 1), num_decode)
    attended = paged_attention.paged_attention(
        q, k_pages, v_pages, layer, kv_lens, page_indices, cu_q_lens, num_decode, sm_scale=sm_scale
    )
    return product, np.asarray(attended, np.float32)
