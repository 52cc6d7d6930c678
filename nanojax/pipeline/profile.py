"""How long did operations take?  Tables of measured times, interpolated over batch and context; JSON in and out."""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nanojax.config import ModelConfig
from nanojax.pipeline.cost_model import BatchShape, Duration, Roofline
from nanojax.pipeline.ir import NanoBatch, OpKind

__all__ = ["CalibratedProfile", "OpProfile", "ProfileTable"]

ORIGINS = ("measured", "published", "simulated")


@dataclasses.dataclass(frozen=True)
class OpProfile:
    """Times of one operation: `seconds[i][j]` with `num_tokens[j]` tokens at a context of `context_lens[i]` tokens.

    One row of `seconds` and no `context_lens` where the time does not depend on the context, or was not told.
    Raises ValueError unless counts ascend from 1 on, contexts ascend, and there is a positive time for each pair.
    """

    num_tokens: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    context_lens: tuple[int | float, ...] = ()

    def __post_init__(self) -> None:
        for name, points in (("num_tokens", self.num_tokens), ("context_lens", self.context_lens)):
            if any(not math.isfinite(x) or x <= 0 for x in points) or any(
                a >= b for a, b in itertools.pairwise(points)
            ):
                raise ValueError(f"{name}={points} must be positive and ascend")
        rows = max(len(self.context_lens), 1)
        if (
            not self.num_tokens
            or len(self.seconds) != rows
            or any(len(r) != len(self.num_tokens) for r in self.seconds)
        ):
            raise ValueError(
                f"seconds must have {rows} rows of {len(self.num_tokens)} times (at least 1), "
                f"got rows of {[len(row) for row in self.seconds]}"
            )
        if not all(math.isfinite(s) and s > 0 for row in self.seconds for s in row):
            raise ValueError(f"seconds={self.seconds} must be positive")

    def at(self, num_tokens: int | float, context_len: int | float | None = None) -> float:
        """Seconds with `num_tokens` tokens, linear between points; 0 s for 0 tokens.

        Below the first point the first segment goes on, but no token gets cheaper than there, nor the time longer; above
        the last one the last segment goes on, but not down; from a single point times are proportional.  The same holds
        over contexts; without `context_lens` they do not count.
        Raises ValueError when times depend on the context and `context_len` is None.
        """
        if num_tokens <= 0:
            return 0.0
        by_context = [_along(self.num_tokens, row, num_tokens) for row in self.seconds]
        if not self.context_lens:
            return by_context[0]
        if context_len is None:
            raise ValueError(f"times depend on the context (measured at {self.context_lens}), none was given")
        return _along(self.context_lens, by_context, context_len)


@dataclasses.dataclass(frozen=True)
class ProfileTable:
    """Times of a model's operations on some device, one layer, all devices of `num_devices` at work.

    ops: by operation.    extras: by name, once per step and not per layer, over rows (`logits`) or tokens.
    origin: measured, published (the source is named) or simulated.
    """

    model: str
    device: str
    num_devices: int
    origin: str
    source: str
    ops: Mapping[OpKind, OpProfile]
    extras: Mapping[str, OpProfile] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.origin not in ORIGINS:
            raise ValueError(f"origin={self.origin!r} must be one of {', '.join(ORIGINS)}")

    def durations(self, shape: BatchShape) -> Duration:
        """Times on ranges of a batch of `shape`.  Asked for an operation that is not in `ops`, raises ValueError."""
        contexts = {
            OpKind.DEC_ATTN: shape.mean_context_len,
            OpKind.PF_ATTN: shape.mean_prefill_context_len,
        }

        def duration(kind: OpKind, nano_batch: NanoBatch) -> float:
            if kind not in self.ops:
                known = ", ".join(op.value for op in self.ops)
                raise ValueError(f"the profile of {self.model} on {self.device} has no {kind.value}, only {known}")
            return self.ops[kind].at(shape.num_tokens_of(kind, nano_batch), contexts.get(kind))

        return duration

    def to_json(self) -> str:
        """Text that `from_json` reads."""
        fields = {name: getattr(self, name) for name in ("model", "device", "num_devices", "origin", "source")}
        ops = {kind.value: _to_plain(profile) for kind, profile in self.ops.items()}
        extras = {name: _to_plain(profile) for name, profile in self.extras.items()}
        return json.dumps(fields | {"ops": ops, "extras": extras}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "ProfileTable":
        """Reads what `to_json` wrote.  Raises ValueError naming what is wrong."""
        try:
            plain = json.loads(text)
            ops = {OpKind(name): _from_plain(entry) for name, entry in plain["ops"].items()}
            extras = {name: _from_plain(entry) for name, entry in plain.get("extras", {}).items()}
            return cls(
                model=str(plain["model"]), device=str(plain["device"]), num_devices=int(plain["num_devices"]),
                origin=plain["origin"], source=str(plain["source"]), ops=ops, extras=extras,
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no profile table: {type(error).__name__} {error}") from error


@dataclasses.dataclass(frozen=True)
class CalibratedProfile:
    """A roofline whose efficiencies were measured somewhere, applied to `model`."""

    model: ModelConfig
    roofline: Roofline
    bytes_per_value: int = 2

    def durations(self, shape: BatchShape) -> Duration:
        """Times on ranges of a batch of `shape`."""
        return self.roofline.durations(self.model, shape, bytes_per_value=self.bytes_per_value)


def _along(points: Sequence[int | float], values: Sequence[float], x: int | float) -> float:
    """Piecewise linear through (points, values), which ascend in points; beyond them as `OpProfile.at` says."""
    if len(points) == 1:
        return values[0] * x / points[0]
    right = next((i for i, point in enumerate(points) if i and x <= point), len(points) - 1)
    left = right - 1
    slope = (values[right] - values[left]) / (points[right] - points[left])
    line = values[left] + slope * (x - points[left])
    if x < points[0]:
        return min(max(line, values[0] * x / points[0]), values[0])
    return max(line, values[-1]) if x > points[-1] else line


def _to_plain(profile: OpProfile) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(profile).items() if value != ()}


def _from_plain(plain: Mapping[str, Any]) -> OpProfile:
    return OpProfile(
        tuple(int(n) for n in plain["num_tokens"]),
        tuple(tuple(float(s) for s in row) for row in plain["seconds"]),
        tuple(float(n) for n in plain.get("context_lens", ())),
    )
