"""Which pipelines did the search find for the settings of the figures?  Committed, as a search takes up to two minutes.

A folder for each setting, written by the command in its record:

    python -m experiments.auto_search --model=MODEL --num_devices=N --num_tokens=B --prompt_len=P --output_len=D
        --time_limit_s=120 --out=experiments/results/searched/MODEL-P-D

Searched with Table 2's efficiencies and the paper's interference table, as the predictions are made; nothing of what is
predicted was seen.
"""

import pathlib

from nanojax.pipeline.ir import Pipeline
from nanojax.pipeline.json_format import from_json

__all__ = ["FOLDER", "pipeline"]

FOLDER = pathlib.Path(__file__).with_name("results") / "searched"


def pipeline(model_name: str, input_len: float, output_len: float) -> Pipeline:
    """What was found for these mean lengths (tokens).  Raises FileNotFoundError where nothing was searched."""
    folder = FOLDER / f"{model_name}-{input_len:g}-{output_len:g}"
    return from_json((folder / "auto_search.pipeline.json").read_text(encoding="utf-8"))
