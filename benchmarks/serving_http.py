"""Throughput and latency of a running `transformers serve`: many streamed completions at once, over HTTP.

Lengths of prompts and answers are exponential, as in `serving.py`, but prompts are random letters, since the server
takes texts. All requests are sent at the start. TTFT is the time from the start to the first piece of a text, TPOT the
time per token after that. Every answer is compared with that of `generate` for its prompt alone, in this process; if
one differs, no figure is printed and the exit code is 1. The last line of output is JSON.

    hf-gdn run -m transformers.cli.transformers serve FOLDER --continuous-batching --device cpu --dtype float32 \\
        --port 8000
    python benchmarks/serving_http.py --http http://localhost:8000 --model FOLDER
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import string
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import torch
from serving import Outcome
from transformers import AutoTokenizer

import hf_gdn
from hf_gdn.eval.machine import made_with
from hf_gdn.loading.models import ASSETS, DTYPES, Source, load


def prompts_of(count: int, mean: float, limit: int, seed: int) -> list[tuple[str, int]]:
    """Random texts, and how many new tokens are wanted: both of exponential lengths, from 1 to `limit`."""
    chance = random.Random(seed)

    def length() -> int:
        return max(1, min(limit, round(chance.expovariate(1 / mean))))

    return [("".join(chance.choices(string.ascii_lowercase + " ", k=length())), length()) for _ in range(count)]


def stream(address: str, model: str, prompt: str, new: int, start: float) -> tuple[str, list[float]]:
    """The streamed answer to a prompt, and the seconds from the start to its first and to its last piece.

    Raises:
        RuntimeError: the server answered with an error, or ended the stream early.
    """
    where = urlsplit(address)
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=600)
    body = {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer, text, times, ended = connection.getresponse(), "", [], False
    if answer.status != 200:
        raise RuntimeError(f"status {answer.status}: {answer.read(500)!r}")
    for line in answer:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        piece = json.loads(line[6:])
        if "error" in piece:
            raise RuntimeError(piece["error"])
        text += piece["choices"][0]["text"]
        ended = piece["choices"][0].get("finish_reason") is not None
        if not ended:
            times.append(time.perf_counter() - start)
    if not ended:
        raise RuntimeError(f"the stream ended after {len(text)} characters, without a reason")
    return text, [times[0], times[-1]] if times else []


def generated(model, tokenizer, prompt: str, new: int) -> tuple[str, int]:
    """The answer of `generate` to a prompt alone, and its number of tokens."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(out, skip_special_tokens=True), len(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--http", required=True, help="address of the server, as http://localhost:8000")
    parser.add_argument("--model", required=True, help="the model that it serves: folder, hub name or embedded model")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--mean", type=float, default=128.0, help="mean characters of prompts and tokens of answers")
    parser.add_argument("--limit", type=int, default=512, help="longest prompt and answer")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the server's model")
    parser.add_argument("--device", default="cpu", help="for `generate`, in this process")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    name = str(ASSETS / given.model) if (ASSETS / given.model).is_dir() else given.model
    asked = prompts_of(given.requests, given.mean, given.limit, given.seed)
    stream(given.http, name, "a", 1, 0.0)  # the server loads the model with the first request
    start = time.perf_counter()
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda x: stream(given.http, name, *x, start), asked))
    seconds = time.perf_counter() - start

    hf_gdn.patch()
    device = torch.device(given.device)
    model = load(Source(given.model, False, None, ()), device, DTYPES[given.dtype]).model
    tokenizer, out = AutoTokenizer.from_pretrained(name), Outcome(seconds=seconds)
    differ = []
    for i, ((prompt, new), (text, times)) in enumerate(zip(asked, answers)):
        wanted, count = generated(model, tokenizer, prompt, new)
        differ += [i] if text != wanted else []
        out.tokens.append([0] * count)
        if times:  # those of the first and last token are all that a row needs
            out.times.append([times[0]] * (count - 1) + [times[-1]])
    if differ:
        print(f"the answers to requests {differ} differ from those of generate; no figures", file=sys.stderr)
        return 1
    row, tokens = out.row(), sum(map(len, out.tokens))
    print(f"{Path(name).name} at {given.http}, {len(asked)} requests, {tokens} new tokens, as those of generate")
    print("  ".join(f"{key} {value:.1f}" for key, value in row.items()))
    command = " ".join(["python", *sys.argv])
    print(
        json.dumps(
            {**made_with("serving_http", command, device), "requests": len(asked), "new_tokens": tokens, "row": row}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
