"""What should the model compute?  A whole sequence at once, in float64 numpy, straight from the papers' formulas."""

import numpy as np

from nanojax.config import ModelConfig


def logits(config: ModelConfig, params: dict, tokens) -> np.ndarray:
    """[n V]: logits after each of the `n` tokens."""
    get = lambda *path: np.asarray(_walk(params, path), np.float64)  # noqa: E731
    x = get("embed", "table")[np.asarray(tokens)]
    for i in range(config.num_layers):
        here = ("layers", i)
        y = _norm(x, get(*here, "attn_norm", "scale"), config.rms_eps)
        qkv = np.einsum("nd,dkgh->nkgh", y, get(*here, "qkv", "kernel"))
        if config.qkv_bias:
            qkv = qkv + get(*here, "qkv", "bias")
        q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
        if config.qk_norm:
            q = _norm(q, get(*here, "q_norm", "scale"), config.rms_eps)
            k = _norm(k, get(*here, "k_norm", "scale"), config.rms_eps)
        q, k = _rope(config, q), _rope(config, k)
        scores = np.einsum("nkgh,mkh->kgnm", q, k) / np.sqrt(config.head_dim)
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("kgnm,mkh,kghd->nd", weights, v, get(*here, "out", "kernel"))
        y = _norm(x, get(*here, "ffn_norm", "scale"), config.rms_eps)
        ffn = lambda name, here=here: get(*here, "ffn", name)  # noqa: E731
        x = x + (_moe(config, y, ffn) if config.num_experts else _swiglu(y, ffn("gate_up"), ffn("down")))
    head = "embed" if config.tied_head else "head"
    return _norm(x, get("final_norm", "scale"), config.rms_eps) @ get(head, "table").T


def _walk(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def _norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def _swiglu(y, gate_up, down):
    gate, up = y @ gate_up[:, 0], y @ gate_up[:, 1]
    return (gate / (1 + np.exp(-gate)) * up) @ down


def _moe(config, y, ffn):
    out = np.zeros_like(y)
    scores = y @ ffn("router")
    for n in range(len(y)):
        best = np.argsort(-scores[n])[: config.num_experts_per_token]
        weights = np.exp(scores[n, best] - scores[n, best].max())
        for weight, expert in zip(weights / weights.sum(), best, strict=True):
            out[n] += weight * _swiglu(y[n], ffn("gate_up")[expert], ffn("down")[expert])
    return out


def _rope(config, x):
    n, half = len(x), config.head_dim // 2
    frequency = config.rope_theta ** (-np.arange(half) / half)
    if (scaling := config.rope_scaling) is not None:
        wavelength = 2 * np.pi / frequency
        smooth = (scaling.original_max_len / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        blended = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        low, high = (
            scaling.original_max_len / scaling.low_freq_factor,
            scaling.original_max_len / scaling.high_freq_factor,
        )
        frequency = np.where(
            wavelength > low, frequency / scaling.factor, np.where(wavelength < high, frequency, blended)
        )
    angle = (np.arange(n)[:, None] * frequency).reshape(n, *[1] * (x.ndim - 2), half)
    x1, x2 = x[..., :half], x[..., half:]
    return np.concatenate([x1 * np.cos(angle) - x2 * np.sin(angle), x2 * np.cos(angle) + x1 * np.sin(angle)], -1)
