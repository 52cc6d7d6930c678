"""What do a model, a machine and mean lengths decide before anything runs?  The NanoFlow paper's closed forms.

arXiv 2408.12757v2, section 3: which resource binds (its Figures 2 and 3), how large the batch can get, how fast serving
can be at best (Eq. 5).  Where formula and figure disagree in print, the one that gives the figure is used and noted.
"""

import dataclasses

from nanojax.config import ModelConfig
from nanojax.hardware import HardwareSpec

__all__ = [
    "MEASURED_PEAK_FRACTION", "PAPER_PARAMS", "MemoryUse", "ParamCount", "kv_bytes_per_token", "max_dense_batch",
    "max_requests", "memory_to_compute_ratio", "network_to_compute_ratio", "optimal_throughput", "param_count", "peak_memory",
]  # fmt: skip

MEASURED_PEAK_FRACTION = 260 / 312
"""What a large CUTLASS GEMM reaches of an A100's printed 312 TFLOP/s, in the paper's Eq. 5: its 1857 tokens/s per GPU are
260e12 / (2 * 70e9).  The text says 280 TFLOP/s, which would give 2000; the optima behind its Figure 11 give 259 to 260."""


@dataclasses.dataclass(frozen=True)
class ParamCount:
    """Parameters that one token meets, and parameters that lie in memory.  They differ with experts."""

    active: int | float
    stored: int | float


def param_count(model: ModelConfig) -> ParamCount:
    """Exact counts, from the shapes."""
    return ParamCount(float(model.num_active_params), float(model.num_params))


PAPER_PARAMS: dict[str, ParamCount] = {
    name: ParamCount(count, count)
    for name, count in {
        "llama-3-8b": 8e9, "mixtral-8x7b": 12.6e9, "llama-2-70b": 70e9, "llama-3-70b": 70e9, "qwen2-72b": 72e9,
        "deepseek-67b": 67e9, "llama-3.1-405b": 405e9,
    }.items()
}  # fmt: skip
"""The round counts behind the paper's figures.  Mixtral: Figure 3 comes out only if the 12.6e9 active parameters also stand
for its weights in memory, though 46.7e9 are stored."""


def optimal_throughput(
    model: ModelConfig,
    hardware: HardwareSpec,
    *,
    num_devices: int = 1,
    peak_fraction: int | float = 1.0,
    params: ParamCount | None = None,
) -> float:
    """Eq. 5: `Compute / (2 P)`, input and output tokens per second of all devices together.

    peak_fraction: of the published peak; 1 for a data sheet's optimum, `MEASURED_PEAK_FRACTION` for the paper's.
    Raises ValueError unless `num_devices >= 1` and `peak_fraction` is in (0, 1].
    """
    if num_devices < 1 or not 0 < peak_fraction <= 1:
        raise ValueError(f"num_devices={num_devices} must be >= 1 and peak_fraction={peak_fraction} in (0, 1]")
    params = params or param_count(model)
    return num_devices * peak_fraction * hardware.peak_flops / (2 * params.active)


def network_to_compute_ratio(
    model: ModelConfig,
    hardware: HardwareSpec,
    num_devices: int,
    *,
    params: ParamCount | None = None,
    bytes_per_value: int = 2,
) -> float:
    """Figure 2: T_net / T_compute of a tensor-parallel layer; above 1 the network binds.

    `(2 D L / P) * bytes_per_value * (num_devices - 1) * Compute / (NetBW / 2)`, per-device rates.  The printed Eq. 3 has
    `num_devices` and `NetBW`; the printed figure has one less, as a device need not send to itself, and one direction.
    With pipeline stages `num_devices` are those of one stage.  Raises ValueError for `num_devices < 1`.
    """
    if num_devices < 1:
        raise ValueError(f"num_devices={num_devices} must be >= 1")
    params = params or param_count(model)
    sent_per_flop = 2 * model.d_model * model.num_layers * bytes_per_value * (num_devices - 1) / params.active
    return sent_per_flop * hardware.peak_flops / (hardware.network_bytes_per_s / 2)


def kv_bytes_per_token(model: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes that a token adds to the KV cache, all layers, all devices together."""
    return model.kv_values_per_token * bytes_per_value


def max_requests(
    model: ModelConfig,
    hardware: HardwareSpec,
    num_devices: int,
    input_len: int | float,
    output_len: int | float,
    *,
    params: ParamCount | None = None,
    bytes_per_value: int = 2,
) -> float:
    """Requests that decode at once when weights and KV cache fill the memory: `(MemSize - 2 P) / (kv (p + d / 2))`.

    A decoding request holds p + d / 2 tokens on average (mean input p, mean output d).
    Raises ValueError for lengths that are not positive, and where the weights leave no room.
    """
    if not input_len > 0 or not output_len > 0:
        raise ValueError(f"input_len={input_len} and output_len={output_len} must be > 0")
    params = params or param_count(model)
    memory_bytes, weights_bytes = hardware.memory_bytes * num_devices, params.stored * bytes_per_value
    if weights_bytes >= memory_bytes:
        raise ValueError(
            f"{model.name}: weights of {weights_bytes:.4g} bytes leave no room for a KV cache in the {memory_bytes:.4g} "
            f"bytes of {num_devices} x {hardware.name}"
        )
    tokens = (memory_bytes - weights_bytes) / kv_bytes_per_token(model, bytes_per_value)
    return tokens / (input_len + output_len / 2)


def max_dense_batch(
    model: ModelConfig,
    hardware: HardwareSpec,
    num_devices: int,
    input_len: int | float,
    output_len: int | float,
    *,
    params: ParamCount | None = None,
    bytes_per_value: int = 2,
) -> float:
    """Tokens of a step when `max_requests` decode and prefill keeps pace: `max_requests * (p + d) / d`.

    Raises ValueError as `max_requests` does.
    """
    requests = max_requests(
        model, hardware, num_devices, input_len, output_len, params=params, bytes_per_value=bytes_per_value
    )
    return requests * (input_len + output_len) / output_len


def memory_to_compute_ratio(
    model: ModelConfig,
    hardware: HardwareSpec,
    num_devices: int,
    input_len: int | float,
    output_len: int | float,
    *,
    params: ParamCount | None = None,
) -> float:
    """Figure 3, T_R of Eq. 4: time to read all memory once / time to compute the largest batch; below 1 compute binds.

    `(Compute / MemBW) * (MemSize / P) / (2 B_dense)` with 2-byte values.  Raises ValueError as `max_requests` does.
    """
    batch = max_dense_batch(model, hardware, num_devices, input_len, output_len, params=params)
    active = (params or param_count(model)).active
    return hardware.flops_per_byte * (hardware.memory_bytes * num_devices / active) / (2 * batch)


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Bytes in use at the peak of a step, all devices together."""

    weights_bytes: float
    kv_bytes: float
    activation_bytes: float

    @property
    def total_bytes(self) -> float:
        """All of it."""
        return self.weights_bytes + self.kv_bytes + self.activation_bytes


def peak_memory(
    model: ModelConfig,
    num_tokens: int | float,
    input_len: int | float,
    output_len: int | float,
    *,
    params: ParamCount | None = None,
    bytes_per_value: int = 2,
) -> MemoryUse:
    """What a dense batch of `num_tokens` needs in steady state: the inverse of `max_dense_batch`, and activations.

    Activations (which the paper leaves out: below 5 %) are the residual stream, the widest operation's input and output,
    and float32 logits of each decoding request.  Raises ValueError for counts or lengths that are not positive.
    """
    if not num_tokens > 0 or not input_len > 0 or not output_len > 0:
        raise ValueError(f"num_tokens={num_tokens}, input_len={input_len}, output_len={output_len} must be > 0")
    params = params or param_count(model)
    requests = num_tokens * output_len / (input_len + output_len)
    qkv_width = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    copies = max(model.num_experts_per_token, 1)
    widest = max(model.d_model + qkv_width, copies * (model.d_model + 2 * model.d_ff))
    return MemoryUse(
        weights_bytes=params.stored * bytes_per_value,
        kv_bytes=requests * (input_len + output_len / 2) * kv_bytes_per_token(model, bytes_per_value),
        activation_bytes=num_tokens * (model.d_model + widest) * bytes_per_value + 4 * requests * model.vocab_size,
    )
