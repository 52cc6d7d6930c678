"""Which pairs does a pipeline for one device run side by side?  One list for the tests, the compile checks and the benchmark."""

import dataclasses

BF16_BYTES, F32_BYTES = 2, 4


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """A product of one nano-batch beside decode attention of another, bfloat16.

    num_tokens, width, num_columns: [num_tokens width] x [width num_columns]; `is_gated`: twice the columns, gate and up.
    has_residual: the residual stream is read and written in float32; else the result is bfloat16.
    num_rows, kv_len: sequences, and tokens in the cache of each.
    """

    name: str
    num_tokens: int
    width: int
    num_columns: int
    is_gated: bool
    has_residual: bool
    num_rows: int
    kv_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128
    page_size: int = 16

    @property
    def matmul(self) -> "Work":
        """The product; each operand and the result are moved once."""
        kernel_columns = self.num_columns * (2 if self.is_gated else 1)
        out_bytes = self.num_tokens * self.num_columns * (2 * F32_BYTES if self.has_residual else BF16_BYTES)
        operands = self.width * (self.num_tokens + kernel_columns)
        return Work(2 * self.num_tokens * self.width * kernel_columns, operands * BF16_BYTES + out_bytes)

    @property
    def attention(self) -> "Work":
        """Decode attention; keys and values, queries and results are moved once."""
        kv = self.num_rows * self.kv_len * 2 * self.num_kv_heads * self.head_dim
        rows = 2 * self.num_rows * self.num_heads * self.head_dim
        return Work(2 * kv * (self.num_heads // self.num_kv_heads), (kv + rows) * BF16_BYTES)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a kernel has to do at least."""

    flops: int
    num_bytes: int

    def floor_s(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The roofline: no device with these peaks can be done sooner."""
        return max(self.flops / flops_per_s, self.num_bytes / bytes_per_s)

    def __add__(self, other: "Work") -> "Work":
        """Both, side by side: the floor of the sum is that of perfect overlap."""
        return Work(self.flops + other.flops, self.num_bytes + other.num_bytes)


# (model, width, feed-forward columns, query heads, KV heads) on one device; the larger model as one of eight shards.
_MODELS = (("llama-3-8b", 4096, 14336, 32, 8), ("llama-3-70b/8", 8192, 28672 // 8, 8, 1))
# (tokens of the step, first nano-batch); the first one's decode attention runs beside the second one's products.
_SPLITS = ((1024, 384), (2048, 768))
_KV_LEN = 1024  # half way through 512 tokens in, 1024 out


def _pairs() -> list[ArgSpec]:
    found = []
    for model, d_model, d_ff, num_heads, num_kv_heads in _MODELS:
        for budget, first in _SPLITS:
            for op, width, columns in (
                ("O", num_heads * 128, d_model),
                ("UG", d_model, d_ff),
                ("D", d_ff, d_model),
            ):
                name, heads = f"{model}-{budget}-{op}", (num_heads, num_kv_heads)
                is_gated = op == "UG"
                found.append(
                    ArgSpec(name, budget - first, width, columns, is_gated, not is_gated, first, _KV_LEN, *heads)
                )
    return found


ARG_SPECS = tuple(_pairs())
