"""What does the model say?  One prompt streamed to the terminal, or a file of requests answered in one batch.

    python -m experiments.generate --prompt "Why is the sky blue?"
    python -m experiments.generate --requests requests.jsonl --out answers.jsonl [--record run.json]

The format of the lines is in `experiments/request_lines.py`.  Answers come in the order of the requests; a bad line is
answered by `{id, error}` and the others are served.  `--record` also writes a record of the run's speed.
"""

import pathlib
import sys
import time

from absl import flags

from experiments import request_lines, serving, serving_flags, summary
from experiments.record import make_record, write_record
from nanojax.config import SamplingParts
from nanojax.live_request import Event
from nanojax.metrics import summarize
from nanojax.serve import Engine
from nanojax.weights import LoadedModel
from nanojax.workload import Request, SamplingParams

NAME = "generate"


def define_flags(values: flags.FlagValues) -> None:
    serving_flags.define(values)
    flags.DEFINE_string("prompt", None, "The user's message.", flag_values=values)
    flags.DEFINE_bool("raw", False, "Take --prompt as it is, without the chat template.", flag_values=values)
    flags.DEFINE_string("requests", None, "JSONL file of requests.", flag_values=values)
    flags.DEFINE_string("out", None, "JSONL file for the answers; the terminal if not given.", flag_values=values)
    flags.DEFINE_string("record", None, "File for a record of the run, with --requests.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Answers `--prompt` or `--requests`."""
    with serving_flags.one_line_errors():
        if (values.prompt is None) == (values.requests is None):
            raise ValueError("give either --prompt or --requests")
        data = b"" if values.requests is None else pathlib.Path(values.requests).read_bytes()
        if values.out is not None:  # said before the work, not after
            pathlib.Path(values.out).open("a").close()
        loaded = serving.load(values)
        engine = serving.engine(values, loaded, SamplingParts() if values.prompt is None else None)
        given = {} if values.max_tokens is None else {"max_tokens": values.max_tokens}
        how = SamplingParams(temperature=values.temperature, seed=values.seed, **given)
        if values.prompt is not None:
            text = values.prompt if values.raw else loaded.chat([{"role": "user", "content": values.prompt}])
            request = Request("prompt", loaded.tokenizer.encode(text), how)
            engine.check(request)
    if values.prompt is not None:
        _stream(engine, request)
    else:
        _answer_file(values, loaded, engine, data, how)


def _stream(engine: Engine, request: Request) -> None:
    """Prints text as it comes, then how fast it came."""
    engine.warm_up()

    def on_event(event: Event) -> None:
        print(event.text, end="", flush=True)

    (output,) = engine.generate([request], on_event)
    record = output.record
    first_s = record.first_token_s - record.arrival_s
    rate = (record.output_len - 1) / max(record.finish_s - record.first_token_s, 1e-9)
    print()
    what = f"{record.output_len} tokens ({output.finish_reason})"
    print(f"{what}, the first after {first_s:.2f} s, then {rate:.1f} tokens/s", file=sys.stderr)


def _answer_file(
    values: flags.FlagValues, loaded: LoadedModel, engine: Engine, data: bytes, defaults: SamplingParams
) -> None:
    lines = request_lines.parse_requests(data, loaded.tokenizer, loaded.chat, engine.check, defaults)
    requests = [line.request for line in lines if line.request is not None]
    start_s = time.perf_counter()
    engine.warm_up()
    compile_s = time.perf_counter() - start_s
    with summary.progress(len(requests), {}) as on_event:
        outputs = {output.request_id: output for output in engine.generate(requests, on_event)}
    outputs_by_line = (None if line.request is None else outputs[line.request.request_id] for line in lines)
    answers = "".join(map("{}\n".format, map(request_lines.format_line, lines, outputs_by_line)))
    with serving_flags.one_line_errors():
        if values.out is None:
            sys.stdout.write(answers)
        else:
            pathlib.Path(values.out).write_text(answers, encoding="utf-8")
    print(f"{len(requests)} answered, {len(lines) - len(requests)} refused", file=sys.stderr)
    if requests:
        metrics = summarize(engine.records, engine.steps, num_pages=engine.config.num_pages)
        print(f"{metrics['total_tokens_per_s']:.1f} tokens/s in and out", file=sys.stderr)
        if values.record is not None:
            config = serving.describe(values, loaded) | {"requests": pathlib.Path(values.requests).name}
            metrics |= {"compile_s": compile_s}
            write_record(make_record(NAME, "measured", metrics=metrics, config=config, seed=values.seed), values.record)


if __name__ == "__main__":
    serving_flags.launch(define_flags, run)
