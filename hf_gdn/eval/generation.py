"""One call of `generate`, timed where tokens leave it (its streamer), and whether two calls made the same tokens."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..patches import unpatched
from .accuracy import TIE
from .results import TokenMatch
from .timing import synchronize

# An end token that no vocabulary has, so that no text ends early. `min_new_tokens` would change the logits of each
# step, which takes time.
_NO_TOKEN = 2**31 - 1


class _Clock(BaseStreamer):
    """Notes when tokens leave `generate`, and how many."""

    def __init__(self) -> None:
        self.times: list[tuple[float, int]] = []

    def put(self, value: Tensor) -> None:
        self.times.append((time.perf_counter(), value.numel()))

    def end(self) -> None:
        """Nothing is held back."""


@dataclass(frozen=True)
class Call:
    """One call of `generate`: its new tokens ``[B, N]``, seconds to the first token, between tokens, and in all, and
    the peak memory in MiB."""

    tokens: Tensor
    first: float
    between: tuple[float, ...]
    seconds: float
    peak_mib: float | None


def generate(model: Any, prompt: Tensor, new_tokens: int, **arguments: Any) -> Call:
    """Greedy tokens after prompt ``[B, T]``, timed. `arguments` go to ``model.generate``.

    Tokens that leave together, as accepted drafts do, share the time since the last ones equally.
    """
    clock = _Clock()
    _reset_peak(model.device)
    synchronize(model.device)
    start = time.perf_counter()
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=_NO_TOKEN,
        pad_token_id=0,
        streamer=clock,
        **arguments,
    )
    synchronize(model.device)
    end = time.perf_counter()
    (first, count), *rest = clock.times[1:]  # what comes before is the prompt
    between, before = [0.0] * (count // len(prompt) - 1), first
    for at, count in rest:
        together = count // len(prompt)
        between += [(at - before) / together] * together
        before = at
    return Call(out[:, prompt.shape[1] :].cpu(), first - start, tuple(between), end - start, _peak_mib(model.device))


_PEAK = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    elif _PEAK[0].exists():
        with contextlib.suppress(OSError):  # not everywhere allowed; the peak is the process's then
            _PEAK[0].write_text("5")  # resets the peak of the resident set


def _peak_mib(device: torch.device) -> float | None:
    """Peak since the reset: of memory allocated on all devices, or of the process's resident set; None: unknown."""
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / 2**20
    if _PEAK[1].exists():
        for line in _PEAK[1].read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return None


def compare_tokens(model: Any, prompt: Tensor, original: Tensor, patched: Tensor, dtype: str) -> TokenMatch:
    """Did both generate the same? Of several rows that differ, another token counts before a tie."""
    worst = TokenMatch("same")
    for row in range(len(original)):
        differing = (original[row] != patched[row]).nonzero()
        if not len(differing):
            continue
        at = int(differing[0])
        ids = torch.cat((prompt[row].cpu(), original[row, :at]))[None].to(model.device)
        with torch.inference_mode(), unpatched():
            logits = model(ids, use_cache=False).logits[0, -1].double().cpu()
        gap = abs(logits[original[row, at]] - logits[patched[row, at]]).item()
        bound = TIE[dtype] * torch.finfo(getattr(torch, dtype)).eps * logits.abs().max().item()
        found = TokenMatch("tie" if gap <= bound else "other", row, at, gap)
        if worst.verdict == "same" or found.verdict == "other":
            worst = found
        if found.verdict == "other":
            break
    return worst
