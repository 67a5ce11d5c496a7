"""Throughput and latency of answering many prompts of ragged lengths: three ways to do the same work, same tokens.

    single    `generate` for one prompt after another
    padded    `generate` for batches of prompts sorted by length, left-padded; each runs until its longest answer is
              complete. Every size of --batch is run, and the one with the most tokens per second counts.
    batched   `generate_batch`: continuous batching

All requests are there at the start. Lengths of prompts and answers are exponential. TTFT is the time from the start
to a request's first token, TPOT the time per token after that; tokens per second of CPU time are steadier on a busy
machine. The tokens of all ways are compared in the same run; if they differ, no figure is printed and the exit code is
1. The last line of output is JSON.

    python benchmarks/serving.py --model qwen3_next-tiny
    python benchmarks/serving.py --config qwen3_next-80b --layers 4 --set num_experts=16 --set vocab_size=8192
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass, field
from math import ceil

import torch
import transformers
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import hf_gdn
from hf_gdn.eval.machine import made_with
from hf_gdn.loading.models import DTYPES, Source, load
from hf_gdn.patches import batching


@dataclass
class Request:
    """A prompt, and how many new tokens are wanted."""

    prompt: list[int]
    new: int


@dataclass
class Outcome:
    """What one way of serving made: the tokens of each request, the seconds of each token, all seconds, CPU seconds."""

    tokens: list[list[int]] = field(default_factory=list)
    times: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def row(self) -> dict[str, float]:
        """The figures of a table's row; times in milliseconds."""
        count, first = sum(map(len, self.tokens)), [1e3 * times[0] for times in self.times]
        later = [1e3 * (t[-1] - t[0]) / (len(t) - 1) for t in self.times if len(t) > 1]
        row = {"tokens_per_s": count / self.seconds, "requests_per_s": len(self.tokens) / self.seconds}
        if self.cpu_seconds:
            row["tokens_per_cpu_s"] = count / self.cpu_seconds
        for name, values in (("ttft_ms", first), ("tpot_ms", later)):
            cuts = statistics.quantiles(values, n=100, method="inclusive")
            row |= {f"{name}_p50": cuts[49], f"{name}_p90": cuts[89], f"{name}_p99": cuts[98]}
        return row


class Clock(LogitsProcessor):
    """Notes when each token of a `generate` call is about to be chosen."""

    def __init__(self, start: float) -> None:
        self.start, self.times = start, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - self.start)
        return scores


def requests_of(count: int, mean: float, limit: int, vocabulary: int, seed: int) -> list[Request]:
    """Random prompts and answers of exponential lengths, at least 1 and at most `limit` tokens."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.empty(count, 2).exponential_(1 / mean, generator=random).round().clamp(1, limit).int().tolist()
    return [Request(torch.randint(3, vocabulary, (p,), generator=random).tolist(), new) for p, new in lengths]


def greedy(new: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)


def padded(model, requests: list[Request], size: int) -> Outcome:
    """`generate` in batches of `size`, sorted by the length of the prompt. A size of 1 is one after another."""
    out = Outcome([[] for _ in requests], [[] for _ in requests])
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt)) if size > 1 else range(len(requests))
    order, start, cpu = list(order), time.perf_counter(), time.process_time()
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        longest = max(len(requests[i].prompt) for i in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        for row, i in enumerate(rows):
            ids[row, longest - len(requests[i].prompt) :] = torch.tensor(requests[i].prompt)
        mask = (torch.arange(longest) >= longest - torch.tensor([[len(requests[i].prompt)] for i in rows])).long()
        clock, new = Clock(start), max(requests[i].new for i in rows)
        made = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=greedy(new),
            logits_processor=[clock],
        )
        for row, i in enumerate(rows):
            out.tokens[i] = made[row, longest : longest + requests[i].new].tolist()
            out.times[i] = clock.times[: requests[i].new]
    out.seconds, out.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    return out


def batched(model, requests: list[Request], settings: ContinuousBatchingConfig) -> Outcome:
    """Continuous batching. The manager is made and started before the clock is."""
    with model.continuous_batching_context_manager(greedy(1), continuous_batching_config=settings) as manager:
        manager.add_request([3], max_new_tokens=2, eos_token_id=-1)
        while manager.get_result(timeout=0.1) is None:
            pass
        start, cpu = time.perf_counter(), time.process_time()
        names = [
            manager.add_request(r.prompt, max_new_tokens=r.new, eos_token_id=-1, record_timestamps=True)
            for r in requests
        ]
        found = {}
        while len(found) < len(names):
            made = manager.get_result(timeout=0.1)
            if made is not None and made.is_finished():
                found[made.request_id] = made
            elif made is None and not manager.is_running():
                raise RuntimeError("the manager stopped before all requests were finished")
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    failed = [made.error for made in found.values() if made.error]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")
    tokens = [found[name].generated_tokens for name in names]
    return Outcome(tokens, [[t - start for t in found[name].timestamps] for name in names], seconds, cpu_seconds)


def blocks_for(model, requests: list[Request], page_size: int) -> int:
    """`num_blocks` of a cache that has room for all requests at once, and to spare."""
    config, tokens = model.config.get_text_config(), sum(len(r.prompt) + r.new for r in requests)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    block = config.num_hidden_layers * page_size * 2 * config.num_key_value_heads * head_dim * model.dtype.itemsize
    states = config.layer_types.count("linear_attention") * sum(batching.states_of(config).bytes(model.dtype))
    return 2 * (tokens // page_size + 2 * len(requests) + ceil(states * len(requests) / block))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, hub name or embedded model")
    parser.add_argument("--config", help="instead of --model: random weights at this config")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--mean", type=float, default=128.0, help="mean length of prompts and of answers")
    parser.add_argument("--limit", type=int, default=512, help="longest prompt and answer")
    parser.add_argument("--batch", default="4,8,16,32", help="sizes of padded batches")
    parser.add_argument("--max-batch-tokens", type=int, default=256, help="tokens of a step of continuous batching")
    parser.add_argument("--num-blocks", type=int, default=None, help="see ContinuousBatchingConfig")
    parser.add_argument("--page-size", type=int, default=32)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if (given.model is None) == (given.config is None):
        parser.error("expected --model or --config")
    if given.requests < 2:
        parser.error(f"expected at least two --requests, of which percentiles are taken, got {given.requests}")
    if given.threads:
        torch.set_num_threads(given.threads)
    transformers.logging.set_verbosity_error()  # no answer ends early, which `generate` warns of
    hf_gdn.patch(backend=given.backend)
    device = torch.device(given.device)
    source = Source(given.model or given.config, given.model is None, given.layers, tuple(given.set))
    loaded = load(source, device, DTYPES[given.dtype])
    model, requests = (
        loaded.model,
        requests_of(given.requests, given.mean, given.limit, loaded.config.vocab_size, given.seed),
    )
    settings = ContinuousBatchingConfig(
        page_size=given.page_size,
        num_blocks=given.num_blocks or blocks_for(model, requests, given.page_size),
        max_batch_tokens=given.max_batch_tokens,
        allow_block_sharing=False,
    )
    with torch.no_grad():
        padded(model, requests[:2], 2)  # kernels are compiled and checked before the clock starts
        outcomes = {"single": padded(model, requests, 1)}
        sizes = [int(size) for size in given.batch.split(",")]
        outcomes |= {f"padded {size}": padded(model, requests, size) for size in sizes}
        outcomes["batched"] = batched(model, requests, settings)
    wanted = outcomes["single"].tokens
    for name, out in outcomes.items():
        differ = [i for i, (got, want) in enumerate(zip(out.tokens, wanted)) if got != want]
        if differ:
            print(f"{name}: the tokens of requests {differ} differ from those of single; no figures", file=sys.stderr)
            return 1
    rows = {name: out.row() for name, out in outcomes.items()}
    best = max((name for name in rows if name.startswith("padded")), key=lambda name: rows[name]["tokens_per_s"])
    print(f"{loaded.source.label}, {len(requests)} requests, {sum(map(len, wanted))} new tokens, the same every way")
    times = ("TTFT p50", 10), ("p90", 8), ("p99", 8), ("TPOT p50", 10), ("p90", 8), ("p99", 8)
    heads = ("tokens/s", 10), ("tokens/CPU s", 14), ("requests/s", 12), *times
    print(f"{'':<12}" + "".join(f"{head:>{width}}" for head, width in heads))
    for name, row in rows.items():
        cells = [row[f"{kind}_ms_p{cut}"] for kind in ("ttft", "tpot") for cut in (50, 90, 99)]
        texts = [f"{cell:>{width}.0f}" for cell, width in zip(cells[:3], (10, 8, 8))]
        texts += [f"{cell:>{width}.1f}" for cell, width in zip(cells[3:], (10, 8, 8))]
        print(
            f"{name:<12}{row['tokens_per_s']:>10.1f}{row['tokens_per_cpu_s']:>14.1f}{row['requests_per_s']:>12.2f}{''.join(texts)}"
        )
    ratio = rows["batched"]["tokens_per_s"] / rows[best]["tokens_per_s"]
    cpu_ratio = rows["batched"]["tokens_per_cpu_s"] / max(rows[n]["tokens_per_cpu_s"] for n in rows if n != "batched")
    print(f"batched: {ratio:.2f} times the tokens per second of {best}, {cpu_ratio:.2f} per CPU second; times in ms")
    peak = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    print(
        json.dumps(
            {
                **made_with("serving", " ".join(["python", *sys.argv]), device),
                "model": loaded.source.label,
                "requests": len(requests),
                "new_tokens": sum(map(len, wanted)),
                "rows": rows,
                "best_padded": best,
                "batched_over_best_padded": ratio,
                "batched_over_best_per_cpu_second": cpu_ratio,
                "peak_mib_of_process": peak / 2**20,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
