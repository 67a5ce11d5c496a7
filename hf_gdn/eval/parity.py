"""Is it still the same model? Logits of original and patched on the same weights and windows, token by token."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, reason
from ..loading.models import Loaded, check_length
from ..loading.texts import Windows
from ..patches import patched, unpatched
from . import forward_modes, parity_statistics, verdicts
from .accuracy import SAME_MODEL
from .options import ParityOptions
from .parity_results import Comparison, FirstBad, Histogram, Parity, Trace
from .progress import OnProgress
from .resume import Row, Work

# Logits of one model and one way of reading that are held at a time: windows a forward by default.
_LOGITS = 1 << 28
# Edges of the histogram of KL divergences, in powers of ten.
_DECADES = range(-18, 3)
# Points of the trace along the text.
_POINTS = 100


@dataclass(frozen=True)
class _Pair:
    """Two runs to be compared; a run is a side, "original" or "patched", and a mode."""

    name: str
    reference: tuple[str, str]
    subject: tuple[str, str]
    decides: bool = True


def check(options: ParityOptions) -> None:
    """Raise UserError for options that cannot be used."""
    if options.context < 2 or options.windows < 0:
        sizes = f"{options.context} and {options.windows}"
        raise UserError(f"--context must be at least 2 and --windows 0 or more, got {sizes}")
    unknown = [mode for mode in options.modes if mode not in forward_modes.MODES]
    if unknown or not options.modes:
        raise UserError(f"--mode {','.join(unknown)} is not known; modes: {', '.join(forward_modes.MODES)}")
    for dtype in SAME_MODEL:
        verdicts.bounds(SAME_MODEL[dtype], options.tolerance)


def _pairs(modes: tuple[str, ...]) -> list[_Pair]:
    pairs = [_Pair(mode, ("original", mode), ("patched", mode)) for mode in modes]
    if "mixed" in modes:
        for side in ("patched", "original"):
            name = f"{side}: prefill-then-decode against one forward"
            pairs.append(_Pair(name, (side, "prefill"), (side, "mixed"), decides=side == "patched"))
    return pairs


def measure(
    loaded: Loaded,
    windows: Windows,
    source: str,
    options: ParityOptions,
    backend: str,
    work: Work,
) -> Parity | None:
    """Compare the original and the patched model on windows.

    Args:
        loaded: the model.
        windows: the windows.
        source: name of the text.
        options: how to read them.
        backend: which the patched layers run on.
        work: the processes, which share the windows, and where their rows are kept.

    Returns:
        The part of a report in the main process, None in the others.
    """
    context = windows.ids.shape[1]
    check_length(loaded, context, "--context")
    pairs = _pairs(options.modes)
    runs = list(dict.fromkeys(run for pair in pairs for run in (pair.reference, pair.subject)))
    batch = options.batch_size or max(1, min(16, _LOGITS // (context * loaded.config.vocab_size)))
    parts = {f"ppl-{number:05d}": ids for number, ids in enumerate(windows.ids.split(batch))}
    todo = sum(parts[key][:, 1:].numel() for key in work.todo(parts))
    on_progress = work.bars.add(f"{loaded.source.label}: parity", len(runs) * todo, "tokens")

    def compute(key: str) -> Row:
        ids = parts[key]
        try:
            return _compare(loaded, ids, runs, pairs, backend, lambda done: on_progress(done * work.processes.shards))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{len(ids)} windows of {context} tokens at a time do not fit into memory ({reason(error)}); "
                "give a smaller --batch-size or --context"
            ) from error

    rows = work.fill(parts, compute)
    if not rows:
        return None
    position = torch.arange(1, context)
    scored = position >= windows.first[:, None]
    window = torch.arange(len(windows.ids))[:, None].expand_as(scored)[scored]
    place = (windows.begin[:, None] + position)[scored]
    tolerance = verdicts.bounds(SAME_MODEL[loaded.dtype], options.tolerance)
    comparisons = []
    for number, pair in enumerate(pairs):
        names = [name.partition(".")[2] for name in rows[0] if name.startswith(f"{number}.")]
        tokens = {name: torch.cat([row[f"{number}.{name}"] for row in rows])[scored] for name in names}
        statistics = parity_statistics.summarize(tokens, window)
        verdict = parity_statistics.grade(statistics, loaded.dtype, tolerance)
        comparisons.append(
            Comparison(
                name=pair.name,
                decides=pair.decides,
                grade=verdict.grade,
                why=verdict.why,
                first_bad=_first_bad(pair, tokens, window, place),
                statistics=statistics,
                kl_histogram=_histogram(tokens["kl"]),
                trace=_trace(tokens, place),
            )
        )
    return Parity(
        text=source,
        text_tokens=windows.text_tokens,
        context=context,
        windows=len(windows.ids),
        scored=windows.scored,
        batch=batch,
        tolerance=tolerance,
        comparisons=comparisons,
        passed=all(row.grade == "same" for row in comparisons if row.decides),
    )


def _compare(
    loaded: Loaded,
    ids: Tensor,
    runs: list[tuple[str, str]],
    pairs: list[_Pair],
    backend: str,
    on_progress: OnProgress,
) -> Row:
    """`parity_statistics.compare` of each pair on some windows; keys are the pair's number, a dot and its names."""
    sides: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "original": unpatched,
        "patched": lambda: patched(loaded.families, backend=backend, strict=True),
    }
    logits = {}
    for side, mode in runs:
        with sides[side]():
            logits[side, mode] = forward_modes.MODES[mode](loaded.model, ids[:, :-1], on_progress)
    row: Row = {}
    for number, pair in enumerate(pairs):
        found = parity_statistics.compare(logits[pair.reference], logits[pair.subject], ids[:, 1:])
        row |= {f"{number}.{name}": values for name, values in found.items()}
    return row


def _first_bad(pair: _Pair, tokens: dict[str, Tensor], window: Tensor, place: Tensor) -> FirstBad | None:
    """Where the first logit is that is not finite: run, window and the token of the text that it was to predict."""
    bad = (tokens["bad_p"] + tokens["bad_q"]).nonzero()
    if not len(bad):
        return None
    first = int(bad[0])
    side, mode = pair.reference if tokens["bad_p"][first] else pair.subject
    return FirstBad(f"{side}, {mode}", int(window[first]), int(place[first]))


def _histogram(kl: Tensor) -> Histogram:
    edges = [10.0**decade for decade in _DECADES]
    finite = kl[kl.isfinite()]
    cuts = torch.bucketize(finite, torch.tensor(edges, dtype=torch.float64), right=True).clamp(1, len(edges) - 1)
    counts = torch.bincount(cuts - 1, minlength=len(edges) - 1)
    return Histogram(edges, counts.tolist())


def _trace(tokens: dict[str, Tensor], place: Tensor) -> Trace:
    order = place.argsort(stable=True)
    difference = (tokens["log_q"] - tokens["log_p"])[order]
    edges = torch.linspace(0, len(order), min(_POINTS, len(order)) + 1).round().long().tolist()
    stretches = [difference[a:b] for a, b in itertools.pairwise(edges)]
    return Trace(
        scored=edges[:-1],
        token=place[order][edges[:-1]].tolist(),
        mean=[part.mean().item() for part in stretches],
        largest=[part.abs().max().item() for part in stretches],
    )
