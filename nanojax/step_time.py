"""How long does a step take?  What a step is made of -> seconds, as small pure functions that run inside a compiled loop.

A `StepTime` is a pytree that can be called (so its numbers are arguments of the compiled simulator, not constants, and a
`vmap` may range over them): `StepCoefficients` here, or `jax.tree_util.Partial(function, *arrays)` around any other model.
"""

import dataclasses
from collections.abc import Callable, Sequence

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int64
from scipy.optimize import nnls

from nanojax.array_types import Array, Float32, Int32
from nanojax.pipeline.cost_model import BatchShape, Duration
from nanojax.pipeline.ir import NanoBatch, OpKind


@flax.struct.dataclass
class StepWork:
    """What one step computes.  Contexts are sums over tokens of the cached tokens that each attends to, itself included."""

    rung: Int32[Array, "*n"]
    """Index into `token_budgets` of the budget that the step runs on, padding included."""
    num_decode_tokens: Float32[Array, "*n"]
    num_prefill_tokens: Float32[Array, "*n"]
    decode_context: Float32[Array, "*n"]
    prefill_context: Float32[Array, "*n"]
    num_sampled: Float32[Array, "*n"]
    """Rows that get a new token: rows of the LM head."""
    num_restored_tokens: Float32[Array, "*n"]
    """Tokens whose keys and values come back from the offload tier in this step."""


StepTime = Callable[[StepWork], Float32[Array, "*n"]]
"""Seconds of a step; a pytree (see above)."""

FEATURES = (
    "num_decode_tokens", "num_prefill_tokens", "decode_context", "prefill_context", "num_sampled", "num_restored_tokens",
)  # fmt: skip


@flax.struct.dataclass
class StepCoefficients:
    """A linear step time, with its own numbers for each of the `B` rungs of the budget ladder (seconds, seconds per unit)."""

    constant_s: Float32[Array, "*n B"]
    per_unit_s: Float32[Array, "*n B 6"]
    """By `FEATURES`."""
    slowdown: Float32[Array, "*n"]
    """Factor on everything: what traffic beside the step costs (KV offload); 1 for none."""

    def __call__(self, work: StepWork) -> Float32[Array, "*n"]:
        """Seconds of `work`."""
        amounts = jnp.stack([jnp.asarray(getattr(work, name), jnp.float32) for name in FEATURES], axis=-1)
        return self.slowdown * (self.constant_s[work.rung] + jnp.sum(self.per_unit_s[work.rung] * amounts, axis=-1))


def linear(
    constant_s: Sequence[float], *, slowdown: float = 1.0, **per_unit_s: Sequence[float] | float
) -> StepCoefficients:
    """Coefficients by name: `constant_s` of each rung, and for any of `FEATURES` one number or one per rung.

    Raises ValueError for a name that is no feature, a number that is negative, or a wrong count of rungs.
    """
    num_rungs = len(constant_s)
    if unknown := set(per_unit_s) - set(FEATURES):
        raise ValueError(f"{', '.join(sorted(unknown))}: a step has only {', '.join(FEATURES)}")
    columns = []
    for name in FEATURES:
        column = np.asarray(per_unit_s.get(name, 0.0), np.float64)
        if column.ndim and column.shape != (num_rungs,):
            raise ValueError(f"{name} has {column.size} numbers for {num_rungs} rungs")
        columns.append(np.broadcast_to(column, (num_rungs,)))
    table, constant = np.stack(columns, axis=1), np.asarray(constant_s, np.float64)
    if not (np.all(table >= 0) and np.all(constant >= 0) and slowdown > 0):
        raise ValueError(f"times must be >= 0 and slowdown > 0: {constant_s}, {per_unit_s}, slowdown={slowdown}")
    return StepCoefficients(
        constant_s=jnp.asarray(constant, jnp.float32),
        per_unit_s=jnp.asarray(table, jnp.float32),
        slowdown=jnp.float32(slowdown),
    )


def from_layer_times(
    layer_time_s: Sequence[float],
    num_layers: int,
    *,
    overhead_s: float = 0.0,
    head_s_per_row: float = 0.0,
    restore_s_per_token: float = 0.0,
    slowdown: float = 1.0,
) -> StepCoefficients:
    """An overlapped pipeline: rung `i` always takes `num_layers * layer_time_s[i]`, whatever part of the batch is filled.

    NanoFlow's kernels run on the whole dense batch, and attention hides behind them; `layer_time_s` is a steady-state layer
    time at the mix of decode and prefill that the pipeline was made for (`Timeline.layer_time_s`).
    overhead_s: per step, outside the layers.    head_s_per_row: LM head and sampling per new token.
    """
    return linear(
        [num_layers * layer_s + overhead_s for layer_s in layer_time_s], slowdown=slowdown,
        num_sampled=head_s_per_row, num_restored_tokens=restore_s_per_token,
    )  # fmt: skip


def from_durations(
    durations: Callable[[BatchShape], Duration],
    shapes: Sequence[BatchShape],
    kinds: Sequence[OpKind],
    num_layers: int,
    *,
    overhead_s: float = 0.0,
    head_s_per_row: float = 0.0,
    restore_s_per_token: float = 0.0,
    slowdown: float = 1.0,
) -> StepCoefficients:
    """Operations one after another, timed by a cost model: rung `i` has the budget `shapes[i].num_tokens`.

    kinds: a layer's operations, collectives in the form that is wanted (an operation that comes twice counts twice).
    Dense operations and collectives run on the whole budget, so they are constant.  Attention is a line in its context,
    through its times at `shapes[i]` and at half the context; it needs both decode and prefill tokens there.
    Raises ValueError where a shape has none of either.
    """
    constant_s, decode_s, prefill_s = [], [], []
    for shape in shapes:
        whole, duration = NanoBatch(0, shape.num_tokens), durations(shape)
        dense_s = sum(duration(kind, whole) for kind in kinds if kind not in _ATTENTION)
        decode_0_s, decode_1_s = _line(durations, shape, OpKind.DEC_ATTN, "num_decode_tokens", "mean_context_len")
        prefill_0_s, prefill_1_s = _line(
            durations, shape, OpKind.PF_ATTN, "num_prefill_tokens", "mean_prefill_context_len"
        )
        constant_s.append(overhead_s + num_layers * (dense_s + decode_0_s + prefill_0_s))
        decode_s.append(num_layers * decode_1_s)
        prefill_s.append(num_layers * prefill_1_s)
    return linear(
        constant_s, slowdown=slowdown, decode_context=decode_s, prefill_context=prefill_s,
        num_sampled=head_s_per_row, num_restored_tokens=restore_s_per_token,
    )  # fmt: skip


def ladder(rungs: Sequence[StepCoefficients]) -> StepCoefficients:
    """The step times of several budgets, each with one rung, as one.  Raises ValueError unless their slowdowns are equal."""
    if len({float(rung.slowdown) for rung in rungs}) != 1:
        raise ValueError(f"rungs differ in slowdown: {[float(rung.slowdown) for rung in rungs]}")
    return StepCoefficients(
        constant_s=jnp.concatenate([rung.constant_s for rung in rungs]),
        per_unit_s=jnp.concatenate([rung.per_unit_s for rung in rungs]),
        slowdown=rungs[0].slowdown,
    )


def fit(
    rung: Int64[np.ndarray, "n"],
    features: Float64[np.ndarray, "n 6"],
    seconds: Float64[np.ndarray, "n"],
    num_rungs: int,
) -> StepCoefficients:
    """Least squares on measured steps, each rung for itself, no coefficient below 0.

    features: by `FEATURES`, one row per step.  With a constant among the coefficients, the fitted seconds of a rung sum to the
    measured ones unless a bound of 0 binds.  Raises ValueError for a rung without steps.
    """
    constant_s, per_unit_s = [], []
    for i in range(num_rungs):
        rows = rung == i
        if not rows.any():
            raise ValueError(f"rung {i}: no step was measured on it")
        design = np.column_stack([np.ones(rows.sum()), features[rows]])
        scale = np.maximum(np.abs(design).max(axis=0), 1e-30)
        found = nnls(design / scale, seconds[rows])[0] / scale
        constant_s.append(found[0])
        per_unit_s.append(found[1:])
    return StepCoefficients(
        constant_s=jnp.asarray(constant_s, jnp.float32),
        per_unit_s=jnp.asarray(np.stack(per_unit_s), jnp.float32),
        slowdown=jnp.float32(1.0),
    )


_ATTENTION = frozenset({OpKind.DEC_ATTN, OpKind.PF_ATTN})


def _line(
    durations: Callable[[BatchShape], Duration], shape: BatchShape, kind: OpKind, count: str, context: str
) -> tuple[float, float]:
    """Seconds of one layer's attention without context, and per token of context (summed over the tokens that attend)."""
    if not (num_tokens := getattr(shape, count)) or not (context_len := getattr(shape, context)) >= 2:
        raise ValueError(f"{count}={num_tokens} must be >= 1 and {context} >= 2 to time {kind.value}: {shape}")
    whole = NanoBatch(0, shape.num_tokens)
    full_s = durations(shape)(kind, whole)
    half_s = durations(dataclasses.replace(shape, **{context: context_len / 2}))(kind, whole)
    per_context_s = max(full_s - half_s, 0.0) / (num_tokens * context_len / 2)
    return max(full_s - per_context_s * num_tokens * context_len, 0.0), per_context_s
