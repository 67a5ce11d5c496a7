"""Full and sliding-window attention of a batch of continuous batching on a CPU: each request sees only its own keys.

transformers has one masked product of all queries with the keys of all requests, so its work grows with the square of
the number of requests. Here every request is a product of its own. It needs no mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..upstream import paged
from .paged import ARGUMENT


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
    """Attention of one request: queries ``[1, H, T, D]`` are its last T tokens, keys and values ``[1, HK, N, D]``."""
    (_, heads, new, dim), (_, k_heads, keys, _) = query.shape, key.shape
    outside = window is not None and keys > window
    if new == 1 and not outside:  # the heads that share keys are rows of one product
        rows = query.reshape(1, k_heads, heads // k_heads, dim)
        return F.scaled_dot_product_attention(rows, key, value, scale=scale).reshape(1, heads, 1, -1)
    mask = None
    if outside or new < keys:
        mask = torch.ones(new, keys, dtype=torch.bool, device=query.device).tril_(keys - new)
        if outside:
            mask.triu_(keys - new - window + 1)  # type: ignore[operator]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=heads != k_heads
    )


@torch.compiler.disable  # a loop over the requests of a batch
def attend_to_own_keys(
    query: Tensor, key: Tensor, value: Tensor, of_queries: Tensor, of_keys: Tensor, scale: float | None, window: Any
) -> Tensor:
    """Attention ``[1, T, H, D]`` of packed requests.

    Args:
        query: ``[1, H, T, D]``; tokens after the last request pad the batch, their output is zero.
        key, value: ``[1, HK, N, D]``, of cached and new tokens.
        of_queries, of_keys: first query and first key of every request, and the end of the last; ``[requests + 1]``.
        scale: of the products; None is ``D ** -0.5``.
        window: how many tokens a query sees; None is all.
    """
    out = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
    queries, keys = of_queries.tolist(), of_keys.tolist()
    for begin, end, first, last in zip(queries, queries[1:], keys, keys[1:]):
        if end > begin:
            own = _attend(query[:, :, begin:end], key[:, :, first:last], value[:, :, first:last], scale, window)
            out[:, begin:end] = own.transpose(1, 2)
    return out


def make_sdpa(original: Callable[..., Any]) -> Callable[..., Any]:
    """Make the function that serves ``attn_implementation="sdpa"``: batches without a mask are served here."""

    @functools.wraps(original)
    def sdpa(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # A batch has a mask unless `upstream.paged` left it out, so that it is served here.
        if attention_mask is not None or ARGUMENT not in kwargs:
            return original(module, query, key, value, attention_mask, *args, **kwargs)
        key, value = paged.with_cached(module, key, value, kwargs)
        bounds, window = (kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]), kwargs.get("sliding_window")
        return attend_to_own_keys(query, key, value, *bounds, kwargs.get("scaling"), window), None

    return sdpa
