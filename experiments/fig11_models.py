"""Does the paper's pipeline carry over to other models?

Figure: NanoFlow (arXiv 2408.12757v2) Figure 11: tokens/s per GPU, prompts of 1024 and outputs of 512 tokens, on 8
A100-80GB (LLaMA-3-8B: one).
Claim: 50 to 79 % of each model's own optimum, 2.66 times vLLM (geometric mean).
Command: python -m experiments.fig11_models
Hardware: none.    Minutes: 0.1.
Expected: dense models within 15 %; searched pipelines promise 4 to 19 % more than was reached, Mixtral's 35 %.  Table 2's efficiencies are those of LLaMA-2-70B's shapes; a mixture of experts and a
model on one GPU have others, which nothing in Table 2 tells.

    out/fig11_models.json   metrics: tokens/s, percent of optimal, errors
    out/fig11_models.png    published and simulated bars
"""

import pathlib
from typing import Any

from absl import flags

from experiments import comparison, figure_flags, layer_timings, published, searched, throughput_prediction
from experiments.figures import Bars, grouped_bars, sources_of
from experiments.record import make_record, write_record
from nanojax.config import PRESETS
from nanojax.hardware import PAPER_TABLE_1
from nanojax.pipeline.closed_forms import MEASURED_PEAK_FRACTION, optimal_throughput

NAME = "fig11_models"
INPUT_LEN, OUTPUT_LEN = 1024, 512
PIPELINES = {
    "llama-3-70b": ("llama_70b_figure6", 2048, 8),
    "qwen2-72b": ("llama_70b_figure6", 2048, 8),
    "deepseek-67b": ("llama_70b_figure6", 2048, 8),
    "mixtral-8x7b": ("mixtral_released", 4096, 8),
    "llama-3-8b": ("llama_8b", 1024, 1),
}
"""Model -> its pipeline, the dense batch of the released configuration, GPUs."""


def define_flags(values: flags.FlagValues) -> None:
    figure_flags.define(values)
    layer_timings.define_model_flags(values)


def run(values: flags.FlagValues) -> dict[str, Any]:
    """Predicts, prints, writes the record and the figure; gives the record."""
    printed = published.table("fig11")
    models = printed.columns["model"]
    theirs = printed.columns["nanoflow_tokens_per_s_per_gpu"]
    ours, searched_rates, metrics = [], [], {}
    for model, reference in zip(models, theirs, strict=True):
        name, num_tokens, num_devices = PIPELINES[model]
        pipeline = throughput_prediction.named(name, model, num_tokens, num_devices)
        found = throughput_prediction.predict(model, num_devices, pipeline, INPUT_LEN, OUTPUT_LEN, values)
        hardware = PAPER_TABLE_1["a100-80"]
        optimum = optimal_throughput(PRESETS[model], hardware, peak_fraction=MEASURED_PEAK_FRACTION)
        ours.append(found.tokens_per_s_per_device)
        metrics[f"tokens_per_s_per_gpu_{model}"] = found.tokens_per_s_per_device
        metrics[f"percent_of_optimal_{model}"] = 100 * found.tokens_per_s_per_device / optimum
        metrics[f"error_percent_{model}"] = comparison.error_percent(found.tokens_per_s_per_device, reference)
        best = searched.pipeline(model, INPUT_LEN, OUTPUT_LEN)
        found = throughput_prediction.predict(model, num_devices, best, INPUT_LEN, OUTPUT_LEN, values)
        searched_rates.append(found.tokens_per_s_per_device)
        metrics[f"searched_tokens_per_s_per_gpu_{model}"] = found.tokens_per_s_per_device
        metrics[f"searched_error_percent_{model}"] = comparison.error_percent(found.tokens_per_s_per_device, reference)
    metrics["mean_absolute_error_percent"] = comparison.mean_absolute_error_percent(ours, theirs)
    metrics["searched_mean_absolute_error_percent"] = comparison.mean_absolute_error_percent(searched_rates, theirs)
    both = {"vLLM": printed.columns["vllm_tokens_per_s_per_gpu"], "NanoFlow": theirs}
    wrong = {
        label: comparison.wrong_orders(models, {"NanoFlow": rates}, both)
        for label, rates in (("by hand", ours), ("searched", searched_rates))
    }
    metrics |= {"num_wrong_orders": len(wrong["by hand"]), "searched_num_wrong_orders": len(wrong["searched"])}
    config = {name: values[name].value for name in layer_timings.MODEL_FLAGS}
    config |= {"pipelines": {model: name for model, (name, *_) in PIPELINES.items()}}
    record = make_record(
        NAME, "simulated", metrics=metrics, config=config | {"published_source": printed.source}, seed=values.seed
    )
    folder = pathlib.Path(values.out)
    write_record(record, folder / f"{NAME}.json")
    bars = [
        Bars("vLLM", "published", printed.columns["vllm_tokens_per_s_per_gpu"]),
        Bars("NanoFlow", "published", theirs),
        Bars("the paper's pipelines", "simulated", ours, against="NanoFlow"),
        Bars("searched", "simulated", searched_rates, against="NanoFlow"),
    ]
    picture = grouped_bars(
        f"Figure 11: other models, {INPUT_LEN} tokens in, {OUTPUT_LEN} out, A100", sources_of(record), models, bars,
        folder / f"{NAME}.png", y_label="tokens/s per GPU",
    )  # fmt: skip
    print(comparison.prediction_table({"model": models}, theirs, ours, searched_rates))
    for label, orders in wrong.items():
        print(f"wrong orders, {label}: {', '.join(orders) or 'none'}")
    print(f"record {folder / NAME}.json, figure {picture}")
    return record


if __name__ == "__main__":
    figure_flags.launch(define_flags, run)
