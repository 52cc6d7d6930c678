"""What does a nano-operation cost?  FLOPs, memory and network bytes, and the time that a roofline gives them.

Formulas are those that reproduce the NanoFlow paper's Table 2 (arXiv 2408.12757v2, section 3): a dense operation moves
its weights once and one copy of its input and output; collectives count what crosses a link, `num_devices - 1` copies.
"""

import dataclasses
from collections.abc import Callable, Mapping

from nanojax.config import ModelConfig
from nanojax.hardware import HardwareSpec
from nanojax.pipeline.ir import NanoBatch, OpKind

__all__ = ["BatchShape", "Duration", "OpCost", "Roofline", "op_cost", "roofline_durations", "steady_shape"]

Duration = Callable[[OpKind, NanoBatch], float]
"""Seconds that one layer's operation takes on a token range, alone on all devices: the paper's D_best."""


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """What is in the ragged batch: tokens [0, num_decode_tokens) decode, the next num_prefill_tokens are prompts.

    mean_context_len: tokens that a decode row attends, itself included.
    mean_prefill_context_len: tokens that a prefill token attends, on average, itself included.
    Raises ValueError for a negative count, or a context below 1 token where tokens have one.
    """

    num_decode_tokens: int
    num_prefill_tokens: int
    mean_context_len: int | float
    mean_prefill_context_len: int | float

    def __post_init__(self) -> None:
        for count, context in (
            ("num_decode_tokens", "mean_context_len"),
            ("num_prefill_tokens", "mean_prefill_context_len"),
        ):
            if getattr(self, count) < 0:
                raise ValueError(f"{count}={getattr(self, count)} must be >= 0")
            if getattr(self, count) > 0 and not getattr(self, context) >= 1:
                raise ValueError(
                    f"{context}={getattr(self, context)} must be >= 1: there are {getattr(self, count)} tokens"
                )

    @property
    def num_tokens(self) -> int:
        """Decode and prefill tokens.  A pipeline's ranges may go beyond: the rest is padding."""
        return self.num_decode_tokens + self.num_prefill_tokens

    def num_decode_in(self, nano_batch: NanoBatch) -> int:
        """Decode tokens of a range."""
        return max(min(nano_batch.stop, self.num_decode_tokens) - nano_batch.start, 0)

    def num_prefill_in(self, nano_batch: NanoBatch) -> int:
        """Prefill tokens of a range."""
        start = max(nano_batch.start, self.num_decode_tokens)
        return max(min(nano_batch.stop, self.num_tokens) - start, 0)

    def num_tokens_of(self, kind: OpKind, nano_batch: NanoBatch) -> int:
        """Tokens of a range that an operation works on: all of them, padding too, but for attention its own."""
        match kind:
            case OpKind.DEC_ATTN:
                return self.num_decode_in(nano_batch)
            case OpKind.PF_ATTN:
                return self.num_prefill_in(nano_batch)
        return nano_batch.num_tokens


def steady_shape(num_tokens: int, input_len: int | float, output_len: int | float) -> BatchShape:
    """The batch of `num_tokens` on which serving settles, with prompts and outputs of these mean lengths (tokens).

    Each request brings `input_len` prefill and `output_len` decode tokens, so a fraction d / (p + d) decodes, at contexts
    from p + 1 to p + d; a prompt's tokens see from 1 to p (causal).  `output_len` 0 is prefill only.
    Raises ValueError unless `num_tokens >= 1`, `input_len >= 1` and `output_len >= 0`.
    """
    if num_tokens < 1 or not input_len >= 1 or not output_len >= 0:
        raise ValueError(
            f"num_tokens={num_tokens} and input_len={input_len} must be >= 1, output_len={output_len} >= 0"
        )
    num_decode = round(num_tokens * output_len / (input_len + output_len))
    return BatchShape(num_decode, num_tokens - num_decode, input_len + (output_len + 1) / 2, (input_len + 1) / 2)


@dataclasses.dataclass(frozen=True)
class OpCost:
    """Work of an operation, all devices together."""

    flops: int | float = 0.0
    memory_bytes: int | float = 0.0
    network_bytes: int | float = 0.0

    def __add__(self, other: "OpCost") -> "OpCost":
        return OpCost(
            self.flops + other.flops,
            self.memory_bytes + other.memory_bytes,
            self.network_bytes + other.network_bytes,
        )

    def __mul__(self, times: int | float) -> "OpCost":
        return OpCost(self.flops * times, self.memory_bytes * times, self.network_bytes * times)


def op_cost(
    model: ModelConfig,
    kind: OpKind,
    nano_batch: NanoBatch,
    shape: BatchShape,
    *,
    num_devices: int = 1,
    bytes_per_value: int = 2,
) -> OpCost:
    """Cost of one layer's `kind` on the tokens of `nano_batch`, totals over `num_devices` tensor-parallel devices.

    | kind | FLOPs | values moved (times `bytes_per_value`) |
    |---|---|---|
    | KQV, O, UG, D, Router | 2 t N_w K_w | N_w K_w + t (N_w + K_w) |
    | UG, D with experts | 2 t k N_w K_w | E' N_w K_w + t k (N_w + K_w) |
    | DecAttn | (4 context + 1) H h per row | 2 K h (context + 1) + 2 H h per row |
    | PfAttn | (4 context + 1) H h per token | 2 K h (t + context / 2) + 2 H h t |
    | AG | 0 | (num_devices - 1) t width, over the network and in memory |
    | AR | (num_devices - 1) t D | twice an AG's |

    E' is the mean number of experts that t tokens touch when each picks k of E at random.  Attention moves queries,
    results and its tokens' own keys and values once; besides, a decode row reads its cache, and a range of prefill tokens
    reads what the first of its prompts, cut at a random place, had computed before.
    Raises ValueError for `num_devices < 1`, `bytes_per_value < 1`, a range that is none, or a router without experts.
    """
    if num_devices < 1 or bytes_per_value < 1:
        raise ValueError(f"num_devices={num_devices} and bytes_per_value={bytes_per_value} must be >= 1")
    if not 0 <= nano_batch.start <= nano_batch.stop:
        raise ValueError(f"tokens [{nano_batch.start}, {nano_batch.stop}) are no range")
    t = shape.num_tokens_of(kind, nano_batch)
    if t == 0:
        return OpCost()
    query_width, kv_width = model.num_heads * model.head_dim, 2 * model.num_kv_heads * model.head_dim
    flops, values, sent = 0.0, 0.0, 0.0
    match kind:
        case OpKind.KQV:
            flops, values = _dense(t, query_width + kv_width, model.d_model)
        case OpKind.O:
            flops, values = _dense(t, model.d_model, query_width)
        case OpKind.ROUTER:
            if not model.num_experts:
                raise ValueError(f"{model.name} has num_experts=0: it has no router")
            flops, values = _dense(t, model.num_experts, model.d_model)
        case OpKind.UG:
            flops, values = _feed_forward(model, t, 2 * model.d_ff, model.d_model)
        case OpKind.D:
            flops, values = _feed_forward(model, t, model.d_model, model.d_ff)
        case OpKind.DEC_ATTN:
            flops = t * (4.0 * shape.mean_context_len + 1) * query_width
            values = t * (kv_width * (shape.mean_context_len + 1.0) + 2 * query_width)
        case OpKind.PF_ATTN:
            flops = t * (4.0 * shape.mean_prefill_context_len + 1) * query_width
            values = kv_width * (t + shape.mean_prefill_context_len / 2.0) + 2 * query_width * t
        case OpKind.ATTN_AG:
            sent = (num_devices - 1.0) * t * query_width
        case OpKind.O_AG:
            sent = (num_devices - 1.0) * t * model.d_model
        case OpKind.O_AR | OpKind.D_AR:
            flops = (num_devices - 1.0) * t * model.d_model
            sent = 2 * flops
    return OpCost(flops, (values + sent) * bytes_per_value, sent * bytes_per_value)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """`num_devices` devices of `hardware`: an operation takes as long as the resource that it uses longest.

    efficiency: fraction of that resource's published rate that an operation reaches; 1 where it is not named.
    launch_s: time that an operation takes besides, each time it is launched; 0 where it is not named.
    The network runs at half of `network_bytes_per_s`, which counts both directions (paper, footnote 5).
    Raises ValueError for an efficiency that is not positive or a negative launch time.
    """

    hardware: HardwareSpec
    num_devices: int = 1
    efficiency: Mapping[OpKind, int | float] = dataclasses.field(default_factory=dict)
    launch_s: Mapping[OpKind, int | float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_devices < 1:
            raise ValueError(f"num_devices={self.num_devices} must be >= 1")
        for kind, fraction in self.efficiency.items():
            if not fraction > 0:
                raise ValueError(f"efficiency of {kind.value} is {fraction}, it must be > 0")
        for kind, seconds in self.launch_s.items():
            if not seconds >= 0:
                raise ValueError(f"launch_s of {kind.value} is {seconds}, it must be >= 0")

    def bounds_s(self, cost: OpCost) -> tuple[float, float, float]:
        """Times that compute, memory and network each need for `cost` at their published rates."""
        return (
            cost.flops / (self.num_devices * self.hardware.peak_flops),
            cost.memory_bytes / (self.num_devices * self.hardware.memory_bytes_per_s),
            cost.network_bytes / (self.num_devices * self.hardware.network_bytes_per_s / 2),
        )

    def seconds(self, kind: OpKind, cost: OpCost) -> float:
        """Time of an operation that costs `cost`; one without work is not launched."""
        longest_s = max(self.bounds_s(cost))
        if longest_s == 0:
            return 0.0
        return longest_s / self.efficiency.get(kind, 1.0) + self.launch_s.get(kind, 0.0)

    def durations(self, model: ModelConfig, shape: BatchShape, *, bytes_per_value: int = 2) -> Duration:
        """Times of `model`'s operations, one layer, on ranges of a batch of `shape`."""

        def duration(kind: OpKind, nano_batch: NanoBatch) -> float:
            cost = op_cost(
                model, kind, nano_batch, shape, num_devices=self.num_devices, bytes_per_value=bytes_per_value
            )
            return self.seconds(kind, cost)

        return duration


def roofline_durations(
    model: ModelConfig, hardware: HardwareSpec, num_devices: int, shape: BatchShape, *, bytes_per_value: int = 2
) -> Duration:
    """The times of a machine that reaches its published rates: no operation can be faster."""
    return Roofline(hardware, num_devices).durations(model, shape, bytes_per_value=bytes_per_value)


def _dense(t: int, n: int, k: int) -> tuple[float, float]:
    """FLOPs and values moved of a product `[t, k] x [k, n]`."""
    return 2.0 * t * n * k, float(n * k + t * (n + k))


def _feed_forward(model: ModelConfig, t: int, n: int, k: int) -> tuple[float, float]:
    """The same, of one feed-forward product, grouped by expert where there are experts."""
    if not model.num_experts:
        return _dense(t, n, k)
    chosen, experts = model.num_experts_per_token, model.num_experts
    touched = experts * (1 - (1 - chosen / experts) ** t)
    return 2.0 * t * chosen * n * k, touched * n * k + t * chosen * (n + k)
