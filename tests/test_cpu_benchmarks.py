"""Do the benchmarks that stand beside other programs run, and read what those print?"""

import json
import sys

import pytest
from absl import flags

from experiments import cpu_peers, scheduling_cost


def parsed(experiment, *arguments):
    values = flags.FlagValues()
    experiment.define_flags(values)
    values(["program", *arguments])
    return values


@pytest.mark.parametrize(
    ("output", "rate"),
    [
        ("RESULT openvino default in 3 out 5 s 1.5 total tok/s 850.2 out tok/s 238.1", 850.2),
        ("1.0 tokens/s in and out\n  12.5 tokens/s in and out", 12.5),
        ("total tok/s 1.0 out tok/s 9\ntotal tok/s 2.0 out tok/s 9", 2.0),
    ],
)
def test_the_last_total_rate_counts(output, rate):
    assert cpu_peers.last_rate("peer", output) == rate


def test_a_program_without_a_rate_is_said():
    with pytest.raises(ValueError, match="peer printed no tokens/s: 'hello'"):
        cpu_peers.last_rate("peer", "hello")


def test_programs_run_in_turn(tmp_path, monkeypatch):
    (tmp_path / "work.jsonl").write_text("{}")
    ours, commands = iter((30.0, 60.0)), []

    def output(name, command):
        commands.append(name)
        return f"{next(ours)} tokens/s" if name == "nanojax" else "total tok/s 20.0"

    monkeypatch.setattr(cpu_peers, "_output", output)
    values = parsed(cpu_peers, f"--requests={tmp_path}/work.jsonl", "--peer=a=x y=z", "--rounds=2", f"--out={tmp_path}")
    record = cpu_peers.run(values)
    assert commands == ["nanojax", "a", "nanojax", "a"]
    assert record["metrics"]["ratio_to_a"] == pytest.approx(2.25)
    assert json.loads((tmp_path / "cpu_peers.json").read_text())["origin"] == "measured"


def test_a_program_that_fails_is_said():
    with pytest.raises(ValueError, match="peer ended with status 3"):
        cpu_peers._output("peer", f"{sys.executable} -c 'raise SystemExit(3)'")


def test_scheduling_cost(tmp_path, capsys):
    record = scheduling_cost.run(
        parsed(scheduling_cost, "--smoke", "--num_slots=8", "--token_budget=16", f"--out={tmp_path}")
    )
    assert record["metrics"]["scheduling_s_8"] > 0
    assert "8 slots" in capsys.readouterr().out
