"""Does a record survive a round trip, and does a bad one name its offending key?"""

import copy
import json
import math
import pathlib
import re
import shutil
import subprocess

import pytest

from experiments import record as records
from experiments.record import make_record, read_record, validate_record, write_record
from nanojax.metrics import RequestRecord, StepRecord, step_series, summarize


def good_record() -> dict:
    return make_record(
        "toy",
        "measured",
        metrics={"total_tokens_per_s": 12.5, "tpot_s_mean": None, "num_requests": 3},
        config={"page_size": 16, "budgets": [8, 16]},
        seed=7,
        series={"timeline": {"time_s": [0.5, 1.5], "num_running": [1, 2]}, "sweep": {"driver": ["sync", "ahead"]}},
    )


def test_a_record_comes_back_as_it_was_written(tmp_path):
    record = good_record()
    path = tmp_path / "new" / "toy.json"
    write_record(record, path)
    assert read_record(path) == record
    assert json.loads(path.read_text()) == record
    assert '"time_s": [0.5, 1.5]' in path.read_text()


def test_a_record_says_what_it_ran_on():
    record = good_record()
    assert list(record) == list(records.SCHEMA)
    assert record["device"]["kind"] == "cpu"
    assert set(record["versions"]) == {"python", "jax", "jaxlib", "flax", "numpy", "nanojax"}
    assert re.fullmatch(r"unknown|[0-9a-f]{40}(-dirty)?", record["commit"])


def test_everything_that_summarize_says_fits_in_a_record():
    steps = [StepRecord(1.0, 8, 0, 8, 1, 3, 2), StepRecord(2.0, 8, 2, 6, 2, 2, 4)]
    metrics = summarize(
        [RequestRecord("a", 0.0, 1.0, 2.0, 3, 1)], steps, peak_flops=1e12, num_active_params=10**9, num_pages=16
    )
    series = {"timeline": step_series(steps, num_bins=3)}
    make_record("summary", "simulated", metrics=metrics, config={}, seed=0, series=series)


def test_series_are_rounded_and_metrics_are_not():
    record = make_record(
        "r", "measured", metrics={"a_s": 1 / 3}, config={}, seed=0, series={"t": {"a_s": [1 / 3, 123456789.0, 5]}}
    )
    assert record["metrics"]["a_s"] == 1 / 3
    assert record["series"]["t"]["a_s"] == [0.333333, 123457000.0, 5]


def changed(**entries) -> dict:
    return {**copy.deepcopy(good_record()), **entries}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "a record is a JSON object, got list"),
        ({"experiment": "x"}, "'origin' is missing"),
        (lambda: changed(speed=3), "'speed' is not part of a record"),
        (lambda: changed(seed="3"), "seed='3' must be of type int"),
        (lambda: changed(seed=True), "seed=True must be of type int"),
        (lambda: changed(origin="guessed"), "origin='guessed' must be one of measured, compiled, simulated, published"),
        (lambda: changed(device={}), "device={} must have a 'name'"),
        (lambda: changed(metrics={"ttft_s": "fast"}), r"metrics\['ttft_s'\]='fast' must be a finite number or null"),
        (lambda: changed(metrics={"ttft_s": math.nan}), r"metrics\['ttft_s'\]=nan must be"),
        (lambda: changed(metrics={"is_s": True}), r"metrics\['is_s'\]=True must be"),
        (lambda: changed(metrics={"latency": 1.0}), r"metrics\['latency'\]: the name carries no unit"),
        (lambda: changed(metrics={"latency_ms": 1.0}), r"metrics\['latency_ms'\]: the name carries no unit"),
        (lambda: changed(series={"t": [1]}), r"series\['t'\] must map"),
        (lambda: changed(series={"t": {"a": 1}}), r"series\['t'\]\['a'\] must be a list"),
        (lambda: changed(series={"t": {"a": [math.inf]}}), r"series\['t'\]\['a'\] holds inf"),
        (lambda: changed(series={"t": {"a": [1], "b": []}}), r"series\['t'\] has columns of different lengths"),
        (lambda: changed(config={"x": object()}), "config cannot be written as JSON"),
    ],
)
def test_an_invalid_record_names_the_offending_key(record, message):
    with pytest.raises(ValueError, match=message):
        validate_record(record() if callable(record) else record)


def test_an_invalid_record_is_neither_written_nor_read(tmp_path):
    path = tmp_path / "bad.json"
    with pytest.raises(ValueError, match="origin"):
        write_record(changed(origin="x"), path)
    assert not path.exists()
    path.write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json: Expecting"):
        read_record(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json: key 'experiment' is missing"):
        read_record(path)
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "none.json")


def test_a_command_names_no_folder_of_this_machine():
    root = pathlib.Path("/somewhere/checkout")
    argv = [
        "/somewhere/checkout/experiments/offline.py",
        "--sweep=a=1,2;b=3",
        "--trace=/elsewhere/data/conv.csv.gz",
        "--out=/somewhere/checkout/experiments/results/x.json",
        "/elsewhere/y",
    ]
    assert records.command_line(argv, root) == (
        "python -m experiments.offline '--sweep=a=1,2;b=3' --trace=conv.csv.gz --out=experiments/results/x.json y"
    )
    assert records.command_line(["/usr/bin/pytest", "-x"], root) == "pytest -x"


def git(folder, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_dirty_when_a_tracked_file_changed(tmp_path):
    assert records._commit(tmp_path) == "unknown"
    git(tmp_path, "init", "--quiet")
    assert records._commit(tmp_path) == "unknown"
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "--quiet", "-m", "a")
    assert records._commit(tmp_path) == git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "a").write_text("2")
    assert records._commit(tmp_path) == git(tmp_path, "rev-parse", "HEAD") + "-dirty"
