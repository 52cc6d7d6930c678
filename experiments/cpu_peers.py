"""How fast is nanojax beside other engines on this machine?  Whole programs, in turn, on the same file of requests.

    python -m experiments.cpu_peers --requests=work.jsonl --rounds=3 \
        --peer="openvino=python peer_openvino.py MODEL_DIR work.jsonl" --peer="vllm=python peer_vllm.py HF_DIR work.jsonl bfloat16"

Claim        nanojax serves SmolLM2-135M at least as fast as the fastest CPU engine known (OpenVINO GenAI).
Method       round by round: nanojax (`experiments.generate`), then each peer, each a process of its own that loads and warms
             up by itself.  A program's figure for a round is the last number before "tok/s" or "tokens/s" that it prints.
             Reported: medians, and the median over rounds of ours / theirs of the same round, since these machines drift.
Hardware     any CPU; peers are installed apart and named by their command.
Minutes      about 1 for each program and round.
"""

import pathlib
import re
import shlex
import subprocess
import sys
import tempfile

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import figure_flags
from experiments.record import make_record, write_record

NAME = "cpu_peers"
RATE = re.compile(r"([\d.]+) tok(?:en)?s?/s|tok/s ([\d.]+)")


def define_flags(values: flags.FlagValues) -> None:
    figure_flags.define(values)
    flags.DEFINE_string(
        "requests", None, "JSONL file of requests, as `experiments.generate` reads.", flag_values=values
    )
    flags.DEFINE_multi_string("peer", [], "NAME=COMMAND of another engine; may be repeated.", flag_values=values)
    flags.DEFINE_string("ours", "", "Flags for `experiments.generate`.", flag_values=values)
    flags.DEFINE_integer("rounds", 3, "Times that each program runs.", lower_bound=1, flag_values=values)


def run(values: flags.FlagValues) -> dict:
    """Runs all programs in turn; prints the table, writes and returns the record."""
    if values.requests is None:
        raise ValueError("give --requests, a JSONL file")
    pathlib.Path(values.requests).read_bytes()
    commands = dict(peer.split("=", 1) for peer in values.peer if "=" in peer)
    if len(commands) < len(values.peer):
        raise ValueError(f"--peer={values.peer} must each be NAME=COMMAND, with different names")
    answers = pathlib.Path(tempfile.mkdtemp()) / "answers.jsonl"
    ours = [sys.executable, "-m", "experiments.generate", "--requests", values.requests, "--out", str(answers)]
    programs = {"nanojax": shlex.join(ours) + " " + values.ours} | commands
    rates: dict[str, list[float]] = {name: [] for name in programs}
    with tqdm(total=values.rounds * len(programs), unit=" runs") as bar:
        for _ in range(values.rounds):
            for name, command in programs.items():
                bar.set_postfix_str(name)
                rates[name].append(last_rate(name, _output(name, command)))
                bar.update()
    metrics: dict[str, float] = {}
    for name, found in rates.items():
        metrics[f"total_tokens_per_s_{name}"] = float(np.median(found))
        ratios = np.divide(rates["nanojax"], found)
        print(f"{name:<20}{np.median(found):10.1f} tokens/s   nanojax / {name}: {np.median(ratios):.3f}", end="")
        print(f"   ({', '.join(f'{rate:.0f}' for rate in found)})")
        if name != "nanojax":
            metrics[f"ratio_to_{name}"] = float(np.median(ratios))
    config = {"requests": pathlib.Path(values.requests).name, "rounds": values.rounds, "ours": values.ours}
    record = make_record(
        NAME, "measured", metrics=metrics, config=config, series={"total_tokens_per_s": rates}, seed=values.seed
    )
    path = pathlib.Path(values.out) / f"{NAME}.json"
    write_record(record, path)
    print(f"record {path}")
    return record


def _output(name: str, command: str) -> str:
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{name} ended with status {done.returncode}: {done.stdout[-1000:]}")
    return done.stdout


def last_rate(name: str, output: str) -> float:
    """The last rate in what a program printed.  Raises ValueError if there is none."""
    found = [first or second for first, second in RATE.findall(output)]
    # A peer that prints its output rate after the total says which is which: the total is what counts.
    totals = re.findall(r"total tok/s ([\d.]+)", output)
    if not found:
        raise ValueError(f"{name} printed no tokens/s: {output[-1000:]!r}")
    return float((totals or found)[-1])


if __name__ == "__main__":
    figure_flags.launch(define_flags, run)
