"""Logits of windows of tokens, read in one forward, token by token through the cache, or both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..upstream import cache_names

OnProgress = Callable[[int], None]


def _nothing(tokens: int) -> None:
    """Progress that nobody watches."""


@torch.inference_mode()
def prefill(model: Any, ids: Tensor, on_progress: OnProgress = _nothing) -> Tensor:
    """Logits ``[B, T, vocabulary]`` of tokens ``[B, T]`` in one forward: runs the chunk kernels."""
    logits = model(ids.to(model.device), use_cache=False).logits
    on_progress(ids.numel())
    return logits


@torch.inference_mode()
def decode(model: Any, ids: Tensor, on_progress: OnProgress = _nothing) -> Tensor:
    """The same, one token a forward through the cache: runs the recurrent kernels."""
    return _continued(model, ids, 0, on_progress)


@torch.inference_mode()
def mixed(model: Any, ids: Tensor, on_progress: OnProgress = _nothing) -> Tensor:
    """The same, the first half in one forward, the rest token by token: what `generate` does."""
    return _continued(model, ids, max(1, ids.shape[1] // 2), on_progress)


def _continued(model: Any, ids: Tensor, prefix: int, on_progress: OnProgress) -> Tensor:
    ids = ids.to(model.device)
    cache, logits = None, []
    pieces = ([ids[:, :prefix]] if prefix else []) + list(ids[:, prefix:].split(1, 1))
    for piece in pieces:
        out = model(piece, **cache_names.as_argument(cache), use_cache=True)
        cache = cache_names.of_outputs(out)
        logits.append(out.logits)
        on_progress(piece.numel())
    return torch.cat(logits, 1)


MODES: dict[str, Callable[..., Tensor]] = {"prefill": prefill, "decode": decode, "mixed": mixed}


def log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target: logits ``[B, T, vocabulary]``, targets ``[B, T]``; ``[B, T]`` in float64."""
    targets = targets.to(logits.device)
    return torch.log_softmax(logits.double(), -1).gather(-1, targets[..., None]).squeeze(-1).cpu()


def perplexity(log_probs: Tensor) -> float:
    """exp of the mean negative log-probability; NaN when any is."""
    mean = log_probs.mean().item()
    return math.exp(-mean) if -mean < 700 else math.inf if not math.isnan(mean) else math.nan
