"""Which calls does paged attention see in practice?  One list for the tests, the benchmark and the profile table."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

Rows = Literal["decode", "prefill"]
"""Kinds of rows that a call can be asked for alone."""


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """One batch: row r has `q_lens[r]` query tokens at the end of `kv_lens[r]` tokens; decode rows come first."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    num_tokens: int
    num_rows: int
    max_len: int
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]

    @property
    def num_decode(self) -> int:
        """Leading rows with one query token."""
        return next((row for row, q_len in enumerate(self.q_lens) if q_len != 1), len(self.q_lens))

    @property
    def pages_per_row(self) -> int:
        """Width P of the page table."""
        return -(-self.max_len // self.page_size)

    @property
    def num_pages_used(self) -> int:
        """Pages that hold at least one token."""
        return sum(-(-kv_len // self.page_size) for kv_len in self.kv_lens)

    def kv_bytes(self, dtype: DTypeLike) -> int:
        """Bytes of keys and values that the call has to read, in whole tokens."""
        return sum(self.kv_lens) * 2 * self.num_kv_heads * self.head_dim * jnp.dtype(dtype).itemsize

    def flops(self) -> int:
        """Multiplications and additions of the two products over visible pairs of query and key."""
        pairs = sum(q * kv - q * (q - 1) // 2 for q, kv in zip(self.q_lens, self.kv_lens, strict=True))
        return 4 * pairs * self.num_heads * self.head_dim


# (name, H, K, h): heads of the models that the project serves; G = H / K is 1, 2, 3, 4, 7, 8.
HEADS = (
    ("llama-2-7b/8", 4, 4, 128),
    ("stories260k", 8, 4, 8),
    ("smollm2-135m", 9, 3, 64),
    ("llama-3-8b/4", 8, 2, 128),
    ("qwen2.5-coder-0.5b", 14, 2, 64),
    ("llama-3-70b/8", 8, 1, 128),
)

_SMOLLM2 = {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "page_size": 16, "num_rows": 64, "max_len": 2048}


def _decode_lens(num_rows: int) -> tuple[int, ...]:
    """Contexts of 100 to 600 tokens in a shuffled order, the same each time."""
    return tuple(np.random.default_rng(0).permutation(np.linspace(100, 600, num_rows).astype(int)).tolist())


# Steps of an engine that serves SmolLM2-135M with up to 64 requests.
SERVING_SPECS = (
    ArgSpec("decode-16", num_tokens=16, q_lens=(1,) * 16, kv_lens=_decode_lens(16), **_SMOLLM2),
    ArgSpec("decode-64", num_tokens=64, q_lens=(1,) * 64, kv_lens=_decode_lens(64), **_SMOLLM2),
    ArgSpec(
        "mixed-256", num_tokens=256, q_lens=(1,) * 50 + (120, 86), kv_lens=(*_decode_lens(50), 240, 86), **_SMOLLM2
    ),
    ArgSpec("prefill-256", num_tokens=256, q_lens=(240, 16), kv_lens=(240, 16), **_SMOLLM2),
    ArgSpec("prefill-512", num_tokens=512, q_lens=(240, 240, 32), kv_lens=(240, 240, 32), **_SMOLLM2),
)

_LLAMA3_8B = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 16, "max_len": 4096}
_LLAMA3_70B_OF_8 = {**_LLAMA3_8B, "num_heads": 8, "num_kv_heads": 1}

# Steps of a large GPU: decode rows alone, the paper's dense batch of decode rows and a chunk, and chunks alone: short ones,
# long ones, and one whose first tokens are in the cache already.
GPU_SPECS = (
    ArgSpec("8b-decode-64x2k", num_tokens=64, num_rows=64, q_lens=(1,) * 64, kv_lens=(2048,) * 64, **_LLAMA3_8B),
    ArgSpec("8b-decode-512x1k", num_tokens=512, num_rows=512, q_lens=(1,) * 512, kv_lens=(1024,) * 512, **_LLAMA3_8B),
    ArgSpec("8b-prefill-2048", num_tokens=2048, num_rows=4, q_lens=(512,) * 4, kv_lens=(512,) * 4, **_LLAMA3_8B),
    ArgSpec(
        "8b-mixed-2048", num_tokens=2048, num_rows=1088, q_lens=(1,) * 1024 + (1024,), kv_lens=(768,) * 1024 + (1024,),
        **_LLAMA3_8B,
    ),
    ArgSpec(
        "70b/8-mixed-2048", num_tokens=2048, num_rows=1088, q_lens=(1,) * 1024 + (1024,),
        kv_lens=(768,) * 1024 + (1024,), **_LLAMA3_70B_OF_8,
    ),
    ArgSpec("8b-prefill-2x4k", num_tokens=8192, num_rows=2, q_lens=(4096,) * 2, kv_lens=(4096,) * 2, **_LLAMA3_8B),
    ArgSpec("8b-chunk-2k-of-4k", num_tokens=2048, num_rows=1, q_lens=(2048,), kv_lens=(4096,), **_LLAMA3_8B),
)  # fmt: skip


def arg_shapes(spec: ArgSpec, dtype: DTypeLike, *, num_layers: int, num_pages: int, sharding=None) -> dict:
    """Shapes of what `make_args` makes, for a program that is compiled and not run."""

    def shape(*dims, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    pages = shape(num_layers, num_pages, spec.num_kv_heads, spec.page_size, spec.head_dim, dtype=dtype)
    return {
        "q": shape(spec.num_tokens, spec.num_heads, spec.head_dim, dtype=dtype),
        "k_pages": pages,
        "v_pages": pages,
        "kv_lens": shape(spec.num_rows),
        "page_indices": shape(spec.num_rows, spec.pages_per_row),
        "cu_q_lens": shape(spec.num_rows + 1),
        "num_decode": shape(),
    }


def make_args(
    spec: ArgSpec,
    dtype: DTypeLike,
    *,
    kv_dtype: DTypeLike | None = None,
    num_layers: int = 1,
    num_pages: int | None = None,
) -> dict:
    """Random arguments of `api.paged_attention`, but `layer`.

    The pages in use lie scattered over a pool of `num_pages` pages, twice as many as are used if None.
    """
    rng = np.random.default_rng(0)
    num_rows = len(spec.q_lens)
    num_pages = 2 * max(spec.num_pages_used, 1) if num_pages is None else num_pages
    table = rng.integers(0, num_pages, (spec.num_rows, spec.pages_per_row), np.int32)
    free = iter(rng.permutation(num_pages))
    for row, kv_len in enumerate(spec.kv_lens):
        for page in range(-(-kv_len // spec.page_size)):
            table[row, page] = next(free)
    kv_lens = np.zeros(spec.num_rows, np.int32)
    kv_lens[:num_rows] = spec.kv_lens
    cu_q_lens = np.full(spec.num_rows + 1, sum(spec.q_lens), np.int32)
    cu_q_lens[: num_rows + 1] = np.cumsum((0, *spec.q_lens))
    pool = (num_layers, num_pages, spec.num_kv_heads, spec.page_size, spec.head_dim)
    k_pages, v_pages = (rng.standard_normal(pool, np.float32) for _ in range(2))
    q = rng.standard_normal((spec.num_tokens, spec.num_heads, spec.head_dim), np.float32)
    return {
        "q": jnp.asarray(q, dtype),
        "k_pages": jnp.asarray(k_pages, kv_dtype or dtype),
        "v_pages": jnp.asarray(v_pages, kv_dtype or dtype),
        "kv_lens": jnp.asarray(kv_lens),
        "page_indices": jnp.asarray(table),
        "cu_q_lens": jnp.asarray(cu_q_lens),
        "num_decode": jnp.asarray(spec.num_decode, jnp.int32),
    }
