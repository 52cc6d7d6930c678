"""How fast are this card's matrix product and memory?  Measured first: what all other parts are compared with."""

import dataclasses
import json
import subprocess

import jax
import jax.numpy as jnp

from experiments.gpu_report.cases import Case, Row, Setting
from experiments.gpu_report.timing import time_one
from nanojax import hardware

SIZES, SMOKE_SIZES = (4096, 8192), (128,)
COPY_BYTES, SMOKE_COPY_BYTES = 1 << 30, 1 << 20


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the card can do at most.    source: measured by `peaks`, or published where that did not run."""

    flops_per_s: float
    bytes_per_s: float
    source: str

    def seconds(self, flops: float, num_bytes: float) -> float:
        """The roofline: the longer of computing and moving."""
        return max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)


def cases(setting: Setting) -> list[Case]:
    """Matrix products, copies, reads, and what the driver says about the card."""
    sizes = SMOKE_SIZES if setting.is_smoke else SIZES
    num_bytes = SMOKE_COPY_BYTES if setting.is_smoke else COPY_BYTES
    products = [
        Case(f"matmul {n} {out}", lambda n=n, out=out: [_matmul(n, out, setting)])
        for n in sizes
        for out in ("bfloat16", "float32")
    ]
    return [
        *products,
        Case("copy", lambda: [_copy(num_bytes, setting)]),
        Case("read", lambda: [_read(num_bytes, setting)]),
        Case("card", _card),
    ]


def limits(setting: Setting) -> Limits:
    """From the record of this part; else the published numbers of the card; else 1 of each, so that ratios mean nothing."""
    path = setting.out / "peaks.json"
    if path.exists():
        rows = json.loads(path.read_text(encoding="utf-8"))["series"]["rows"]
        best = {
            what: max((rate for kind, rate in zip(rows["what"], rows["rate_per_s"], strict=True) if kind == what), default=0)
            for what in ("matmul", "copy", "read")
        }  # fmt: skip
        memory = max(best["copy"], best["read"])
        if best["matmul"] and memory:
            return Limits(best["matmul"], memory, "measured")
    spec = hardware.detect().spec
    return Limits(spec.peak_flops, spec.memory_bytes_per_s, "published") if spec else Limits(1.0, 1.0, "unknown")


def _matmul(size: int, out_dtype: str, setting: Setting) -> Row:
    a, b = (
        jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(setting.seed))
    )
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.dtype(out_dtype)))
    timing = time_one(lambda: product(a, b), num_repeats=setting.num_repeats)
    rate = 2.0 * size**3 / timing.median_s
    return {"what": "matmul", "size": size, "out_dtype": out_dtype, "rate_per_s": rate, **timing.row()}


def _copy(num_bytes: int, setting: Setting) -> Row:
    rate = hardware.measure_copy_bandwidth(num_bytes=num_bytes, num_repeats=setting.num_repeats)
    what = {"what": "copy", "size": num_bytes, "rate_per_s": rate.median}
    return {**what, "low_per_s": rate.low, "high_per_s": rate.high, "num_repeats": rate.num_repeats}


def _read(num_bytes: int, setting: Setting) -> Row:
    """Bytes read of a sum over an array: what a kernel reaches that writes next to nothing, as decode attention does."""
    array = jnp.ones((num_bytes // 4096, 1024), jnp.float32)
    total = jax.jit(lambda x: jnp.sum(x, axis=1))
    timing = time_one(lambda: total(array), num_repeats=setting.num_repeats)
    return {"what": "read", "size": array.nbytes, "rate_per_s": array.nbytes / timing.median_s, **timing.row()}


def _card() -> list[Row]:
    """What nvidia-smi tells, where there is one."""
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,memory.used"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return [{"what": "card", "note": f"nvidia-smi: {type(error).__name__}"}]
    return [
        {"what": "card", "field": field, "note": value.strip()}
        for field, value in zip(fields.split(","), text.split(","), strict=False)
    ]
