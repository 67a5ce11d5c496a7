"""How a model reads on and on: perplexity along one long stream, with attention sinks and otherwise.

Ways of reading, all on the same tokens:

- ``fresh``: overlapping windows of the context the model was trained on, every token with at least half of it before
  it: how well the model does at its training length on these very tokens, which the others are compared with.
- ``sinks``: `SinkCache`, context tokens in full-attention layers, linear layers going on.
- ``window``: the same without sinks.
- ``dense``: transformers' own cache, which keeps everything, beyond the training length.
- ``re-read``: a sliding window computed anew for every token, on a sample of places: the slow reference.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from ..caches import SinkCache, snapshots
from ..errors import UserError
from ..loading import models, texts
from ..loading.models import Loaded, Source
from ..patches import patch, patched
from ..upstream import cache_names
from . import forward_modes, machine, plots, progress, resume
from .tables import number

BINS, PIECE = 50, 256
ABOUT = {
    "fresh": "windows at the training length",
    "sinks": "attention sinks",
    "window": "window without sinks",
    "dense": "everything kept",
    "re-read": "window read anew for every token",
}


class PlainWindow(SinkCache):
    """A window without sinks, for comparison: models whose first tokens matter fall apart on it."""

    least_sinks = 0


@dataclass(frozen=True)
class StreamOptions:
    """What is read and kept.

    Args:
        tokens: length of the stream at most.
        context: tokens that full-attention layers keep, sinks among them; the length that the model was trained on.
        sinks: how many of them are first ones.
        samples: places where the window is read anew.
        timed: tokens that are read one at a time for the tokens per second.
    """

    tokens: int = 50_000
    context: int = 512
    sinks: int = 4
    samples: int = 200
    timed: int = 200


def check(options: StreamOptions) -> None:
    """Raise UserError for options that make no sense."""
    if not 1 <= options.sinks < options.context:
        raise UserError(f"--sinks must be between 1 and --context less one, got {options.sinks} of {options.context}")
    if options.tokens < 2 * options.context:
        raise UserError(f"--tokens must be at least twice --context, got {options.tokens} of {options.context}")


# ------------------------------------------------------------------------------------------------------ ways of reading


@torch.no_grad()
def through(model: Any, ids: Tensor, cache: Any, step: Callable[[int], None]) -> Tensor:
    """Log-probabilities ``[L - 1]`` of tokens ``[L]`` read in pieces through a cache: of all but the first."""
    found = []
    for at in range(0, len(ids) - 1, PIECE):
        piece, targets = ids[at : at + PIECE][: len(ids) - 1 - at], ids[at + 1 : at + 1 + PIECE]
        logits = model(piece[None].to(model.device), **cache_names.as_argument(cache)).logits
        found.append(forward_modes.log_probs(logits, targets[None])[0])
        step(len(piece))
    return torch.cat(found)


@torch.no_grad()
def fresh(model: Any, ids: Tensor, context: int, step: Callable[[int], None]) -> Tensor:
    """The same in windows of `context` that overlap by half."""
    found = torch.full((len(ids) - 1,), math.nan, dtype=torch.float64)
    windows = texts.windows(ids, context, context // 2)
    for window, begin, first in zip(windows.ids, windows.begin.tolist(), windows.first.tolist()):
        logits = model(window[None].to(model.device), use_cache=False).logits
        scored = forward_modes.log_probs(logits[:, first - 1 : -1], window[None, first:])[0]
        found[begin + first - 1 : begin + context - 1] = scored
        step(len(scored))
    return found


@torch.no_grad()
def re_read(model: Any, ids: Tensor, places: Tensor, context: int, step: Callable[[int], None]) -> Tensor:
    """The same at places ``[N]`` alone, each with the `context` tokens before it and nothing else."""
    found = torch.full((len(ids) - 1,), math.nan, dtype=torch.float64)
    for place in places.tolist():
        before = ids[max(0, place + 1 - context) : place + 1]
        logits = model(before[None].to(model.device), use_cache=False).logits[:, -1:]
        found[place] = forward_modes.log_probs(logits, ids[None, place + 1 : place + 2])[0, 0]
        step(1)
    return found


@torch.no_grad()
def seconds_per_token(read: Callable[[int], Any], tokens: int, device: torch.device) -> float:
    """Median time of ``read(i)``, which reads one token, after a tenth for warming up."""
    times = []
    for i in range(tokens + tokens // 10):
        begin = time.perf_counter()
        read(i)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return torch.tensor(times[tokens // 10 :]).median().item()


# ------------------------------------------------------------------------------------------------------------ a measure


def measure(loaded: Loaded, ids: Tensor, options: StreamOptions, bars: progress.Bars) -> dict[str, Any]:
    """Read a stream ``[L]`` in all ways.

    Returns:
        "model", "tokens", "ends" (of the stretches that perplexities are of), "floor" (nats), and "ways": by name
        "perplexity", "stretches" (perplexity of each), "ratio" to ``fresh`` on the same tokens, "worst" (the stretch
        farthest from it), "bytes" (held by the cache at the end) and "tokens_s" (one at a time, at the end).
    """
    model, context = loaded.model, options.context
    ids = ids[: options.tokens + 1]
    if len(ids) <= 2 * context:
        raise UserError(f"the text has {len(ids)} tokens; a stream takes more than twice --context {context}")
    length = len(ids) - 1
    places = torch.linspace(context, length - 1, options.samples).round().long().unique()
    steps = bars.add(f"{loaded.source.label}: stream", 4 * length + len(places) + options.timed * 4, "tokens")
    caches = {
        "sinks": SinkCache(model.config, options.sinks, context - options.sinks),
        "window": PlainWindow(model.config, 0, context),
        "dense": DynamicCache(config=model.config),
    }
    found, held, rate = {"fresh": fresh(model, ids, context, steps)}, {}, {}
    for name, cache in caches.items():
        found[name] = through(model, ids, cache, steps)
        held[name] = cache.nbytes if isinstance(cache, SinkCache) else snapshots.read(cache).nbytes
    found["re-read"] = re_read(model, ids, places, context, steps)
    for name, cache in caches.items():

        def one(i: int, cache: Any = cache) -> Any:
            steps(1)
            return model(ids[None, i : i + 1].to(model.device), **cache_names.as_argument(cache))

        rate[name] = 1 / seconds_per_token(one, options.timed, model.device)
    last = ids[None, -context:].to(model.device)
    few = max(5, options.timed // 10)
    rate["re-read"] = 1 / seconds_per_token(lambda _: model(last, use_cache=False, logits_to_keep=1), few, model.device)
    ends = torch.linspace(0, length, min(BINS, length // 100) + 1).round().long().tolist()
    stretches = list(itertools.pairwise(ends))
    ways = {}
    for name, values in found.items():
        scored = values.isfinite()
        by_stretch = [_ratio(values[a:b], found["fresh"][a:b]) for a, b in stretches]
        ways[name] = {
            "perplexity": forward_modes.perplexity(values[scored]),
            "scored": int(scored.sum()),
            "ratio": _ratio(values, found["fresh"]),
            "stretches": [forward_modes.perplexity(values[a:b]) if scored[a:b].all() else None for a, b in stretches],
            "worst": max(by_stretch, key=lambda r: abs(math.log(r))) if scored.all() else None,
            "bytes": held.get(name),
            "tokens_s": rate.get(name),
        }
    return {"model": loaded.source.label, "tokens": length, "ends": ends[1:], "ways": ways}


def _ratio(values: Tensor, reference: Tensor) -> float:
    """Perplexity over the reference's, on the tokens that both have."""
    both = values.isfinite() & reference.isfinite()
    return math.exp((reference[both] - values[both]).mean().item()) if both.any() else math.nan


# --------------------------------------------------------------------------------------------------------------- output


def table(result: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of strings."""
    header: tuple[str, ...] = (
        "read with",
        "tokens scored",
        "perplexity",
        "to fresh",
        "worst stretch",
        "cache, KiB",
        "tokens/s",
    )
    rows: list[tuple[str, ...]] = []
    for name, way in result["ways"].items():
        rows.append(
            (
                f"{name}: {ABOUT[name]}",
                f"{way['scored']:,}",
                number(way["perplexity"]),
                f"{way['ratio']:.3f}",
                "" if way["worst"] is None else f"{way['worst']:.3f}",
                "" if way["bytes"] is None else f"{way['bytes'] / 1024:,.0f}",
                "" if way["tokens_s"] is None else number(way["tokens_s"], 3),
            )
        )
    return header, rows


def main(
    sources: tuple[Source, ...],
    paths: tuple[str, ...],
    field: str,
    options: StreamOptions,
    device: str | None,
    dtype: str | None,
    output: str,
    quiet: bool,
    command: str,
) -> int:
    """Read the stream with every model; print tables, write stream.json and stream.svg. Returns 0, the exit code."""
    check(options)
    place = models.pick_device(device)
    text = texts.read_files(paths, field) if paths else texts.embedded()
    folder = resume.prepare(output)
    results = []
    with progress.bars(not quiet) as bars, patched():
        for source in sources or tuple(Source(name) for name in models.embedded()):
            loaded = models.load(source, place, models.pick_dtype(dtype, source.name, place))
            patch(loaded.families)  # which raises where transformers does not fit them
            results.append(measure(loaded, texts.tokenize(loaded.tokenizer, text), options, bars))
    head = machine.made_with("stream", command, place)
    report = {**head, "text": text.source, "options": asdict(options), "results": results}
    for name, made in (
        ("stream.json", json.dumps(report, indent=1) + "\n"),
        ("stream.svg", plots.perplexity_along_stream(results)),
    ):
        resume.put(Path(folder) / name, lambda path, made=made: path.write_text(made, encoding="utf-8"))
    console = machine.console()
    for result in results:
        header, rows = table(result)
        title = f"{result['model']}: {result['tokens']:,} tokens of {text.source}"
        sheet = Table(*header, title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for row in rows:
            sheet.add_row(*row)
        console.print(sheet)
    console.print(f"wrote {output}/stream.json, {output}/stream.svg", highlight=False, markup=False)
    return 0
