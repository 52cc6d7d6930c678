"""What is fixed before anything runs?  Model shapes (with presets) and engine capacities."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1 frequency scaling: long wavelengths are stretched by `factor`, short ones kept."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-like decoder.  `num_experts > 0` makes the feed-forward a Mixtral MoE."""

    name: str
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    max_len: int
    rope_theta: float = 1e4
    rms_eps: float = 1e-5
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    num_experts: int = 0
    num_experts_per_token: int = 0

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.name}: num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.num_experts_per_token > self.num_experts:
            raise ValueError(
                f"{self.name}: num_experts_per_token={self.num_experts_per_token} > num_experts={self.num_experts}"
            )

    @property
    def num_params(self) -> int:
        """Parameters in total, from the shapes (norms and biases included)."""
        experts = max(self.num_experts, 1)
        return self._params_with(experts)

    @property
    def num_active_params(self) -> int:
        """Parameters that one token meets: all of a dense model, `num_experts_per_token` experts of an MoE."""
        return self._params_with(max(self.num_experts_per_token, 1))

    @property
    def kv_values_per_token(self) -> int:
        """Numbers (not bytes) that one token adds to the KV cache, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def _params_with(self, experts: int) -> int:
        qkv_dim = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        attention = self.d_model * (qkv_dim + self.num_heads * self.head_dim) + qkv_dim * self.qkv_bias
        ffn = 3 * self.d_model * self.d_ff * experts + self.d_model * self.num_experts
        layer = attention + ffn + 2 * self.d_model + 2 * self.head_dim * self.qk_norm
        tables = self.vocab_size * self.d_model * (1 if self.tied_head else 2)
        return self.num_layers * layer + tables + self.d_model


@dataclasses.dataclass(frozen=True)
class SamplingParts:
    """What requests may ask of sampling.  Each step on a GPU does the work for it; a CPU skips what no row asks for.

    random: a temperature above 0.    top: top-k or top-p.    logprobs: log-probabilities of the tokens.
    """

    random: bool = True
    top: bool = True
    logprobs: bool = True


GREEDY = SamplingParts(random=False, top=False, logprobs=False)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Capacities of the engine.  Every field is a compile-time constant.

    token_budgets: ladder of tokens per step, ascending; each step runs on the smallest rung that holds its work.
    num_slots: requests that are resident at once (running, or waiting with their prompt already on the device).
    page_size: tokens per KV page.    num_pages: pages in the pool.
    max_len: longest prompt + output of a request, in tokens.
    max_stop_tokens: stop tokens that a request can name.    sampling: what else it can ask for.
    """

    token_budgets: tuple[int, ...] = (16, 64, 256)
    num_slots: int = 64
    page_size: int = 16
    num_pages: int = 2048
    max_len: int = 2048
    max_stop_tokens: int = 8
    sampling: SamplingParts = SamplingParts()

    def __post_init__(self) -> None:
        if (
            not self.token_budgets
            or any(b <= 0 for b in self.token_budgets)
            or list(self.token_budgets) != sorted(set(self.token_budgets))
        ):
            raise ValueError(f"token_budgets={self.token_budgets} must be positive, distinct and ascending")
        for field in ("num_slots", "page_size", "num_pages", "max_len", "max_stop_tokens"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field}={getattr(self, field)} must be positive")

    @property
    def pages_per_slot(self) -> int:
        """Width `P` of the page table: pages that the longest request needs."""
        return -(-self.max_len // self.page_size)


def _preset(
    name: str, layers: int, width: int, heads: int, kv_heads: int, ffn: int, vocab: int, max_len: int, **rest
) -> ModelConfig:
    return ModelConfig(
        name=name, num_layers=layers, d_model=width, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=rest.pop("head_dim", width // heads), d_ff=ffn, vocab_size=vocab, max_len=max_len, **rest,
    )  # fmt: skip


# Sources: the models' published config.json files.  DeepSeek-67B's theta and eps are those of its 7B sibling
# (no public 67B file was found); its other numbers are from arXiv 2401.02954.
PRESETS: dict[str, ModelConfig] = {
    model.name: model
    for model in (
        _preset("stories260k", 5, 64, 8, 4, 172, 512, 512, tied_head=True),
        _preset("smollm2-135m", 30, 576, 9, 3, 1536, 49152, 8192, rope_theta=1e5, tied_head=True),
        _preset("qwen2.5-coder-0.5b", 24, 896, 14, 2, 4864, 151936, 32768, rope_theta=1e6, rms_eps=1e-6, qkv_bias=True),
        _preset("qwen2.5-coder-1.5b", 28, 1536, 12, 2, 8960, 151936, 32768, rope_theta=1e6, rms_eps=1e-6, qkv_bias=True),
        _preset("llama-2-7b", 32, 4096, 32, 32, 11008, 32000, 4096),
        _preset("llama-2-13b", 40, 5120, 40, 40, 13824, 32000, 4096),
        _preset("llama-2-70b", 80, 8192, 64, 8, 28672, 32000, 4096),
        _preset("llama-3-8b", 32, 4096, 32, 8, 14336, 128256, 8192, rope_theta=5e5),
        _preset("llama-3-70b", 80, 8192, 64, 8, 28672, 128256, 8192, rope_theta=5e5),
        _preset("llama-3.1-8b", 32, 4096, 32, 8, 14336, 128256, 131072, rope_theta=5e5, rope_scaling=RopeScaling()),
        _preset("llama-3.1-70b", 80, 8192, 64, 8, 28672, 128256, 131072, rope_theta=5e5, rope_scaling=RopeScaling()),
        _preset("llama-3.1-405b", 126, 16384, 128, 8, 53248, 128256, 131072, rope_theta=5e5, rope_scaling=RopeScaling()),
        _preset("mistral-7b", 32, 4096, 32, 8, 14336, 32768, 32768, rope_theta=1e6),
        _preset("mixtral-8x7b", 32, 4096, 32, 8, 14336, 32000, 32768, rope_theta=1e6, num_experts=8, num_experts_per_token=2),
        _preset("mixtral-8x22b", 56, 6144, 48, 8, 16384, 32000, 65536, rope_theta=1e6, num_experts=8, num_experts_per_token=2),
        _preset("qwen2-72b", 80, 8192, 64, 8, 29568, 152064, 32768, rope_theta=1e6, rms_eps=1e-6, qkv_bias=True),
        _preset("qwen3-0.6b", 28, 1024, 16, 8, 3072, 151936, 40960, rope_theta=1e6, rms_eps=1e-6, head_dim=128, qk_norm=True, tied_head=True),
        _preset("qwen3-30b-a3b", 48, 2048, 32, 4, 768, 151936, 40960, rope_theta=1e6, rms_eps=1e-6, head_dim=128, qk_norm=True, num_experts=128, num_experts_per_token=8),
        _preset("deepseek-67b", 95, 8192, 64, 8, 22016, 102400, 4096, rms_eps=1e-6),
    )
}  # fmt: skip
