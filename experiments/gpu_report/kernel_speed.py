"""How fast is every kernel at real shapes, on the whole device?  Implementations in turn, each job beside its roofline."""

import jax.numpy as jnp

from experiments.gpu_report import forms
from experiments.gpu_report.cases import Case, Setting
from experiments.gpu_report.jobs import (
    Product,
    attention_args,
    attention_columns,
    decode_specs,
    mixed_specs,
    num_inner,
    prefill_specs,
    products,
)
from experiments.gpu_report.programs import Comparison, timing_case
from pallas_kernels.paged_attention.arg_specs import ArgSpec


def cases(setting: Setting) -> list[Case]:
    """A case per job."""
    return [timing_case(one, setting) for one in comparisons(setting.is_smoke)]


def comparisons(is_smoke: bool) -> list[Comparison]:
    """Attention in decode, prefill and mixed batches; the dense operations at three sizes."""
    specs = mixed_specs(True) if is_smoke else [*decode_specs(False), *prefill_specs(False), *mixed_specs(False)]
    found = [_attention(spec, is_smoke) for spec in specs]
    return found + [_product(product, is_smoke) for product in products(is_smoke, (512, 1024, 2048))]


def _attention(spec: ArgSpec, is_smoke: bool) -> Comparison:
    inner = num_inner(is_smoke)
    return Comparison(
        spec.name, lambda: attention_args(spec, num_layers=inner),
        {name: forms.attention_in_layers(name, inner) for name in forms.attention_names(is_smoke)},
        flops=spec.flops(), num_bytes=spec.kv_bytes(jnp.bfloat16), num_inner=inner,
        columns=attention_columns(spec) | {"kind": "attention"},
    )  # fmt: skip


def _product(product: Product, is_smoke: bool) -> Comparison:
    inner = num_inner(is_smoke)
    programs = {"xla": forms.xla_dot, **forms.matmuls(is_smoke)}
    return Comparison(
        f"{product.name}-{product.num_tokens}", lambda: product.args(num_weights=inner),
        {name: forms.each(call) for name, call in programs.items()}, flops=product.flops, num_bytes=product.num_bytes,
        num_inner=inner, columns=product.columns | {"kind": "matmul"},
    )  # fmt: skip
