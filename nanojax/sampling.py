"""Which token comes next?  Per-request temperature, top-k, top-p and seed; all rows at once, without sorting the vocabulary.

A request's seed and the token's position are all the randomness there is, so neighbours, batch shape and schedule cannot
change a sample.  A step that was compiled for greedy rows alone has no work for random ones; on a CPU the work is
skipped when every row is greedy.
"""

import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from nanojax.array_types import Array, Bool, Float, Float32, Int32, UInt32
from nanojax.config import SamplingParts
from nanojax.control import skip_unless


@flax.struct.dataclass
class SamplingState:
    """How each slot's next token is drawn.  `temperature` 0 is greedy, `top_k` 0 and `top_p` 1 are off."""

    temperature: Float32[Array, "S"]
    top_k: Int32[Array, "S"]
    top_p: Float32[Array, "S"]
    seed: UInt32[Array, "S"]
    stop_tokens: Int32[Array, "S B"]
    """Tokens that end the request; `NO_TOKEN` where there are fewer than `B`."""
    wants_logprob: Bool[Array, "S"]


NO_TOKEN = -1
"""Stands where no token is: in stop lists, and in a step's report for a slot that sampled nothing."""

ALL_PARTS = SamplingParts()

_BLOCK = 256


def init(num_slots: int, max_stop_tokens: int) -> SamplingState:
    """Greedy, no stop tokens."""
    return SamplingState(
        temperature=jnp.zeros((num_slots,), jnp.float32),
        top_k=jnp.zeros((num_slots,), jnp.int32),
        top_p=jnp.ones((num_slots,), jnp.float32),
        seed=jnp.zeros((num_slots,), jnp.uint32),
        stop_tokens=jnp.full((num_slots, max_stop_tokens), NO_TOKEN, jnp.int32),
        wants_logprob=jnp.zeros((num_slots,), bool),
    )


def sample(
    logits: Float[Array, "R V"],
    state: SamplingState,
    slots: Int32[Array, "R"],
    position: Int32[Array, "R"],
    parts: SamplingParts = ALL_PARTS,
) -> Int32[Array, "R"]:
    """The next token of each row: `position` is the place it will take in its request.

    The caller guarantees that no row asks for more than `parts`.
    """
    top, greedy = _first_max(logits)
    if not parts.random:
        return greedy
    temperature = state.temperature[slots]

    def draw() -> Int32[Array, "R"]:
        uniform = jax.vmap(_uniform)(state.seed[slots], position)
        scale = jnp.where(temperature > 0, temperature, 1.0)[:, None]
        weights = jnp.exp((logits - top[:, None]) / scale)
        if parts.top:
            weights = _keep_top(weights, state.top_k[slots], state.top_p[slots])
        return jnp.where(temperature > 0, categorical(weights, uniform), greedy)

    return skip_unless(jnp.any(temperature > 0), draw, lambda: greedy)


def logprob(logits: Float[Array, "R V"], tokens: Int32[Array, "R"], is_wanted: Bool[Array, "R"]) -> Float32[Array, "R"]:
    """Log-probability of `tokens` under the model itself (no temperature, no cuts); 0 where it is not wanted."""

    def compute() -> Float32[Array, "R"]:
        chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
        return jnp.where(is_wanted, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)

    return skip_unless(jnp.any(is_wanted), compute, lambda: jnp.zeros(tokens.shape, jnp.float32))


def categorical(weights: Float[Array, "R V"], uniform: Float32[Array, "R"]) -> Int32[Array, "R"]:
    """Draws from unnormalised weights by inverting their cumulative sum, first over blocks, then inside one block."""
    num_rows, vocab = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK))).reshape(num_rows, -1, _BLOCK)
    sums = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
    target = uniform * sums[:, -1]
    block = jnp.minimum(jnp.sum(sums <= target[:, None], axis=-1), sums.shape[1] - 1)
    before = jnp.where(block > 0, jnp.take_along_axis(sums, jnp.maximum(block - 1, 0)[:, None], axis=1)[:, 0], 0.0)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    reached = jnp.cumsum(inside, axis=-1) > (target - before)[:, None]
    # Rounding can leave the target just past the block's end: then its last token with any weight.
    last = _BLOCK - 1 - _first_index(inside[:, ::-1] > 0)
    offset = jnp.where(jnp.any(reached & (inside > 0), axis=-1), _first_index(reached & (inside > 0)), last)
    return (block * _BLOCK + offset).astype(jnp.int32)


def _keep_top(
    weights: Float[Array, "R V"], top_k: Int32[Array, "R"], top_p: Float32[Array, "R"]
) -> Float[Array, "R V"]:
    """Zeroes all but the `top_k` largest weights, then all but the fewest that hold `top_p` of the rest (ties stay in)."""

    def cut_k() -> Float[Array, "R V"]:
        count = jnp.where(top_k > 0, top_k, weights.shape[1]).astype(jnp.float32)
        bar = _threshold(lambda bar: jnp.sum(weights >= bar, axis=-1, dtype=jnp.float32) >= count, weights.shape[0])
        return jnp.where(weights >= bar[:, None], weights, 0.0)

    weights = skip_unless(jnp.any(top_k > 0), cut_k, lambda: weights)

    def cut_p() -> Float[Array, "R V"]:
        mass = jnp.where(top_p < 1, top_p, 2.0) * jnp.sum(weights, axis=-1)
        bar = _threshold(
            lambda bar: jnp.sum(jnp.where(weights >= bar, weights, 0.0), axis=-1) >= mass, weights.shape[0]
        )
        return jnp.where(weights >= bar[:, None], weights, 0.0)

    return skip_unless(jnp.any(top_p < 1), cut_p, lambda: weights)


def _threshold(is_enough: Callable[[Float32[Array, "R 1"]], Bool[Array, "R"]], num_rows: int) -> Float32[Array, "R"]:
    """Largest float32 in [0, 1] whose predicate holds, 0 if none: bisection on the bits, which order as floats do."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high + 1) // 2
        holds = is_enough(jax.lax.bitcast_convert_type(middle, jnp.float32)[:, None])
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle - 1)

    one = jnp.full((num_rows,), 0x3F800000, jnp.int32)
    low, _ = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(one), one))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _uniform(seed: UInt32[Array, ""], position: Int32[Array, ""]) -> Float32[Array, ""]:
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), position))


def _first_max(logits: Float[Array, "R V"]) -> tuple[Float[Array, "R"], Int32[Array, "R"]]:
    """Each row's maximum and its first place: in one pass over blocks of the vocabulary, then inside of one block."""
    num_rows, vocab = logits.shape
    blocks = logits.reshape(num_rows, -1, math.gcd(vocab, _BLOCK))
    tops = jax.lax.optimization_barrier(jnp.max(blocks, axis=-1))  # else XLA reads all logits again for `top`
    top = jnp.max(tops, axis=-1)
    block = _first_index(tops == top[:, None])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return top, block * blocks.shape[2] + _first_index(inside == top[:, None])


def _first_index(mask: Bool[Array, "R V"]) -> Int32[Array, "R"]:
    """Index of the first True of each row: a plain minimum, which vectorises better than argmax."""
    index = jnp.arange(mask.shape[1], dtype=jnp.int32)
    return jnp.minimum(jnp.min(jnp.where(mask, index, mask.shape[1]), axis=-1), mask.shape[1] - 1)
