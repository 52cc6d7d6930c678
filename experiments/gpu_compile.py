"""What do the kernels and whole steps become on an H200 and an A100 that are not there, and how fast could they be?

Table: registers, shared memory and CTAs of every kernel at its real shapes, with the floor that its bytes and FLOPs set;
  copies of the KV cache, merged matmuls, overlap, CUDA graphs and memory of a whole step.
Claim: no kernel spills and each has room for the CTAs that it was designed for; a step of LLaMA-3-8B (all 32 layers) updates
  the KV cache in place, keeps its nano-batches apart, overlaps >= 90 % of the pairs that the pipeline puts side by side, is one
  CUDA graph and fits an H200 beside 100 GB of KV cache; on 8 GPUs the collectives of LLaMA-3-70B run beside matmuls and attention.
Command: python -m experiments.gpu_compile --target=h200 [--parts=kernels,step,tensor_parallel] (JAX_PLATFORMS=cpu, in the
  environment that `make test-gpu-compile` makes)
Hardware: none.    Minutes: kernels 7, a step 3 to 7 for each dense batch, tensor parallelism 4, on 2 cores.
Expected: 0 spills; at dense batch 1024 and 2048 566 of 566 pairs and 444 of 447 regions overlapped (the last layer's O, UG and D
  have no partner), 0 copies, 0 merged, 1 graph, 116.8 GB (66.8 on an A100 with 50 GB of KV); of 70B's 481 collectives 478 beside
  matmuls, 80 of them beside attention, too, all on a stream of their own; 1,038 of its 1,198 pairs.

    out/gpu_compile-kernels-h200.json           series `kernels`, `rooflines`
    out/gpu_compile-step-h200.json              series `steps`: a row per dense batch; `operations`
    out/gpu_compile-tensor_parallel-h200.json   the same for 8 GPUs
"""

import collections
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from experiments import comparison, compiled_code, figure_flags, gpu_kernels, gpu_steps, scheduled_hlo
from experiments.gpu_steps import Step
from experiments.record import make_record, write_record
from experiments.serving_flags import OVERLAP
from nanojax import hardware
from nanojax.config import PRESETS
from nanojax.pipeline import library

NAME = "gpu_compile"
PARTS = ("kernels", "step", "tensor_parallel")
MATMULS, ATTENTION = ("KQV", "O", "UG", "D"), ("DecAttn", "PfAttn", "DecAttn+PfAttn")
NUM_DEVICES = 8
KV_BYTES = {
    ("step", "h200"): 100e9,
    ("step", "a100"): 50e9,
    ("tensor_parallel", "h200"): 90e9,
    ("tensor_parallel", "a100"): 40e9,
}
"""Of one device with all layers.  With 100 GB beside 70B's shards, 120.8 GB of arguments, XLA complained that they exceed
`SCHEDULED_FRACTION` of an H200 and scheduled all 80 layers without any overlap; with 90 GB it did not."""
SCHEDULED_FRACTION = 0.8  # of the memory that the driver reports
SMOKE_KERNELS = ("paged_attention/triton/8b-decode-64x2k",)
Table = dict[str, list[Any]]


def define_flags(values: flags.FlagValues) -> None:
    figure_flags.define(values)
    flags.DEFINE_enum("target", "h200", [*compiled_code.TARGETS], "GPU to compile for.", flag_values=values)
    flags.DEFINE_list("parts", list(PARTS), f"Some of {', '.join(PARTS)}.", flag_values=values)
    flags.DEFINE_list("dense_batches", ["1024", "2048"], "Of the steps, in tokens.", flag_values=values)
    flags.DEFINE_string("pipeline", "llama_8b", "Of the step on one GPU.", flag_values=values)
    flags.DEFINE_enum("overlap", OVERLAP[0], OVERLAP, "How that step divides the GPU.", flag_values=values)
    flags.DEFINE_integer("num_layers", 0, "Of the steps' models; 0 for all.", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("num_processes", 2, "Kernels compiled at a time.", lower_bound=1, flag_values=values)


def run(values: flags.FlagValues) -> dict[str, dict[str, Any]]:
    """Compiles, prints and writes a record for each part; gives the records by part.  Raises ValueError for bad flags."""
    parts = ("kernels",) if values.smoke else tuple(values.parts)
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"--parts={part} is none of {', '.join(PARTS)}")
    reason = compiled_code.why_not()
    if reason is not None:
        sys.exit(f"error: this process cannot compile for a GPU: it {reason}")
    gpu = compiled_code.target(values.target)
    records = {}
    for part in parts:
        start_s = time.monotonic()
        records[part] = _kernels(gpu, values) if part == "kernels" else _steps(gpu, part, values)
        path = pathlib.Path(values.out) / f"{NAME}-{part}-{gpu.name}.json"
        write_record(records[part], path)
        for name, table in records[part]["series"].items():
            print(f"\n{part}, {name} (compiled for {gpu.spec.name}):\n{comparison.text_table(table)}")
        print("  ".join(f"{name}={value:.4g}" for name, value in records[part]["metrics"].items()))
        print(f"record {path}, after {time.monotonic() - start_s:.0f} s", flush=True)
    return records


def _kernels(gpu: compiled_code.Target, values: flags.FlagValues) -> dict[str, Any]:
    chosen = [program for program in gpu_kernels.programs().values() if gpu.name in program.targets]
    if values.smoke:
        chosen = [program for program in chosen if program.name in SMOKE_KERNELS]
    rows = gpu_kernels.compile_apart(gpu.name, [program.name for program in chosen], values.num_processes)
    too_few = [row for row in rows if row["assumed_ctas_per_sm"] and row["ctas_per_sm"] < row["assumed_ctas_per_sm"]]
    metrics = {
        "num_programs": len(chosen), "num_kernels": len(rows), "num_spilling": sum(row["spill_bytes"] > 0 for row in rows),
        "num_above_smem_limit": sum(row["smem_bytes"] > row["smem_limit_bytes"] for row in rows),
        "num_with_fewer_ctas_than_assumed": len(too_few),
    }  # fmt: skip
    series = {"kernels": _columns(rows), "rooflines": _columns(rooflines())}
    return _record(gpu, values, "kernels", metrics, series, {"programs": [program.name for program in chosen]})


def rooflines() -> list[dict[str, Any]]:
    """What each call has to move and compute, and the time that takes at published peaks; once for each shape."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for program in gpu_kernels.programs().values():
        row = {"operation": program.operation, "shape": program.shape, "bytes": program.work.num_bytes,
               "flops": program.work.flops, "flops_per_byte": program.work.flops / program.work.num_bytes}  # fmt: skip
        for name, hardware_name in compiled_code.TARGETS.items():
            spec = hardware.hardware_spec(hardware_name)
            row[f"{name}_floor_s"] = program.work.floor_s(spec.peak_flops, spec.memory_bytes_per_s)
            is_compute = program.work.flops / spec.peak_flops > program.work.num_bytes / spec.memory_bytes_per_s
            row[f"{name}_bound"] = "compute" if is_compute else "memory"
        rows[program.operation, program.shape] = row
    return list(rows.values())


def _steps(gpu: compiled_code.Target, part: str, values: flags.FlagValues) -> dict[str, Any]:
    if part == "step":
        model, pipeline, num_devices, overlap = "llama-3-8b", values.pipeline, 1, values.overlap
        batches = [int(text) for text in values.dense_batches]
    else:
        model, pipeline, num_devices, overlap = "llama-3-70b", "llama_70b_figure6", NUM_DEVICES, "xla"
        batches = [max(int(text) for text in values.dense_batches)]
    whole = PRESETS[model]
    num_layers = values.num_layers or whole.num_layers
    summaries, operations = [], []
    for num_tokens in batches:
        step = gpu_steps.compile_step(
            gpu, dataclasses.replace(whole, num_layers=num_layers),
            library.PIPELINES[pipeline](num_tokens, False, num_devices),
            kv_bytes=KV_BYTES[part, gpu.name] * num_devices * num_layers / whole.num_layers, num_devices=num_devices,
            overlap=overlap,
        )  # fmt: skip
        summaries.append({"dense_batch_tokens": num_tokens, **summary(step)})
        operations += [{"dense_batch_tokens": num_tokens, **row} for row in operation_rows(step)]
    table = _columns(summaries)
    metrics = {
        "overlapped_fraction_min": min(table["overlapped_fraction"]),
        "overlapped_pairs_fraction_min": min(table["pairs_fraction"]), "num_kv_copies": sum(table["kv_copies"]),
        "num_merged_matmuls": sum(table["merged_matmuls"]), "num_cuda_graphs_max": max(table["cuda_graphs"]),
        "num_launches_outside_graphs": sum(table["launches_outside_graphs"]),
        "peak_memory_bytes_max": max(table["peak_bytes"]), "kv_bytes": min(table["kv_bytes"]),
        "num_collectives": sum(table["collectives"]), "num_collectives_overlapped": sum(table["collectives_overlapped"]),
    }  # fmt: skip
    config = {
        "model": model, "num_layers": num_layers, "pipeline": pipeline, "num_devices": num_devices,
        "overlap": overlap,
        "notes": [
            "memory: arguments + outputs - aliased + temporaries of one device; CUDA's and NCCL's own are not in it",
            "overlap: on its way at the same time as one of another stream, in the scheduled launch order; not a time",
            "pairs: operations that the pipeline launches side by side, and those of them that are on their way together",
        ],
    }  # fmt: skip
    return _record(gpu, values, part, metrics, {"steps": table, "operations": _columns(operations)}, config)


def summary(step: Step) -> dict[str, Any]:
    """The whole step in numbers; of one device."""
    code, overlap = step.code, step.code.overlap
    collectives = [i for i, region in enumerate(overlap.regions) if region.collective]

    def beside(labels: Sequence[str]) -> int:
        return sum(any(overlap.starts[j].label in labels for j in overlap.beside[i]) for i in collectives)

    graphs = code.graphs.count("kCommandBuffer")
    return {
        "regions": len(overlap.regions), "regions_that_could": sum(overlap.is_possible),
        "regions_overlapped": sum(overlap.is_there), "overlapped_fraction": overlap.fraction,
        "pairs_planned": step.pairs[0], "pairs_overlapped": step.pairs[1], "pairs_fraction": step.pairs[1] / max(step.pairs[0], 1),
        "collectives": len(collectives),
        "collectives_async": sum(overlap.regions[i].stream != "main" for i in collectives),
        "collectives_overlapped": sum(overlap.is_there[i] for i in collectives),
        "collectives_beside_matmuls": beside(MATMULS), "collectives_beside_attention": beside(ATTENTION),
        "kv_copies": step.num_kv_copies, "merged_matmuls": step.num_merged_matmuls, "cuda_graphs": graphs,
        "launches_outside_graphs": len(code.graphs) - graphs, "kv_bytes": step.kv_bytes,
        "aliased_bytes": code.alias_bytes, "argument_bytes": code.argument_bytes,
        "scheduler_limit_bytes": int(SCHEDULED_FRACTION * code.target.number("device_memory_size")),
        "temp_bytes": code.temp_bytes, "peak_bytes": code.peak_bytes, "memory_bytes": int(code.target.spec.memory_bytes),
    }  # fmt: skip


def operation_rows(step: Step) -> list[dict[str, Any]]:
    """For each operation of the pipeline and each stream: what runs it, how often it overlaps, and beside what."""
    overlap = step.code.overlap
    groups: dict[tuple[str, str, str], list[int]] = collections.defaultdict(list)
    for i, (start, region) in enumerate(zip(overlap.starts, overlap.regions, strict=True)):
        groups[start.label, start.path, region.stream].append(i)
    rows = []
    for (label, path, stream), members in sorted(groups.items()):
        partners = collections.Counter(
            name for i in members for name in {overlap.starts[j].label for j in overlap.beside[i]}
        )
        rows.append({
            "operation": label, "path": path, "stream": stream, "num": len(members),
            "num_overlapped": sum(overlap.is_there[i] for i in members),
            "beside": ", ".join(f"{name} {count}" for name, count in partners.most_common()),
        })  # fmt: skip
    rest = " + ".join(["XLA", *sorted(scheduled_hlo.paths_of_main(step.code.hlo) - {"NCCL"})])
    return [*rows, {"operation": "embedding, KV writes, logits, sampling, scheduling", "path": rest, "stream": "main",
                    "num": 1, "num_overlapped": 0, "beside": ""}]  # fmt: skip


def _columns(rows: Sequence[Mapping[str, Any]]) -> Table:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _record(gpu, values, part, metrics, series, config) -> dict[str, Any]:
    environment = {name: os.environ[name] for name in ("JAX_PLATFORMS",) if name in os.environ}
    return make_record(
        f"{NAME}-{part}", "compiled", metrics=metrics, seed=values.seed, series=series,
        config={"target": gpu.name, "environment": environment, **config},
        device={"name": gpu.spec.name, "kind": "gpu", "num_cores": gpu.number("core_count"),
                "num_devices": config.get("num_devices", 1), "is_there": False},
    )  # fmt: skip


if __name__ == "__main__":
    figure_flags.launch(define_flags, run)
