"""How long did operations take for the NanoFlow authors?  Their Table 2, and the timings that they released, as profiles.

What the paper wants to predict with them (its Figures 7, 8, 9, 11) is not used here.
"""

from collections.abc import Mapping

from nanojax.config import PRESETS, ModelConfig
from nanojax.hardware import PAPER_TABLE_1, HardwareSpec
from nanojax.pipeline.cost_model import BatchShape, OpCost, Roofline, op_cost
from nanojax.pipeline.ir import NanoBatch, OpKind
from nanojax.pipeline.profile import CalibratedProfile, OpProfile, ProfileTable

__all__ = ["TABLE_2_ROWS", "TABLE_2_SHAPE", "released_profile", "table2_cost", "table2_profile"]

TABLE_2_SHAPE = BatchShape(
    num_decode_tokens=1365, num_prefill_tokens=683, mean_context_len=1024.25, mean_prefill_context_len=511.5
)
"""The batch of Table 2 (2048 tokens).  Its lengths are not printed; those of prompts of 512 and outputs of 1024 tokens give
all printed digits: 2/3 of the tokens decode at a mean context of 512 + 1024 / 2, each prefill token meets all 512 of its
prompt (the causal half is not subtracted).  1365.33 rows x 1024 are written as 1365 x 1024.25, prefill likewise."""

TABLE_2_ROWS: dict[str, tuple[OpKind, ...]] = {
    "KQV": (OpKind.KQV,),
    "O": (OpKind.O,),
    "UG": (OpKind.UG,),
    "D": (OpKind.D,),
    "DecAttn": (OpKind.DEC_ATTN,),
    "PfAttn": (OpKind.PF_ATTN,),
    "Net": (OpKind.O_AR, OpKind.D_AR),
}
"""Table 2's rows.  The bytes of Net are the same in both forms of the collectives; its 18.8 GFLOP are two AllReduces'."""

TABLE_2_REAL_S: dict[str, float] = {
    "KQV": 16.08e-3, "O": 16.01e-3, "UG": 69.92e-3, "D": 34.96e-3, "DecAttn": 35.60e-3, "PfAttn": 4.56e-3, "Net": 47.92e-3,
}  # fmt: skip
"""arXiv 2408.12757v2, Table 2, "real" time of 80 layers of LLaMA-2-70B on 8 A100-80GB."""

_TABLE_2_MODEL, _TABLE_2_DEVICES = PRESETS["llama-2-70b"], 8


def table2_cost(row: str) -> OpCost:
    """A row of Table 2: all layers, all devices."""
    whole = NanoBatch(0, TABLE_2_SHAPE.num_tokens)
    cost = OpCost()
    for kind in TABLE_2_ROWS[row]:
        cost += op_cost(_TABLE_2_MODEL, kind, whole, TABLE_2_SHAPE, num_devices=_TABLE_2_DEVICES)
    return cost * _TABLE_2_MODEL.num_layers


def table2_profile(
    model: ModelConfig = _TABLE_2_MODEL,
    hardware: HardwareSpec = PAPER_TABLE_1["a100-80"],
    num_devices: int = _TABLE_2_DEVICES,
) -> CalibratedProfile:
    """Any model on any hardware, each operation with the efficiency that it had in Table 2: estimated / real time.

    Prefill attention took 12 times its estimate, which the paper (section 3.4) puts down to launching: the difference is
    kept as a time per layer and launch.  Collectives share Net's efficiency; a router, which Table 2 lacks, has KQV's.
    """
    reference = Roofline(PAPER_TABLE_1["a100-80"], _TABLE_2_DEVICES)
    estimated_s = {row: max(reference.bounds_s(table2_cost(row))) for row in TABLE_2_ROWS}
    efficiency = {
        kind: estimated_s[row] / TABLE_2_REAL_S[row]
        for row, kinds in TABLE_2_ROWS.items()
        if row != "PfAttn"
        for kind in kinds
    }
    efficiency |= {OpKind.ATTN_AG: efficiency[OpKind.O_AR], OpKind.O_AG: efficiency[OpKind.O_AR]}
    efficiency[OpKind.ROUTER] = efficiency[OpKind.KQV]
    launch_s = (TABLE_2_REAL_S["PfAttn"] - estimated_s["PfAttn"]) / _TABLE_2_MODEL.num_layers
    return CalibratedProfile(model, Roofline(hardware, num_devices, efficiency, {OpKind.PF_ATTN: launch_s}))


# github efeslab/Nanoflow, autosearch/search-70.ipynb (Gurobi 12): durations in its Stage-I solution, LLaMA-2-70B on 8
# A100-80GB, ms per layer by tokens.  KQV takes 2.5 times as long here as in Table 2.
_STAGE_1_MS: Mapping[OpKind, Mapping[int, float]] = {
    OpKind.KQV: {256: 0.086, 384: 0.1, 640: 0.155, 768: 0.162},
    OpKind.O: {640: 0.058, 1408: 0.104},
    OpKind.UG: {640: 0.287, 1408: 0.587},
    OpKind.D: {640: 0.138, 1408: 0.313},
    OpKind.PF_ATTN: {768: 0.038},
}

# autosearch/trace/gemv_70B.csv, commit d1bbe27: decode attention with one KV head per device; ms for 128, 256, ... 2048
# rows, by tokens of context.
_DECODE_ATTENTION_MS: Mapping[int, tuple[float, ...]] = {
    512: (
        0.052758, 0.074515, 0.096271, 0.118028, 0.140859, 0.163691, 0.186522, 0.209354, 0.229118, 0.248883, 0.268647,
        0.288412, 0.308177, 0.327941, 0.347706, 0.36747,
    ),
    1024: (
        0.075205, 0.115572, 0.155939, 0.196306, 0.237595, 0.278884, 0.320174, 0.361463, 0.402106, 0.442749, 0.483392,
        0.524035, 0.564678, 0.605321, 0.645964, 0.686606,
    ),
    2048: (
        0.116032, 0.193758, 0.271483, 0.349209, 0.427965, 0.506721, 0.585477, 0.664233, 0.747308, 0.830383, 0.913458,
        0.996533, 1.079608, 1.162683, 1.245758, 1.328833,
    ),
}  # fmt: skip

# autosearch/trace/networkData, commit d1bbe27: collectives on 8 A100, microseconds for 8, 9, ... 32 MiB; an AllReduce is
# modelled there as a reduce-scatter (32 thread blocks) and an AllGather (8 thread blocks).
_ALL_GATHER_US = (
    67.52, 73.73, 81.47, 86.63, 93.04, 99.43, 105.76, 114.61, 118.91, 125.34, 131.87, 137.79, 147.13, 151.0, 157.1, 163.72,
    169.92, 179.28, 182.7, 189.36, 195.52, 201.79, 211.23, 214.26, 220.65,
)  # fmt: skip
_REDUCE_SCATTER_US = (
    59.39, 67.01, 68.67, 71.29, 75.59, 84.44, 86.41, 89.15, 93.25, 101.44, 103.65, 106.72, 110.35, 118.52, 120.87, 123.97,
    127.69, 136.64, 138.24, 141.39, 145.33, 153.93, 156.04, 158.9, 162.49,
)  # fmt: skip
_TOKENS_PER_MIB = 2**20 // (8192 * 2)


def released_profile() -> ProfileTable:
    """LLaMA-2-70B on 8 A100-80GB as its authors timed it for their search (their repository, not the paper).

    Dense operations have two to four points each, so times of more tokens than those (KQV: 768) are extrapolated.
    """
    ops = {
        kind: OpProfile(tuple(points), (tuple(ms * 1e-3 for ms in points.values()),))
        for kind, points in _STAGE_1_MS.items()
    }
    ops[OpKind.DEC_ATTN] = OpProfile(
        num_tokens=tuple(range(128, 2049, 128)),
        seconds=tuple(tuple(ms * 1e-3 for ms in row) for row in _DECODE_ATTENTION_MS.values()),
        context_lens=tuple(_DECODE_ATTENTION_MS),
    )
    tokens = tuple(range(8 * _TOKENS_PER_MIB, 32 * _TOKENS_PER_MIB + 1, _TOKENS_PER_MIB))
    gather_s = tuple(us * 1e-6 for us in _ALL_GATHER_US)
    reduce_s = tuple((a + b) * 1e-6 for a, b in zip(_ALL_GATHER_US, _REDUCE_SCATTER_US, strict=True))
    ops |= dict.fromkeys((OpKind.ATTN_AG, OpKind.O_AG), OpProfile(tokens, (gather_s,)))
    ops |= dict.fromkeys((OpKind.O_AR, OpKind.D_AR), OpProfile(tokens, (reduce_s,)))
    return ProfileTable(
        model="llama-2-70b",
        device="a100-80",
        num_devices=8,
        origin="published",
        source="github efeslab/Nanoflow, autosearch/search-70.ipynb and autosearch/trace, commit d1bbe27",
        ops=ops,
    )
