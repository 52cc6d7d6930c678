"""Which matrix products and attention batches does the report measure?  LLaMA-3-8B's, at the sizes that serving has.

Arguments are made on the device by traceable functions.  Weights and caches of a job differ from one inner run to the
next, so that they come from memory and not from the L2 cache, as in a model.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention.arg_specs import ArgSpec

NUM_INNER = 4
"""Different weights, or layers of the cache, in one program; one in a smoke run, whose time is the compiler's."""


def num_inner(is_smoke: bool) -> int:
    """How often a program of the report does its job."""
    return 1 if is_smoke else NUM_INNER


@dataclasses.dataclass(frozen=True)
class Product:
    """`num_tokens` activations of `width` values times a weight of `num_columns` columns, all in bfloat16."""

    name: str
    num_tokens: int
    width: int
    num_columns: int

    @property
    def flops(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.num_tokens * self.width * self.num_columns

    @property
    def num_bytes(self) -> float:
        """The weight, what comes in and what goes out, once each."""
        values = self.width * self.num_columns + self.num_tokens * (self.width + self.num_columns)
        return 2.0 * values

    @property
    def columns(self) -> dict[str, Any]:
        """What it is, for a table."""
        return {"job": self.name, "num_tokens": self.num_tokens, "width": self.width, "num_columns": self.num_columns}

    def args(self, seed: int = 0, *, num_weights: int = NUM_INNER) -> tuple[jax.Array, list[jax.Array]]:
        """Activations, and `num_weights` weights."""
        keys = jax.random.split(jax.random.key(seed), num_weights + 1)
        x = jax.random.normal(keys[0], (self.num_tokens, self.width), jnp.bfloat16)
        scale = jnp.bfloat16(self.width**-0.5)
        return x, [jax.random.normal(key, (self.width, self.num_columns), jnp.bfloat16) * scale for key in keys[1:]]


_8B_PRODUCTS = {"KQV": (4096, 6144), "O": (4096, 4096), "UG": (4096, 28672), "D": (14336, 4096)}
_SMOKE_PRODUCTS = {"KQV": (64, 96), "UG": (64, 128)}


def products(is_smoke: bool, num_tokens: tuple[int, ...]) -> list[Product]:
    """The dense operations of a layer at each number of tokens."""
    shapes = _SMOKE_PRODUCTS if is_smoke else _8B_PRODUCTS
    found = [Product(name, 16 if is_smoke else t, *shape) for t in num_tokens for name, shape in shapes.items()]
    return list(dict.fromkeys(found))


_8B_HEADS = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
_SMOKE_HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


def decode_spec(num_rows: int, context_len: int, *, page_size: int = 64) -> ArgSpec:
    """Rows of one token, contexts of `context_len` on average, from half to one and a half of it."""
    lens = np.linspace(0.5, 1.5, num_rows) if num_rows > 1 else np.ones(1)
    kv_lens = np.random.default_rng(0).permutation(np.maximum(lens * context_len, 1).astype(int))
    return ArgSpec(
        f"decode-{num_rows}x{context_len}", **_8B_HEADS, page_size=page_size, num_tokens=num_rows, num_rows=num_rows,
        max_len=-(-int(kv_lens.max()) // page_size) * page_size, q_lens=(1,) * num_rows, kv_lens=tuple(kv_lens.tolist()),
    )  # fmt: skip


def prefill_spec(num_rows: int, chunk_len: int, context_len: int, *, page_size: int = 64) -> ArgSpec:
    """Chunks of `chunk_len` tokens at the end of `context_len`."""
    return ArgSpec(
        f"prefill-{num_rows}x{chunk_len}@{context_len}", **_8B_HEADS, page_size=page_size,
        num_tokens=num_rows * chunk_len, num_rows=num_rows, max_len=context_len, q_lens=(chunk_len,) * num_rows,
        kv_lens=(context_len,) * num_rows,
    )  # fmt: skip


def mixed_spec(num_decode: int, context_len: int, chunk_lens: tuple[int, ...], *, page_size: int = 64) -> ArgSpec:
    """A step of serving: rows that decode, then prompts' chunks, of which the first is in the middle of its prompt."""
    decode = decode_spec(num_decode, context_len, page_size=page_size)
    first, *others = chunk_lens
    kv_lens = (*decode.kv_lens, first + 100, *others)
    return dataclasses.replace(
        decode, name=f"mixed-{num_decode}x{context_len}+{sum(chunk_lens)}", num_tokens=num_decode + sum(chunk_lens) + 3,
        num_rows=num_decode + len(chunk_lens) + 1, q_lens=(*decode.q_lens, *chunk_lens), kv_lens=kv_lens,
        max_len=-(-max(kv_lens) // page_size) * page_size,
    )  # fmt: skip


def small(spec: ArgSpec) -> ArgSpec:
    """The same kind of batch, tiny: at most 6 rows, chunks and contexts of at most 40 tokens."""
    kept = [i for i, n in enumerate(spec.q_lens) if n == 1][:3] + [i for i, n in enumerate(spec.q_lens) if n > 1][:3]
    q_lens = tuple(min(spec.q_lens[i], 9) for i in kept)
    kv_lens = tuple(max(min(spec.kv_lens[i], 20 + 5 * i), q) for i, q in zip(kept, q_lens, strict=True))
    return dataclasses.replace(
        spec, **_SMOKE_HEADS, page_size=16, num_tokens=sum(q_lens) + 1, num_rows=len(kept) + 1, max_len=48,
        q_lens=q_lens, kv_lens=tuple(min(n, 48) for n in kv_lens),
    )  # fmt: skip


def decode_specs(is_smoke: bool) -> list[ArgSpec]:
    """The batches that the aims name."""
    specs = [decode_spec(64, 2048), decode_spec(512, 1024)]
    return [small(specs[0])] if is_smoke else specs


def prefill_specs(is_smoke: bool) -> list[ArgSpec]:
    """Whole prompts, and a chunk of a long one."""
    specs = [prefill_spec(4, 512, 512), prefill_spec(2, 2048, 2048), prefill_spec(1, 1024, 8192)]
    return [small(specs[0])] if is_smoke else specs


def mixed_specs(is_smoke: bool) -> list[ArgSpec]:
    """A step in the middle of serving 512 / 512."""
    specs = [mixed_spec(512, 768, (512, 300, 200))]
    return [small(spec) for spec in specs] if is_smoke else specs


def attention_args(spec: ArgSpec, *, seed: int = 0, num_layers: int = NUM_INNER, dtype: Any = jnp.bfloat16) -> tuple:
    """Arguments of `paged_attention` but for `layer`: q, k_pages, v_pages, kv_lens, page_indices, cu_q_lens, num_decode.

    The pages in use lie scattered over a pool that is an eighth larger.  Whatever no result may depend on is NaN: unused
    pages, and the rest of each row's last page.
    """
    num_pages = spec.num_pages_used + spec.num_pages_used // 8 + 1
    rng = np.random.default_rng(seed)
    table = rng.integers(0, num_pages, (spec.num_rows, spec.pages_per_row)).astype(np.int32)
    num_valid = np.zeros(num_pages, np.int32)  # tokens of each page that somebody may read
    free = iter(rng.permutation(num_pages))
    for row, kv_len in enumerate(spec.kv_lens):
        for page in range(-(-kv_len // spec.page_size)):
            table[row, page] = next(free)
            num_valid[table[row, page]] = min(kv_len - page * spec.page_size, spec.page_size)
    num_rows = len(spec.q_lens)
    kv_lens = np.zeros(spec.num_rows, np.int32)
    kv_lens[:num_rows] = spec.kv_lens
    cu_q_lens = np.full(spec.num_rows + 1, sum(spec.q_lens), np.int32)
    cu_q_lens[: num_rows + 1] = np.cumsum((0, *spec.q_lens))

    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (spec.num_tokens, spec.num_heads, spec.head_dim), dtype)
    pool = (num_layers, num_pages, spec.num_kv_heads, spec.page_size, spec.head_dim)
    is_valid = np.arange(spec.page_size) < num_valid[:, None]
    mask = jnp.asarray(is_valid)[None, :, None, :, None]
    k, v = (jnp.where(mask, jax.random.normal(key, pool, dtype), jnp.nan) for key in keys[1:])
    num_decode = jnp.asarray(spec.num_decode, jnp.int32)
    return q, k, v, jnp.asarray(kv_lens), jnp.asarray(table), jnp.asarray(cu_q_lens), num_decode


def attention_columns(spec: ArgSpec) -> dict[str, Any]:
    """What a batch is, for a table."""
    return {"job": spec.name, "num_tokens": sum(spec.q_lens), "kv_tokens": sum(spec.kv_lens)}
