"""How fast are matmul and decode attention on a share of the multiprocessors, each alone?

Both kernels are persistent: their grid is the number of CTAs, one per multiprocessor.  `search_card` makes R -> P curves
(paper, Table 3 and Figure 5) of it.
"""

import jax.numpy as jnp

from experiments.gpu_report import forms
from experiments.gpu_report.cases import Case, Row, Setting
from experiments.gpu_report.jobs import Product, attention_args, attention_columns, decode_specs, num_inner, products
from experiments.gpu_report.programs import Comparison, timing_case
from nanojax import hardware
from pallas_kernels.paged_attention.arg_specs import ArgSpec

NUM_TOKENS = 1024
SHARES = (0.2, 0.3, 0.4, 0.5, 1.0)


def cases(setting: Setting) -> list[Case]:
    """A case per product and per batch of decode rows, all counts in turn."""
    num_cores = hardware.detect().num_cores
    return [timing_case(one, setting) for one in comparisons(setting.is_smoke, max(num_cores, 4))]


def counts(num_cores: int) -> list[int]:
    """CTAs at each share of `SHARES`, and what is left beside them."""
    chosen = {max(1, round(share * num_cores)) for share in SHARES}
    return sorted(chosen | {num_cores - n for n in chosen if n < num_cores})


def comparisons(is_smoke: bool, num_cores: int) -> list[Comparison]:
    """Everything that is timed on a device with `num_cores` multiprocessors."""
    wanted = [p for p in products(is_smoke, (NUM_TOKENS,)) if p.name == "UG"]
    return [
        *(_product(p, is_smoke, num_cores) for p in wanted),
        *(_decode(spec, is_smoke, num_cores) for spec in decode_specs(is_smoke)[-1:]),
    ]


def _product(product: Product, is_smoke: bool, num_cores: int) -> Comparison:
    inner = num_inner(is_smoke)
    programs = {"xla": forms.each(forms.xla_dot)}
    columns: dict[str, Row] = {"xla": {"implementation": "xla"}}
    for name, make in forms.capped_matmuls(is_smoke).items():
        for n in counts(num_cores):
            programs[f"{name} {n}"] = forms.each(make(n))
            columns[f"{name} {n}"] = {"implementation": name, "num_ctas": n}
    return Comparison(
        f"{product.name}-{product.num_tokens}", lambda: product.args(num_weights=inner), programs, flops=product.flops, num_bytes=product.num_bytes,
        num_inner=inner, columns=product.columns | {"kind": "matmul"}, program_columns=columns,
    )  # fmt: skip


def _decode(spec: ArgSpec, is_smoke: bool, num_cores: int) -> Comparison:
    inner, programs, columns = num_inner(is_smoke), {}, {}
    for name, make in forms.capped_attention(is_smoke).items():
        for n in counts(num_cores):
            programs[f"{name} {n}"] = forms.in_layers(make(n), inner)
            columns[f"{name} {n}"] = {"implementation": name, "num_ctas": n}
    return Comparison(
        spec.name, lambda: attention_args(spec, num_layers=inner), programs, flops=spec.flops(), num_bytes=spec.kv_bytes(jnp.bfloat16),
        num_inner=inner, columns=attention_columns(spec) | {"kind": "attention"}, program_columns=columns,
    )  # fmt: skip
