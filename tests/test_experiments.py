"""Does each experiment run on a tiny model and leave a valid record, and does bad input get one clear line?"""

import json
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags

from experiments import breakdown, generate, offline_throughput, online_latency, request_lines, serving, serving_flags
from experiments.record import read_record
from nanojax.weights.chat import TEMPLATES
from nanojax.workload import SamplingParams

SMALL = ("--smoke", "--token_budgets=32")
ROOT = pathlib.Path(__file__).parents[1]
TOKENIZER = serving.byte_tokenizer(257)


def parsed(experiment, *arguments) -> flags.FlagValues:
    values = flags.FlagValues()
    experiment.define_flags(values)
    values(["experiment", *map(str, arguments)])
    return serving_flags.with_smoke(values)


def test_offline_throughput_writes_a_record_and_says_where_the_time_went(tmp_path, capsys):
    offline_throughput.run(parsed(offline_throughput, *SMALL, "--breakdown", f"--out={tmp_path}"))
    record = read_record(tmp_path / "offline_throughput.json")
    assert record["origin"] == "measured"
    assert record["metrics"]["num_requests"] == serving_flags.SMOKE["num_requests"]
    assert sum(record["metrics"][f"time_fraction_{part}"] for part in breakdown.PARTS) == pytest.approx(1)
    assert all(record["metrics"][f"part_s_{part}_32"] > 0 for part in ("step", "dense", "attention", "scheduling"))
    assert (tmp_path / "offline_throughput.png").stat().st_size > 10_000
    text = capsys.readouterr().out
    assert "question-01: What causes the tides" in text
    assert "time to first token" in text


def test_a_sweep_writes_a_record_per_point_a_table_and_a_figure(tmp_path):
    sweep = "--sweep=max_tokens=2,5"
    records = offline_throughput.run(
        parsed(offline_throughput, *SMALL, "--num_requests=2", "--repeats=2", f"--out={tmp_path}", sweep)
    )
    assert [record["metrics"]["num_output_tokens"] for record in records] == [4, 10]
    assert read_record(tmp_path / "offline_throughput-max_tokens=5.json") == records[1]
    table = read_record(tmp_path / "offline_throughput-sweep.json")["series"]["sweep"]
    assert table["max_tokens"] == [2, 5]
    assert table["num_repeats"] == [2, 2]
    assert (tmp_path / "offline_throughput-sweep.png").exists()


def test_a_sweep_of_no_metric_ends_with_its_first_run(tmp_path, capsys):
    sweep = ("--sweep=max_tokens=2,5", "--sweep_metric=tokens")
    with pytest.raises(SystemExit, match=r"--sweep_metric=tokens is none of .*total_tokens_per_s"):
        offline_throughput.run(parsed(offline_throughput, *SMALL, "--num_requests=2", f"--out={tmp_path}", *sweep))
    assert "max_tokens=5" not in capsys.readouterr().out


def test_online_latency_writes_a_row_per_rate(tmp_path):
    online_latency.run(parsed(online_latency, *SMALL, f"--out={tmp_path}"))
    record = read_record(tmp_path / "online_latency.json")
    latency = record["series"]["latency"]
    assert latency["request_rate_per_s"] == [20, 40]
    assert latency["num_requests"] == [5, 10]
    assert all(ms > 0 for ms in latency["ttft_s_mean"])
    assert (tmp_path / "online_latency.png").exists()
    assert (tmp_path / "online_latency-ttft.png").exists()


def test_recorded_times_are_replayed_faster_by_the_speed(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n3,5,2\n4,6,3\n9,7,1\n")
    values = parsed(
        online_latency, *SMALL, "--arrival=recorded", f"--trace={trace}", "--num_requests=3", "--duration_s=2"
    )
    requests = online_latency.arrivals(values, serving.load(values), 4.0)
    assert [request.arrival_s for request in requests] == [0.0, 0.25, 1.5]
    assert [(len(r.prompt_ids), r.sampling.max_tokens) for r in requests] == [(5, 6), (6, 6), (7, 6)]


def test_sharegpt_texts_become_requests_with_the_length_of_the_recorded_answer(tmp_path, monkeypatch):
    def turns(question, answer):
        return {"id": "x", "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}

    path = tmp_path / "texts.json"
    path.write_text(
        json.dumps([turns("why?", "so"), turns("x" * 2000, "long"), turns("", "empty"), turns("who?", "you!")])
    )
    monkeypatch.setattr("nanojax.workload.find_sharegpt", lambda: path)
    values = parsed(offline_throughput, *SMALL, "--trace=sharegpt_texts")
    values.max_tokens = None
    work = serving.work(values, serving.load(values), 2)
    assert [(len(r.prompt_ids), r.sampling.max_tokens, r.sampling.ignore_eos) for r in work.requests] == [
        (4, 2, True),
        (4, 4, True),
    ]
    assert work.num_dropped == 1
    with pytest.raises(ValueError, match="'sharegpt_texts' has 2 requests"):
        serving.work(values, serving.load(values), 3)


def test_a_prompt_is_streamed(capsys):
    generate.run(parsed(generate, *SMALL, "--prompt=Hello", "--max_tokens=3"))
    captured = capsys.readouterr()
    assert "3 tokens (length)" in captured.err
    assert captured.out


def test_request_files_are_answered_line_by_line_and_bad_lines_harm_nobody(tmp_path, capsys):
    good = [
        {"id": "a", "prompt": "abc", "max_tokens": 4},
        {"id": 7, "prompt_ids": [1, 2, 3], "max_tokens": 2, "temperature": 0.7, "seed": 5, "logprobs": True},
        {"id": "c", "messages": [{"role": "user", "content": "abc"}], "max_tokens": 4},
    ]
    lines = [json.dumps(good[0]), "{not json", json.dumps(good[1]), json.dumps({"id": "long", "prompt": "x" * 5000})]
    lines += ["", json.dumps({"id": "odd", "prompt_ids": [1, 300]}), json.dumps(good[2]), json.dumps(good[0])]
    requests, answers, record = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "record.json"
    requests.write_text("\n".join(lines))
    generate.run(parsed(generate, *SMALL, f"--requests={requests}", f"--out={answers}", f"--record={record}"))
    first, broken, second, long, odd, third, twice = map(json.loads, answers.read_text().splitlines())
    assert first["id"] == "a"
    assert first == {**first, "finish_reason": "length", "logprobs": None}
    assert len(first["token_ids"]) == 4
    assert first["token_ids"] == third["token_ids"]
    assert (second["id"], len(second["logprobs"])) == (7, 2)
    assert broken == {"id": None, "error": broken["error"]}
    assert broken["error"].startswith("line 2: not JSON")
    assert long["id"] == "long"
    assert "exceeds max_len=1280" in long["error"]
    assert "prompt token 300 is outside the vocabulary [0, 257)" in odd["error"]
    assert twice == {"id": "a", "error": "line 8: id 'a' is used twice"}
    assert read_record(record)["metrics"]["num_requests"] == 3
    assert "3 answered, 4 refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1, 2]", "a JSON object is needed, got [1, 2]"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": "x"}', "id=None must be a text or an integer"),
        (b'{"id": true, "prompt": "x"}', "id=True must be a text or an integer"),
        (b'{"id": "a"}', "one of prompt, prompt_ids, messages is needed, got none"),
        (b'{"id": "a", "prompt": "x", "prompt_ids": [1]}', "got prompt and prompt_ids"),
        (b'{"id": "a", "prompt": "x", "topk": 3}', "key 'topk' is unknown; known are id, prompt,"),
        (b'{"id": "a", "prompt": 3}', "prompt=3 must be a text"),
        (b'{"id": "a", "prompt": "\\ud800"}', "not valid Unicode at character 0"),
        (b'{"id": "a", "prompt_ids": []}', "the prompt has 0 tokens"),
        (b'{"id": "a", "prompt_ids": [1.5]}', "prompt_ids=[1.5] must be a list of integers"),
        (b'{"id": "a", "messages": ["x"]}', "messages=['x'] must be a list of objects"),
        (b'{"id": "a", "messages": [{"role": "robot", "content": "x"}]}', "role 'robot'; expected one of"),
        (b'{"id": "a", "messages": []}', "at least one message"),
        (b'{"id": "a", "prompt": "x", "max_tokens": 0}', "max_tokens=0 must be >= 1"),
        (b'{"id": "a", "prompt": "x", "max_tokens": "9"}', "max_tokens='9' must be an integer"),
        (b'{"id": "a", "prompt": "x", "temperature": NaN}', "temperature=nan must be finite"),
        (b'{"id": "a", "prompt": "x", "temperature": 1' + b"0" * 400 + b"}", "is too large"),
        (b'{"id": "a", "prompt": "x", "top_p": 0}', "top_p=0.0 must be in (0, 1]"),
        (b'{"id": "a", "prompt": "x", "top_k": 4294967296}', "top_k=4294967296 must be an integer of at most"),
        (b'{"id": "a", "prompt": "x", "seed": -1}', "seed=-1 must be in [0, 2**32)"),
        (b'{"id": "a", "prompt": "x", "stop": [""]}', "stop=('',) must be non-empty strings"),
        (b'{"id": "a", "prompt": "x", "stop": 3}', "stop=3 must be a text or a list of texts"),
        (b'{"id": "a", "prompt": "x", "logprobs": 1}', "logprobs=1 must be true or false"),
    ],
)
def test_a_bad_line_is_told_what_is_wrong_with_it(line, message):
    good = b'{"id": "good", "prompt": "x", "stop": "."}'
    bad, other = request_lines.parse_requests(line + b"\n" + good, TOKENIZER, TEMPLATES["raw"])
    assert bad.request is None
    assert message in (bad.error or "")
    assert other.request is not None
    assert other.request.sampling.stop == (".",)


def test_what_a_line_does_not_say_is_as_the_defaults():
    data = b'{"id": "a", "prompt": "x"}\n{"id": "b", "prompt": "x", "max_tokens": 3, "temperature": 0}'
    defaults = SamplingParams(max_tokens=5, temperature=0.5, seed=7)
    lines = request_lines.parse_requests(data, TOKENIZER, TEMPLATES["raw"], defaults=defaults)
    one, other = (line.request.sampling for line in lines)
    assert one == defaults
    assert other == SamplingParams(max_tokens=3, temperature=0.0, seed=7)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--driver=sync", "--driver=sync: value should be one of <host_sync|dispatch_ahead|device_loop>"),
        ("--model=gpt", "--model=gpt: value should be one of <smollm2|"),
        ("--token_budgets=64,16", "--token_budgets=64,16: must be ascending positive integers"),
        ("--num_slots=0", "--num_slots=0: 0 is not a positive integer"),
        ("--trace=nowhere.csv", "--trace=nowhere.csv: must be one of prompts, "),
        ("--weights=nowhere.gguf", "--weights=nowhere.gguf: must be a file or folder that exists"),
    ],
)
def test_an_unknown_flag_value_is_named_with_what_is_allowed(argument, message):
    with pytest.raises(flags.IllegalFlagValueError, match=re.escape(message)):
        parsed(offline_throughput, argument)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep=driver=host_sync,sync"], "value should be one of <host_sync|"),
        (["--sweep=page_sizes=8"], "there is no flag --page_sizes"),
        (["--sweep=page_size"], "expected flag=value"),
        (["--max_len=100000"], "max_len=100000 exceeds the 2048 tokens"),
        (["--max_tokens=2000"], "exceeds max_len=1280"),
        (["--trace=constant:900,900"], "has 0 requests of at most 1280 tokens, 7 are wanted"),
    ],
)
def test_what_does_not_fit_ends_in_one_line(arguments, message):
    values = parsed(
        offline_throughput, *SMALL, *(["--max_tokens=900"] if "900,900" in arguments[0] else []), *arguments
    )
    with pytest.raises(SystemExit, match="error: ") as caught:
        offline_throughput.run(values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_program_refuses_an_unknown_flag_value_without_a_traceback():
    command = [sys.executable, "-m", "experiments.generate", "--prompt=x", "--admission=hope"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "flag --admission=hope: value should be one of <peak_memory|greedy|" in result.stderr
    assert "Traceback" not in result.stderr


def test_smoke_changes_defaults_only():
    values = parsed(offline_throughput, "--smoke", "--num_slots=3")
    assert (values.num_slots, values.model, values.page_size) == (3, serving_flags.SMOKE_MODEL, 16)
    assert parsed(offline_throughput).model == serving_flags.DEFAULT_MODEL
