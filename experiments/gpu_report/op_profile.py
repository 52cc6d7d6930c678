"""How long does each operation of a LLaMA-3-8B layer take on this card?  The profile table that `search` and `simulate` read.

It is `experiments.profile_ops` with sizes of serving, on few layers, which compile in seconds and whose weights still come
from memory; its files (`profile_ops.*`) go into the report's folder.
"""

from absl import flags

from experiments import profile_ops, serving_flags
from experiments.gpu_report.cases import Case, Row, Setting

SIZES, CONTEXTS, NUM_LAYERS = "1024,2048", "768", 4


def cases(setting: Setting) -> list[Case]:
    """One case: repeats are interleaved over all operations."""
    return [Case("profile", lambda: _profile(setting), needs_s=0.0 if setting.is_smoke else 25.0, limit_s=180)]


def flag_values(setting: Setting) -> flags.FlagValues:
    """The flags of `profile_ops` for this report."""
    values = flags.FlagValues()
    profile_ops.define_flags(values)
    if setting.is_smoke:
        arguments = ["--smoke", "--attention=reference", "--num_tokens=8", "--context_lens=12", "--repeats=2"]
    else:
        arguments = [
            "--model=llama-3-8b", f"--num_tokens={SIZES}", f"--context_lens={CONTEXTS}", "--page_size=64",
            f"--repeats={setting.num_repeats}", f"--num_layers={NUM_LAYERS}",
        ]  # fmt: skip
    values(["profile_ops", *arguments, f"--out={setting.out}", f"--seed={setting.seed}", "--cache_dir="])
    return serving_flags.with_smoke(values)


def _profile(setting: Setting) -> list[Row]:
    table = profile_ops.run(flag_values(setting))["series"]["profile"]
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
