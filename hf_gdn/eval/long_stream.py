"""Perplexity along one long stream, with attention sinks and otherwise.

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
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..caches import SinkCache, snapshots
from ..errors import UserError
from ..loading import texts
from ..loading.models import Loaded, check_length
from ..patches import patched
from ..upstream import cache_names
from . import forward_modes, timing
from .options import StreamOptions
from .progress import OnProgress
from .results import STREAM_WAYS, Stream, StreamWay
from .resume import Row, Work

STRETCHES, PIECE = 50, 256


class PlainWindow(SinkCache):
    """A window without sinks, for comparison: models whose first tokens matter fall apart on it."""

    least_sinks = 0


def check(options: StreamOptions) -> None:
    """Raise UserError for options that make no sense."""
    if not 1 <= options.sinks < options.context:
        raise UserError(f"--sinks must be between 1 and --context less one, got {options.sinks} of {options.context}")
    if options.tokens < 2 * options.context:
        raise UserError(f"--tokens must be at least twice --context, got {options.tokens} of {options.context}")


# ------------------------------------------------------------------------------------------------------ ways of reading


@torch.no_grad()
def through(model: Any, ids: Tensor, cache: Any, on_progress: OnProgress) -> Tensor:
    """Log-probabilities ``[L - 1]`` of tokens ``[L]`` read in pieces through a cache: of all but the first."""
    found = []
    for at in range(0, len(ids) - 1, PIECE):
        piece, targets = ids[at : at + PIECE][: len(ids) - 1 - at], ids[at + 1 : at + 1 + PIECE]
        logits = model(piece[None].to(model.device), **cache_names.as_argument(cache)).logits
        found.append(forward_modes.log_probs(logits, targets[None])[0])
        on_progress(len(piece))
    return torch.cat(found)


@torch.no_grad()
def fresh(model: Any, ids: Tensor, context: int, on_progress: OnProgress) -> Tensor:
    """The same in windows of `context` that overlap by half."""
    found = torch.full((len(ids) - 1,), math.nan, dtype=torch.float64)
    windows = texts.windows(ids, context, context // 2)
    for window, begin, first in zip(windows.ids, windows.begin.tolist(), windows.first.tolist()):
        logits = model(window[None].to(model.device), use_cache=False).logits
        scored = forward_modes.log_probs(logits[:, first - 1 : -1], window[None, first:])[0]
        found[begin + first - 1 : begin + context - 1] = scored
        on_progress(len(scored))
    return found


@torch.no_grad()
def re_read(model: Any, ids: Tensor, places: Tensor, context: int, on_progress: OnProgress) -> Tensor:
    """The same at places ``[N]`` alone, each with the `context` tokens before it and nothing else."""
    found = torch.full((len(ids) - 1,), math.nan, dtype=torch.float64)
    for place in places.tolist():
        before = ids[max(0, place + 1 - context) : place + 1]
        logits = model(before[None].to(model.device), use_cache=False).logits[:, -1:]
        found[place] = forward_modes.log_probs(logits, ids[None, place + 1 : place + 2])[0, 0]
        on_progress(1)
    return found


@torch.no_grad()
def tokens_per_second(read: Callable[[int], Any], tokens: int, device: torch.device) -> float:
    """By the median time of ``read(i)``, which reads one token, after a tenth for warming up.

    By the clock of `timing`, not by a benchmark's timer: every call goes on from the last one's cache.
    """
    times = [timing.clock(lambda i=i: read(i), device)[0] for i in range(tokens + tokens // 10)]  # type: ignore[misc]
    return 1e3 / statistics.median(times[tokens // 10 :])


# ------------------------------------------------------------------------------------------------------------ a measure


def measure(
    loaded: Loaded, ids: Tensor, source: str, options: StreamOptions, backend: str, work: Work
) -> Stream | None:
    """Read a stream ``[L]`` in all ways.

    Args:
        loaded: the model.
        ids: tokens; as many as the options ask for are read.
        source: name of the text.
        options: what to read and keep.
        backend: which the layers run on.
        work: where each way's row is kept; the main process reads.

    Returns:
        The part of a report in the main process, None in the others.
    """
    context = options.context
    ids = ids[: options.tokens + 1]
    if len(ids) <= 2 * context:
        raise UserError(f"the text has {len(ids)} tokens; a stream takes more than twice --context {context}")
    check_length(loaded, context, "--context")
    length = len(ids) - 1
    places = torch.linspace(context, length - 1, options.samples).round().long().unique()
    work_of = {"fresh": length, "re-read": len(places)}
    ways = {f"stream-{name}": name for name in STREAM_WAYS}
    total = sum(work_of.get(ways[key], length + options.timed) for key in work.todo(ways))
    on_progress = work.bars.add(f"{loaded.source.label}: stream", total, "tokens")

    def compute(key: str) -> Row:
        with patched(loaded.families, backend=backend, strict=True):
            return _read(ways[key], loaded.model, ids, places, options, on_progress)

    rows = dict(zip(STREAM_WAYS, work.fill(ways, compute, spread=False)))
    if not rows:
        return None
    ends = torch.linspace(0, length, min(STRETCHES, length // 100) + 1).round().long().tolist()
    stretches = list(itertools.pairwise(ends))
    found = {name: _summarize(row, rows["fresh"]["log_p"], stretches) for name, row in rows.items()}
    return Stream(
        text=source,
        tokens=length,
        context=context,
        sinks=options.sinks,
        ends=ends[1:],
        ways=found,
        passed=math.isfinite(found["sinks"].perplexity),
    )


def _read(way: str, model: Any, ids: Tensor, places: Tensor, options: StreamOptions, on_progress: OnProgress) -> Row:
    """A way's row: log-probabilities ``[L - 1]``, bytes that the cache held, tokens a second."""
    context, device = options.context, model.device
    if way == "fresh":
        return {"log_p": fresh(model, ids, context, on_progress)}
    if way == "re-read":
        log_p, last = re_read(model, ids, places, context, on_progress), ids[None, -context:].to(device)
        few = max(5, options.timed // 10)
        return {
            "log_p": log_p,
            "tokens_s": tokens_per_second(lambda _: model(last, use_cache=False, logits_to_keep=1), few, device),
        }
    cache: Any = {
        "sinks": lambda: SinkCache(model.config, options.sinks, context - options.sinks),
        "window": lambda: PlainWindow(model.config, 0, context),
        "dense": lambda: DynamicCache(config=model.config),
    }[way]()
    log_p = through(model, ids, cache, on_progress)
    held = cache.nbytes if isinstance(cache, SinkCache) else snapshots.read(cache).nbytes

    def one(i: int) -> Any:
        on_progress(1)
        return model(ids[None, i : i + 1].to(device), **cache_names.as_argument(cache))

    return {"log_p": log_p, "bytes": held, "tokens_s": tokens_per_second(one, options.timed, device)}


def _summarize(row: Row, reference: Tensor, stretches: list[tuple[int, int]]) -> StreamWay:
    values = row["log_p"]
    scored = values.isfinite()
    by_stretch = [_ratio(values[a:b], reference[a:b]) for a, b in stretches]
    return StreamWay(
        perplexity=forward_modes.perplexity(values[scored]),
        scored=int(scored.sum()),
        ratio=_ratio(values, reference),
        stretches=[forward_modes.perplexity(values[a:b]) if scored[a:b].all() else None for a, b in stretches],
        worst=max(by_stretch, key=lambda ratio: abs(math.log(ratio))) if scored.all() else None,
        bytes=row.get("bytes"),
        tokens_s=row.get("tokens_s"),
    )


def _ratio(values: Tensor, reference: Tensor) -> float:
    """Perplexity over the reference's, on the tokens that both have."""
    both = values.isfinite() & reference.isfinite()
    return math.exp((reference[both] - values[both]).mean().item()) if both.any() else math.nan
