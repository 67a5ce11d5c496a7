"""Speed of `generate`, original and patched in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Speed:
    """Generated tokens a second: median over the rounds, lowest and highest."""

    median: float
    low: float
    high: float


def generate(model: Any, prompt: Tensor, new_tokens: int) -> tuple[Tensor, float]:
    """Greedy tokens ``[B, new_tokens]`` after prompt ``[B, T]`` and the seconds it took, prompt included."""
    _wait(model.device)
    start = time.perf_counter()
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
    )
    _wait(model.device)
    return out[:, prompt.shape[1] :].cpu(), time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(
    runs: dict[str, Callable[[], tuple[Tensor, float]]], rounds: int, step: Callable[[], None] = lambda: None
) -> tuple[dict[str, Speed], bool]:
    """Time runs A B A B ... after one warm-up each.

    Args:
        runs: name -> function that returns tokens and seconds.
        rounds: timed rounds.
        step: called after every run.

    Returns:
        Speed by name, and whether all runs made the same tokens.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    tokens = []
    for turn in range(rounds + 1):
        for name, run in runs.items():
            made, took = run()
            tokens.append(made)
            if turn > 0:
                seconds[name].append(took)
            step()
    count = tokens[0].numel()
    speeds = {
        name: Speed(count / statistics.median(took), count / max(took), count / min(took))
        for name, took in seconds.items()
    }
    return speeds, all(torch.equal(made, tokens[0]) for made in tokens)
