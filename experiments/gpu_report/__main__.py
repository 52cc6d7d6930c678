"""What do the kernels, their overlap and the engine reach on the GPU here?  One command, one report.

Figure: R -> P curves of the card beside the published ones; T(pair) / (T1 + T2) by form and share.
Claim: aims on one H200: decode attention >= 85 % of the measured copy bandwidth at 64 x 2k and 512 x 1k, prefill >= 400
TFLOP/s, persistent matmul >= 85 % of cuBLAS at M >= 512, a pair <= 0.85 (T1 + T2) in the best form, end to end >= 72 % of
optimal, overlap >= 1.10 x sequential.
Command: make gpu-report, or python -m experiments.gpu_report --out=DIR [--parts=kernels,pairs --minutes=4 --wheels=DIR]
Hardware: one H200 (H100, A100 by the same command; kernels that such a card cannot run say so).    Minutes: 9 at most.
Expected: see the README for one H200; of the aims, overlap and 72 % of optimal are missed, and prefill of short prompts.

Each part (`experiments/gpu_report/cases.py` lists them) is a process of its own, that may fail, hang or lose its device
without harm to the others; a part that no longer fits into `--minutes` is skipped and named.  In DIR:

    <part>.json   record, rewritten after every case: series `rows` and `cases`      <part>.log   what the part printed
    card.interference.json, profile_ops.profile.json, searched.pipeline.json         for search and simulation
    rp_curves.png, pair_ratios.png, end_to_end.png                                    figures, where there is matplotlib

`--wheels` names a folder of wheels to use besides what is installed, for a machine without network: they are unpacked into
DIR/packages, which only this run sees.  Needed besides jax, flax and absl: jaxtyping, wadler-lindig, gguf, tokenizers,
safetensors, tqdm, and matplotlib for the figures.
"""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence

from absl import app, flags

from experiments.gpu_report.cases import PARTS, Part, Setting

NAMES = [part.name for part in PARTS]
MEMORY_FRACTION = "0.92"
"""Of the card's memory, for JAX: by default it takes three quarters."""


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("out", "out/gpu_report", "Folder of the report.", flag_values=values)
    flags.DEFINE_list("parts", NAMES, f"Parts to run, of {', '.join(NAMES)}.", flag_values=values)
    flags.DEFINE_list("skip", [], "Parts to leave out.", flag_values=values)
    flags.DEFINE_float("minutes", 9.0, "Time for all parts together.", lower_bound=0.1, flag_values=values)
    flags.DEFINE_integer("repeats", 10, "Timings of each program; medians count.", 1, flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of all inputs.", 0, flag_values=values)
    flags.DEFINE_string("wheels", None, "Folder of wheels to use besides what is installed.", flag_values=values)
    flags.DEFINE_bool("smoke", False, "Tiny shapes, a check of the report itself on a CPU.", flag_values=values)
    for name in ("parts", "skip"):
        flags.register_validator(
            name, lambda words: set(words) <= set(NAMES), f"must be of {', '.join(NAMES)}", flag_values=values
        )


def run(values: flags.FlagValues) -> list[str]:
    """Runs the parts, prints as it goes; gives the names of those that had no time."""
    start_s = time.monotonic()
    out = pathlib.Path(values.out)
    out.mkdir(parents=True, exist_ok=True)
    environment = {"XLA_CLIENT_MEM_FRACTION": MEMORY_FRACTION, "JAX_COMPILATION_CACHE_DIR": str(out.resolve() / "xla")}
    if values.smoke:  # whose time is the compiler's
        environment = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    if values.wheels is not None:
        packages = unpack(pathlib.Path(values.wheels), out / "packages")
        sys.path.insert(1, str(packages.resolve()))
        importlib.invalidate_caches()
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(packages.resolve()), os.environ.get("PYTHONPATH")])
        )
    from experiments.gpu_report import results_table, supervise  # after the wheels: jax's companions may be among them

    setting = Setting(out, values.smoke, values.seed, 2 if values.smoke else values.repeats)
    chosen = [part for part in PARTS if part.name in values.parts and part.name not in values.skip]
    skipped: list[str] = []
    for part in chosen:
        left_s = 60 * values.minutes - (time.monotonic() - start_s)
        if left_s < (2 if values.smoke else part.needs_s):
            print(f"{part.name}: skipped, needs {part.needs_s:.0f} s, {max(left_s, 0):.0f} s are left", flush=True)
            skipped.append(part.name)
            continue
        # A smoke run's time is the compiler's, and the CPU may be shared: a limit would say nothing of the report.
        limit_s = left_s if values.smoke else min(part.limit_s, left_s)
        _run_part(part, setting, limit_s, environment, supervise)
    print(f"\n{results_table.table(out, [part.name for part in chosen])}")
    _draw(out, environment)
    print(f"{time.monotonic() - start_s:.0f} s; skipped: {', '.join(skipped) or 'nothing'}; records in {out}")
    return skipped


def _run_part(part: Part, setting: Setting, seconds: float, environment: dict[str, str], supervise) -> None:
    print(f"{part.name}: {part.question}  (at most {seconds:.0f} s)", flush=True)
    outcome = supervise.run_part(
        part, setting, seconds, environment=environment, config={"num_repeats": setting.num_repeats},
        show=lambda text: print(text, flush=True),
    )  # fmt: skip
    counts = {status: outcome.count(status) for status in supervise.STATUSES}
    print(f"  {json.dumps({name: n for name, n in counts.items() if n})} in {outcome.seconds:.0f} s", flush=True)


def _draw(out: pathlib.Path, environment: dict[str, str]) -> None:
    """The figures, in a process that does not touch the GPU and whose failure does not matter."""
    command = [sys.executable, "-m", "experiments.gpu_report.draw", str(out)]
    result = subprocess.run(
        command, env={**os.environ, **environment, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
    )
    last = (result.stderr.strip().splitlines() or ["no message"])[-1]
    print(result.stdout.strip() if result.returncode == 0 else f"no figures: {last}")


def unpack(wheels: pathlib.Path, packages: pathlib.Path) -> pathlib.Path:
    """Unpacks all wheels of a folder into `packages`.  Raises FileNotFoundError when it holds none."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise FileNotFoundError(f"--wheels={wheels} holds no *.whl")
    packages.mkdir(parents=True, exist_ok=True)
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(packages)
    return packages


def main(argv: Sequence[str]) -> None:
    if argv[1:]:
        sys.exit(f"error: unexpected argument {argv[1]!r}; flags are written --name=value")
    run(flags.FLAGS)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
