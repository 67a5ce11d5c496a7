"""Perplexity of windows of tokens, read in one pass or token by token through the cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Step = Callable[[int], None]


def _log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of every target: logits ``[B, T, vocabulary]``, targets ``[B, T]``; ``[B, T]`` in float64."""
    return torch.log_softmax(logits.double(), -1).gather(-1, targets[..., None]).squeeze(-1)


@torch.inference_mode()
def one_pass(model: Any, ids: Tensor, batch: int = 8, step: Step = lambda tokens: None) -> Tensor:
    """Teacher-forced in one forward a window: runs the prefill kernels.

    Args:
        model: a causal language model.
        ids: ``[N, L]`` windows of tokens.
        batch: windows a forward.
        step: called with the number of tokens done.

    Returns:
        Log-probability of each token given those before it in its window, ``[N, L - 1]`` in float64.
    """
    scores = []
    for part in ids.to(model.device).split(batch):
        logits = model(part[:, :-1], use_cache=False).logits
        scores.append(_log_probs(logits, part[:, 1:]).cpu())
        step(part.numel())
    return torch.cat(scores)


@torch.inference_mode()
def token_by_token(model: Any, ids: Tensor, step: Step = lambda tokens: None) -> Tensor:
    """The same, one token a forward through the cache: runs the decode kernels."""
    ids = ids.to(model.device)
    cache = None
    scores = []
    for t in range(ids.shape[1] - 1):
        out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        scores.append(_log_probs(out.logits, ids[:, t + 1 : t + 2]).cpu())
        step(len(ids))
    return torch.cat(scores, 1)


def perplexity(log_probs: Tensor) -> float:
    """exp of the mean negative log-probability; NaN when any is."""
    mean = log_probs.mean().item()
    return math.exp(-mean) if -mean < 700 else math.inf if not math.isnan(mean) else math.nan
