"""Does the experiment that compiles for GPUs that are not there write what it says, and are its floors those of the work?"""

import dataclasses

import pytest
from absl import flags

from experiments import compiled_code, gpu_compile, gpu_kernels, gpu_steps
from experiments.record import read_record
from nanojax import hardware
from nanojax.config import PRESETS
from nanojax.pipeline import library

needs_plugin = pytest.mark.skipif(compiled_code.why_not() is not None, reason=str(compiled_code.why_not()))


def parsed(*arguments) -> flags.FlagValues:
    values = flags.FlagValues()
    gpu_compile.define_flags(values)
    values(["experiment", *map(str, arguments)])
    return values


def test_every_shape_has_a_floor_that_no_peak_allows_to_beat():
    rows = gpu_compile.rooflines()
    assert {row["operation"] for row in rows} == {"paged_attention", "matmul", "overlap"}
    for row in rows:
        for name, hardware_name in compiled_code.TARGETS.items():
            spec = hardware.hardware_spec(hardware_name)
            times = {"compute": row["flops"] / spec.peak_flops, "memory": row["bytes"] / spec.memory_bytes_per_s}
            assert row[f"{name}_floor_s"] == max(times.values())
            assert row[f"{name}_bound"] == max(times, key=times.__getitem__)
    decode = next(row for row in rows if row["shape"] == "8b-decode-64x2k")
    kv, q = 64 * 2048 * 2 * 8 * 128 * 2, 64 * 32 * 128 * 2
    assert decode["bytes"] == kv + 2 * q
    assert decode["flops"] == 64 * 2048 * 4 * 32 * 128


def test_programs_have_names_of_their_own_and_a_bad_part_is_named():
    assert {program.name for program in gpu_kernels.programs().values()} == set(gpu_kernels.programs())
    assert set(gpu_compile.SMOKE_KERNELS) <= set(gpu_kernels.programs())
    with pytest.raises(ValueError, match="--parts=soup is none of kernels, step, tensor_parallel"):
        gpu_compile.run(parsed("--parts=soup"))


@pytest.mark.gpu_compile
@needs_plugin
def test_the_smoke_run_writes_a_record(tmp_path, capsys):
    gpu_compile.run(parsed("--smoke", f"--out={tmp_path}"))
    record = read_record(tmp_path / "gpu_compile-kernels-h200.json")
    assert record["origin"] == "compiled"
    assert record["device"]["name"] == "h200-sxm"
    assert record["metrics"]["num_spilling"] == 0
    assert record["metrics"]["num_with_fewer_ctas_than_assumed"] == 0
    assert set(record["series"]["kernels"]["kernel"]) == {"decode", "merge", "prefill"}
    assert "compiled for h200-sxm" in capsys.readouterr().out


@pytest.mark.gpu_compile
@needs_plugin
def test_collectives_of_eight_gpus_run_beside_matmuls_and_attention():
    """Two layers of LLaMA-3-70B at full width, on 8 A100, where XLA by itself would wait for each collective at once."""
    model = dataclasses.replace(PRESETS["llama-3-70b"], num_layers=2)
    pipeline = library.PIPELINES["llama_70b_figure6"](2048, False, 8)
    step = gpu_steps.compile_step(
        compiled_code.target("a100"), model, pipeline, kv_bytes=8 * 40e9 * 2 / 80, num_devices=8
    )
    found = gpu_compile.summary(step)
    assert found["collectives"] == 2 * 6 + 1, "of each layer, and of the logits"
    # The last layer's second halves and the logits have nothing to run beside.
    assert found["collectives_beside_matmuls"] >= 2 * 6 - 2
    assert found["collectives_beside_attention"] == 2, "the gathering of each layer's first attention"
    assert found["collectives_async"] >= 2 * 6 - 2
    assert found["pairs_fraction"] > 0.8
    assert (found["kv_copies"], found["merged_matmuls"]) == (0, 0)
    assert (found["cuda_graphs"], found["launches_outside_graphs"]) == (1, 0)
    rows = {row["operation"]: row for row in gpu_compile.operation_rows(step)}
    assert rows["UG"]["num_overlapped"] == rows["UG"]["num"] == 4, "beside the reductions of O and of D"
    paths = {name: row["path"] for name, row in rows.items()}
    assert {paths[name] for name in ("KQV", "O", "UG", "D")} == {"cuBLASLt"}
    assert {paths[name] for name in ("Attn.AG", "O.AG", "O.AR", "D.AR")} == {"NCCL"}
    assert paths["DecAttn"] == "Triton"
