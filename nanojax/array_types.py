"""What does each letter in a shape mean?  The notation legend of the whole project.

| letter | meaning | letter | meaning |
|---|---|---|---|
| `T` | token budget: tokens per step, a constant shape | `L` | decoder layers |
| `t` | tokens of a nano-batch | `D` | model width |
| `S` | slots: rows of the resident request table | `H` | query heads |
| `R` | rows of a batch: sequences that take part in a step | `K` | key/value heads |
| `A` | arrivals: requests loaded by one `load` call | `G` | query heads per key/value head, `H / K` |
| `P` | page-table width: pages a request can hold | `h` | head dimension |
| `N` | pages in the pool | `F` | feed-forward width |
| `p` | tokens per page | `E` | experts |
| `M` | maximum tokens of a request, prompt and output | `V` | vocabulary |
| `B` | stop tokens a request can name | `k` | draft length |

A trailing `+1` is literal (`cu_q_lens` has `R+1` entries).  `h2` is `h / 2`, `G2` is `G + 2`: a KV head's queries, key and value.
"""

from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Key, PyTree, UInt16, UInt32

__all__ = ["Array", "Bool", "Float", "Float32", "Int32", "Key", "Params", "PyTree", "UInt16", "UInt32"]

if TYPE_CHECKING:
    Array = jax.Array
else:
    Array = jax.Array | np.ndarray  # on the device, or on its way there from the host

Params = dict
"""Nested dict of arrays, as `flax.nnx.to_pure_dict` gives it (layers under int keys)."""
