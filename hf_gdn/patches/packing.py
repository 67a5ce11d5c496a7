"""Packed sequences: where one ends and the next begins, from whatever the user has given.

``cu_seq_lens_q`` and ``seq_idx`` reach the layers as keywords. ``position_ids`` that restart do not: transformers makes
masks of full attention of them and keeps them from its linear layers, so the text model's forward is wrapped here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..once import read_once
from ..operators import check_bounds
from ..upstream import cache_names

# Called with a text model each time it runs eagerly; False leaves the call to the original.
FirstRun = Callable[[Any], bool]


def bounds(x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """Where sequences packed in x ``[B, T, hidden]`` begin and end in it, rows one behind the other: ``[N + 1]``.

    From ``cu_seq_lens_q`` (of one row), or else from a ``seq_idx`` of ``[1, T]`` or ``[B, T]``; None without either.

    Raises:
        ValueError: either does not fit x.
    """
    cu_seqlens, seq_idx = kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx")
    batch, length = x.shape[:2]
    if cu_seqlens is None:
        if seq_idx is None:
            return None
        cu_seqlens = _of_indices(seq_idx, batch, length)
    elif batch != 1:
        raise ValueError(f"cu_seq_lens_q needs hidden states [1, T, hidden], got {list(x.shape)}")
    if not torch.compiler.is_compiling():
        check_bounds(cu_seqlens, batch * length)
    return cu_seqlens


@read_once
def _of_indices(seq_idx: Tensor, batch: int, length: int) -> Tensor:
    if seq_idx.ndim != 2 or seq_idx.shape[0] not in (1, batch) or seq_idx.shape[1] != length:
        wanted = f"[1, T] = [1, {length}]" + (f" or [B, T] = [{batch}, {length}]" if batch > 1 else "")
        raise ValueError(f"seq_idx must be {wanted} beside hidden states [B, T, hidden], got {list(seq_idx.shape)}")
    rows = seq_idx.expand(batch, length)
    begins = F.pad(rows[:, 1:] != rows[:, :-1], (1, 0), value=True).flatten().nonzero().squeeze(1)
    return F.pad(begins, (0, 1), value=batch * length).to(torch.int32)


def _restarts(given: dict[str, Any]) -> Tensor | None:
    """Which sequence a token belongs to, ``[1 or B, T]``, where position_ids restart; None where nothing is packed.

    As in transformers' own masks, a mask or a past means that nothing is; explicit bounds come first.
    """
    position_ids, past = given.get("position_ids"), cache_names.look(given)
    if position_ids is None or any(
        given.get(name) is not None for name in ("attention_mask", "seq_idx", "cu_seq_lens_q")
    ):
        return None
    if position_ids.ndim == 3:  # multimodal: text positions come first, if they are there
        if len(position_ids) not in (1, 4):
            return None
        position_ids = position_ids[0]
    if position_ids.ndim != 2 or position_ids.shape[1] == 1 or (past is not None and past.get_seq_length() > 0):
        return None
    restarts = F.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0))
    return restarts.cumsum(1, dtype=torch.int32) if restarts.any() else None


def make_model_forward(original: Callable[..., Any], first_run: FirstRun | None = None) -> Callable[..., Any]:
    """The forward that replaces a text model's: the same, but it passes restarting position_ids on as ``seq_idx``.

    Not under torch.compile, where nobody can read them: there the layers need ``cu_seq_lens_q``. Caches that plan
    forwards (`hf_gdn.caches.SinkCache`) determine mask and positions. A cache is taken by any of its names.
    """
    names, cache_name = list(inspect.signature(original).parameters)[1:], cache_names.name_in(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if first_run is not None and not torch.compiler.is_compiling() and not first_run(self):
            return original(self, *args, **kwargs)
        if len(args) > len(names):
            return original(self, *args, **kwargs)  # which raises
        given = {**dict(zip(names, args)), **kwargs}
        cache = cache_names.take(given)
        if cache is not None:
            given[cache_name or cache_names.name()] = cache
        if getattr(cache, "plans_forwards", False):
            out = original(self, **{**given, **cache.begin(self, given)})
            cache.commit()
            return out
        if not torch.compiler.is_compiling():
            seq_idx = _restarts(given)
            if seq_idx is not None:
                given["seq_idx"] = seq_idx
        return original(self, **given)

    return forward


def make_generate(original: Callable[..., Any]) -> Callable[..., Any]:
    """The ``generate`` of versions that call a cache otherwise, which then takes ``cache=`` as later ones do."""

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = cache_names.take(kwargs)
        return original(self, *args, **kwargs, **({} if cache is None else cache_names.as_argument(cache)))

    return generate
