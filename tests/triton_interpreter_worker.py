"""Runs paged attention's Triton kernels in Triton's interpreter: `python triton_interpreter_worker.py OUT`.

A process of its own, because Triton reads TRITON_INTERPRET when it is imported.  Outputs of all CASES go to the file OUT.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import arg_specs, triton_gpu
from pallas_kernels.paged_attention.arg_specs import ArgSpec, make_args
from pallas_kernels.paged_attention.triton_gpu import Config

LAYER, NUM_LAYERS = 1, 3
# Small enough that each row has many blocks, and splits; three programs share all items.
SMALL = Config(decode_block=16, prefill_tile=32, prefill_block=16, min_split=32, num_programs=3)
BATCHES = {
    "decode only": ((1, 1), (1, 16), (1, 17), (1, 300)),
    "prefill only": ((40, 40), (17, 17)),
    "decode then prefill": ((1, 5), (1, 129), (33, 33), (7, 200)),
    "chunk straddles pages": ((1, 64), (20, 30), (18, 130)),
    "prefill of one token": ((1, 9), (2, 2), (1, 1), (1, 40)),
    "longer than a tile": ((150, 290),),
    "nothing but padding": (),
    "rows without tokens": ((1, 3), (4, 4), (0, 0), (0, 0)),
}
MIXED = BATCHES["decode then prefill"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: rows as (q_len, kv_len), and how the arguments differ from plain ones of float32."""

    batch: tuple[tuple[int, int], ...]
    dtype: str = "float32"
    kv_dtype: str | None = None
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    page_size: int = 16
    num_tokens: int = 192
    num_rows: int = 6
    config: Config | None = SMALL
    is_poisoned: bool = False
    is_far: bool = False
    only: Literal["decode", "prefill"] | None = None

    @property
    def wanted(self) -> slice:
        """Tokens whose results the contract fixes."""
        num_decode = self.spec.num_decode
        return {None: slice(None), "decode": slice(num_decode), "prefill": slice(num_decode, None)}[self.only]

    @property
    def spec(self) -> ArgSpec:
        q_lens, kv_lens = zip(*self.batch, strict=True) if self.batch else ((), ())
        return ArgSpec(
            "case", self.num_heads, self.num_kv_heads, self.head_dim, self.page_size, self.num_tokens, self.num_rows,
            max_len=320, q_lens=q_lens, kv_lens=kv_lens,
        )  # fmt: skip

    def args(self) -> dict:
        kv_dtype = "bfloat16" if self.kv_dtype == "uint16" else self.kv_dtype or self.dtype
        args = make_args(self.spec, self.dtype, kv_dtype=kv_dtype, num_layers=NUM_LAYERS, num_pages=80)
        return poisoned(self.spec, args) if self.is_poisoned else args


def poisoned(spec: ArgSpec, args: dict) -> dict:
    """`args` with NaN wherever no result may come from."""
    is_used = np.zeros((NUM_LAYERS, args["k_pages"].shape[1], spec.page_size), bool)
    for row, kv_len in enumerate(spec.kv_lens):
        for s in range(kv_len):
            is_used[LAYER, args["page_indices"][row, s // spec.page_size], s % spec.page_size] = True
    pages = {x: jnp.where(is_used[:, :, None, :, None], args[x], np.nan) for x in ("k_pages", "v_pages")}
    is_padding = np.arange(spec.num_tokens) >= sum(spec.q_lens)
    return {**args, **pages, "q": jnp.where(is_padding[:, None, None], np.nan, args["q"])}


CASES = {
    **{f"{name}, {dtype}": Case(rows, dtype) for name, rows in BATCHES.items() for dtype in ("float32", "bfloat16")},
    **{
        f"{name}, {dtype}": Case(MIXED, dtype, None, H, K, h, num_tokens=64)
        for name, H, K, h in arg_specs.HEADS if h in (64, 128) for dtype in ("float32", "float16")
    },
    **{f"page_size={p}": Case(MIXED, "bfloat16", page_size=p, num_tokens=64) for p in (5, 32, 64, 128)},
    "bfloat16 pages, float32 queries": Case(MIXED, kv_dtype="bfloat16", num_tokens=64),
    "pages of bits": Case(MIXED, "bfloat16", "uint16", num_tokens=64),
    "more rows than tokens": Case(((1, 7), (1, 33)), num_tokens=4, num_rows=9),
    "default sizes": Case(MIXED, "bfloat16", head_dim=64, num_tokens=64, config=None),
    "one program": Case(MIXED, num_tokens=64, config=dataclasses.replace(SMALL, num_programs=1)),
    "more programs than work": Case(MIXED, num_tokens=64, config=dataclasses.replace(SMALL, num_programs=50)),
    **{f"{name}, poisoned": Case(rows, is_poisoned=True) for name, rows in BATCHES.items()},
    "beyond 2**31 elements": Case(MIXED, num_tokens=64, is_far=True),
    **{f"{only} only": Case(MIXED, num_tokens=64, is_poisoned=True, only=only) for only in ("decode", "prefill")},
}  # fmt: skip


class Memory:
    """An array that the interpreter takes for a torch tensor: it wants an address, a dtype, and copies between devices."""

    def __init__(self, address: int, dtype: str):
        self.dtype = dtype
        self.data_ptr = lambda: address

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return self

    def nothing(self, *_):
        return None

    set_ = copy_ = storage_offset = size = stride = nothing


def interpreted_call(far_bytes: int) -> Callable:
    """Stands in for `triton_call`.  Outputs start as NaN, so that each result must be written.

    Caches (arrays of five axes) pretend to begin `far_bytes` earlier than they do.
    """

    def call(kernel, inputs, outputs, scalars, constants, *, num_programs, views=None, aliases=None, **_):
        views, aliases = views or {}, {output: i for i, output in (aliases or {}).items()}
        arrays = [np.array(x) for x in inputs]
        results = [
            arrays[aliases[i]] if i in aliases else np.full(x.shape, np.nan, x.dtype) for i, x in enumerate(outputs)
        ]
        memory = []
        for i, x in enumerate((*arrays, *results)):
            address = x.ctypes.data - (far_bytes if x.ndim == 5 else 0)
            memory.append(Memory(address, jnp.dtype((views or {}).get(i, x.dtype)).name))
        kernel[(num_programs,)](*memory, *scalars.values(), **constants)
        return [jnp.asarray(x) for x in results]

    return call


def run(case: Case) -> np.ndarray:
    args, far_bytes = case.args(), 0
    if case.kv_dtype == "uint16":
        args |= {x: jax.lax.bitcast_convert_type(args[x], jnp.uint16) for x in ("k_pages", "v_pages")}
    if case.is_far:
        # The layer's first page is the N-th: give pages numbers from 2**31 elements on, all but the first layer skipped.
        page = args["k_pages"][0, 0].size
        skipped = (1 << 31) // page + 1
        args["page_indices"] = args["page_indices"] + skipped
        far_bytes = skipped * page * args["k_pages"].dtype.itemsize
    triton_gpu.triton_call = interpreted_call(far_bytes)
    scale = 1 / math.sqrt(case.head_dim)
    return triton_gpu.paged_attention(layer=LAYER, sm_scale=scale, config=case.config, only=case.only, **args)


def mend_interpreter() -> None:
    """Three things that Triton 3.6's interpreter does wrong.

    Loop bounds are int() of arrays of one axis, which numpy 2.4 refuses; bfloat16 values, which it keeps as their bits, are
    multiplied as integers; and float32 is cut off to bfloat16, where a GPU rounds to the nearest.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot
    convert = interpreter._convert_float

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(x, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, mode)
        return x.view(np.float32).astype(jnp.bfloat16).view(np.uint16)

    interpreter._convert_float = rounded
    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)


if __name__ == "__main__":
    mend_interpreter()
    triton_gpu.compute_capability, triton_gpu.num_multiprocessors = lambda: 80, lambda: 2
    np.savez(sys.argv[1], **{name: np.asarray(run(case), np.float32) for name, case in CASES.items()})
