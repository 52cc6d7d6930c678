"""Which of the paper's tables and figures come out here?  All that need no GPU, in one self-contained HTML report.

    python -m experiments.reproduce [--out=out/paper] [--only=fig07,fig09]

Each experiment runs as it would alone, with its defaults, and leaves its record and pictures in `--out`; the report
`index.html` holds what it printed, its pictures and its docstring.  Minutes: 1 on two cores.
"""

import base64
import contextlib
import html
import importlib
import io
import pathlib
import time
from typing import Any

from absl import flags
from tqdm import tqdm

from experiments import figure_flags

EXPERIMENTS = (
    "table1_accelerators", "fig02_network_ratio", "fig03_memory_ratio", "table2_cost_model",
    "table3_fig05_interference", "table4_datasets", "fig06_pipelines", "fig07_offline_throughput", "fig09_ablation",
    "fig10_utilization", "fig11_models",
)  # fmt: skip
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #222 }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 12.5px; line-height: 1.35 }
img { max-width: 100% } nav a { margin-right: 1rem } h2 { margin-top: 3rem; border-top: 1px solid #ddd; padding-top: 1rem }
"""


def define_flags(values: flags.FlagValues) -> None:
    figure_flags.define(values)
    flags.DEFINE_list("only", [], "Beginnings of the names of experiments; all if not given.", flag_values=values)


def run(values: flags.FlagValues) -> pathlib.Path:
    """Runs the experiments and writes the report; gives its path.  Raises ValueError for an unknown name in `--only`."""
    chosen = [name for name in EXPERIMENTS if not values.only or name.startswith(tuple(values.only))]
    for start in values.only:
        if not any(name.startswith(start) for name in EXPERIMENTS):
            raise ValueError(f"--only={start} is the beginning of none of {', '.join(EXPERIMENTS)}")
    folder = pathlib.Path(values.out)
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    with tqdm(chosen, unit=" figures") as bar:
        for name in bar:
            bar.set_postfix_str(name)
            sections.append(_section(name, folder, is_smoke=values.smoke))
    links = "".join(f'<a href="#{name}">{name}</a>' for name in chosen)
    page = f"<!doctype html><meta charset='utf-8'><title>nanojax: the paper's figures</title><style>{STYLE}</style>"
    page += (
        "<h1>NanoFlow's tables and figures, recomputed</h1><p>Grey: published. Blue: simulated. Orange: measured.</p>"
    )
    path = folder / "index.html"
    path.write_text(f"{page}<nav>{links}</nav>{''.join(sections)}", encoding="utf-8")
    print(f"report {path}")
    return path


def _section(name: str, folder: pathlib.Path, *, is_smoke: bool) -> str:
    """Runs one experiment; what it says, printed and drew."""
    module: Any = importlib.import_module(f"experiments.{name}")
    values = flags.FlagValues()
    module.define_flags(values)
    values([name, f"--out={folder}", *(["--smoke"] if is_smoke else [])])
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    start_s, printed = time.perf_counter(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        module.run(values)
    took_s = time.perf_counter() - start_s
    drawn = [path for path in sorted(folder.glob("*.png")) if before.get(path) != path.stat().st_mtime_ns]
    pictures = "".join(
        f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in drawn
    )
    title, _, about = (module.__doc__ or "").partition("\n")
    return (
        f'<h2 id="{name}">{html.escape(title)}</h2>{pictures}<pre>{html.escape(printed.getvalue())}</pre>'
        f"<details><summary>{name}, {took_s:.1f} s</summary><pre>{html.escape(about.strip())}</pre></details>"
    )


if __name__ == "__main__":
    figure_flags.launch(define_flags, run)
