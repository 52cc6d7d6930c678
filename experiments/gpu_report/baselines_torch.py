"""How fast are PyTorch's matmul, its attention kernels and transformers' continuous batching on the same device?

Same shapes as the report's own jobs.  Everything of torch is in this file, and runs in a process without JAX arrays: two
frameworks that each want all memory do not share a card well.
"""

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.gpu_report.cases import Case, Row, Setting
from experiments.gpu_report.jobs import decode_specs, prefill_specs, products
from experiments.gpu_report.peaks import limits
from experiments.gpu_report.timing import MAX_LAUNCHES
from nanojax.config import PRESETS

REPEAT_S = 0.01


def cases(setting: Setting) -> list[Case]:
    """Products, prefill, decode, then the serving loop; one case that says so where there is no torch."""
    if importlib.util.find_spec("torch") is None:
        return [Case("torch", lambda: [{"program": "torch", "error": "torch is not installed"}])]
    small = setting.is_smoke
    found = [
        Case(f"torch {p.name}-{p.num_tokens}", lambda p=p: [_product(p, setting)])
        for p in products(small, (512, 1024, 2048))
    ]
    for spec in prefill_specs(small)[:2]:
        rows, length = len(spec.q_lens), spec.q_lens[0]
        shape = (rows, length, length, spec.num_heads, spec.num_kv_heads, spec.head_dim)
        found.append(Case(f"torch SDPA prefill-{rows}x{length}", lambda shape=shape: _attention(shape, True, setting)))
    for spec in decode_specs(small):
        length = round(sum(spec.kv_lens) / len(spec.kv_lens))
        shape = (len(spec.kv_lens), 1, length, spec.num_heads, spec.num_kv_heads, spec.head_dim)
        found.append(Case(f"torch {spec.name}", lambda shape=shape: _attention(shape, False, setting), limit_s=120))
    if importlib.util.find_spec("transformers") is not None:
        needs_s = 0.0 if small else 20.0
        found.append(Case("transformers continuous batching", lambda: [_transformers(setting)], needs_s, limit_s=120))
    return found


def _product(product: Any, setting: Setting) -> Row:
    torch, device = _torch()
    x = torch.randn(product.num_tokens, product.width, dtype=torch.bfloat16, device=device)
    weights = [torch.randn(product.width, product.num_columns, dtype=torch.bfloat16, device=device) for _ in range(4)]
    row = _timed(lambda: [torch.matmul(x, w) for w in weights], len(weights), setting)
    return {
        **product.columns,
        "program": "torch.matmul",
        **row,
        **_rates(product.flops, product.num_bytes, row, setting),
    }


def _attention(shape: tuple[int, ...], is_causal: bool, setting: Setting) -> list[Row]:
    """SDPA, and FlexAttention on a GPU; every row of a batch has the mean context."""
    torch, device = _torch()
    rows, q_len, kv_len, num_heads, num_kv_heads, head_dim = shape

    def random(length: int, heads: int) -> Any:
        return torch.randn(rows, heads, length, head_dim, dtype=torch.bfloat16, device=device)

    q = random(q_len, num_heads)
    layers = [(random(kv_len, num_kv_heads), random(kv_len, num_kv_heads)) for _ in range(4)]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    runs = {"torch SDPA": lambda: [sdpa(q, k, v, is_causal=is_causal, enable_gqa=True) for k, v in layers]}
    if device == "cuda":
        runs["torch FlexAttention"] = _flex(torch, q, layers, is_causal)
    pairs = rows * (q_len * (q_len + 1) // 2 if is_causal else q_len * kv_len)
    flops = 4.0 * pairs * num_heads * head_dim
    num_bytes = 2.0 * rows * head_dim * (2 * q_len * num_heads + 2 * kv_len * num_kv_heads)
    found = []
    for name, run in runs.items():
        columns = {"job": f"{'prefill' if is_causal else 'decode'}-{rows}x{kv_len}", "program": name}
        try:
            row = _timed(run, len(layers), setting)
            found.append({**columns, **row, **_rates(flops, num_bytes, row, setting)})
        except Exception as error:  # FlexAttention needs a compiler at run time, which may be missing
            found.append({**columns, "error": f"{type(error).__name__}: {error}"[:300]})
    return found


def _flex(torch: Any, q: Any, layers: list, is_causal: bool) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # pyright: ignore[reportMissingImports]

    compiled = torch.compile(flex_attention)
    mask = None
    if is_causal:
        size = q.shape[2]
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, size, size, device="cuda")
    return lambda: [compiled(q, k, v, block_mask=mask, enable_gqa=True) for k, v in layers]


def _transformers(setting: Setting) -> Row:
    """Tokens per second of transformers' own serving loop on a LLaMA-3-8B of random weights; requests of 512/512, all at once."""
    torch, device = _torch()
    import transformers  # pyright: ignore[reportMissingImports]

    model = PRESETS["llama-3-8b"]
    layers = 1 if setting.is_smoke else model.num_layers
    width, heads, kv_heads, hidden, vocab = (
        (64, 4, 2, 128, 257)
        if setting.is_smoke
        else (model.d_model, model.num_heads, model.num_kv_heads, model.d_ff, model.vocab_size)
    )
    num_requests, input_len, output_len = (2, 8, 4) if setting.is_smoke else (256, 512, 128)
    more: dict[str, Any] = {
        "dtype": torch.bfloat16,
        "attn_implementation": "paged|sdpa" if device == "cuda" else "sdpa",
    }
    config = transformers.LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=hidden, vocab_size=vocab, max_position_embeddings=2048, **more,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        llama = transformers.LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    rng = np.random.default_rng(setting.seed)
    prompts = rng.integers(1, vocab, (num_requests, input_len)).tolist()
    generation = transformers.GenerationConfig(
        max_new_tokens=output_len, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cuda_graph=False
    )
    pages: dict[str, Any] = {}
    if setting.is_smoke:  # else its pages fill the memory that is free
        settings = transformers.generation.configuration_utils.ContinuousBatchingConfig
        pages["continuous_batching_config"] = settings(num_blocks=8, max_batch_tokens=64)
    start_s = time.perf_counter()
    outputs = llama.generate_batch(inputs=prompts, generation_config=generation, **pages)
    taken_s = time.perf_counter() - start_s
    generated = sum(len(output.generated_tokens) for output in outputs.values())
    return {
        "job": f"{num_requests} requests of {input_len}/{output_len}", "program": f"transformers {transformers.__version__}",
        "total_tokens_per_s": (num_requests * input_len + generated) / taken_s, "num_output_tokens": generated,
        "duration_s": taken_s,
    }  # fmt: skip


def _timed(run: Callable[[], Any], num_inner: int, setting: Setting) -> Row:
    """As `timing.time_one`, in torch."""
    torch, device = _torch()

    def seconds(num_launches: int) -> float:
        start_s = time.perf_counter()
        for _ in range(num_launches):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start_s) / num_launches

    with torch.inference_mode():
        seconds(2)
        launches = int(np.clip(round(REPEAT_S / seconds(1)), 1, MAX_LAUNCHES))
        times = [seconds(launches) / num_inner for _ in range(setting.num_repeats)]
    return {"median_s": float(np.median(times)), "low_s": min(times), "high_s": max(times), "num_repeats": len(times)}


def _rates(flops: float, num_bytes: float, row: Row, setting: Setting) -> Row:
    bounds, seconds = limits(setting), row["median_s"]
    roofline_s = bounds.seconds(flops, num_bytes)
    return {
        "roofline_s": roofline_s, "flops_per_s": flops / seconds, "bytes_per_s": num_bytes / seconds,
        "roofline_fraction": roofline_s / seconds,
    }  # fmt: skip


def _torch() -> tuple[Any, str]:
    import torch  # pyright: ignore[reportMissingImports]

    return torch, "cuda" if torch.cuda.is_available() else "cpu"
