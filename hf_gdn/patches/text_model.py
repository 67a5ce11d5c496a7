"""The forward of patched text models. It supports sequences packed by ``position_ids``, and caches that plan forwards.

``cu_seq_lens_q`` and ``seq_idx`` reach the layers as keyword arguments (`packing`). ``position_ids`` do not:
transformers builds the masks of full attention from them but does not pass them to linear layers.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..caches import rollback
from ..upstream import cache_names, paged
from .paged import with_batch

# Called with a text model each time it runs eagerly. If it returns False, the original forward serves the call.
FirstRun = Callable[[Any], bool]
_nothing = contextlib.nullcontext()


def _restarts(given: dict[str, Any]) -> Tensor | None:
    """Sequence index of each token, ``[1 or B, T]``, from restarts of position_ids; None if nothing is packed.

    As in transformers' own masks, a mask or a non-empty cache means that nothing is packed. Explicit boundaries take
    precedence.
    """
    position_ids, past = given.get("position_ids"), cache_names.look(given)
    if position_ids is None or any(
        given.get(name) is not None for name in ("attention_mask", "seq_idx", "cu_seq_lens_q")
    ):
        return None
    if position_ids.ndim == 3:  # multimodal: text positions, if present, come first
        if len(position_ids) not in (1, 4):
            return None
        position_ids = position_ids[0]
    if position_ids.ndim != 2 or position_ids.shape[1] == 1 or (past is not None and past.get_seq_length() > 0):
        return None
    restarts = F.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0))
    return restarts.cumsum(1, dtype=torch.int32) if restarts.any() else None


def make_model_forward(original: Callable[..., Any], first_run: FirstRun | None = None) -> Callable[..., Any]:
    """Make the forward that replaces a text model's. If ``position_ids`` restart, it passes ``seq_idx`` to the layers.

    Under torch.compile their values cannot be read, so callers must pass ``cu_seq_lens_q``. Caches that plan forwards
    (`hf_gdn.caches.SinkCache`) determine mask and positions. The cache argument may have any of its three names.
    """
    names, cache_name = list(inspect.signature(original).parameters)[1:], cache_names.name_in(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if first_run is not None and not torch.compiler.is_compiling() and not first_run(self):
            return original(self, *args, **kwargs)
        if len(args) > len(names):
            return original(self, *args, **kwargs)  # raises TypeError
        given = {**dict(zip(names, args)), **kwargs}
        cache = cache_names.take(given)
        if paged.is_paged(cache):
            return original(self, **with_batch(cache, given), **paged.as_argument(cache))
        if cache is not None:
            given[cache_name or cache_names.name()] = cache
        compiling = torch.compiler.is_compiling()
        if getattr(cache, "plans_forwards", False):
            with _nothing if compiling else rollback.guarded(cache):
                out = original(self, **{**given, **cache.begin(self, given)})
                cache.commit()
                return out
        if compiling:
            return original(self, **given)
        seq_idx = _restarts(given)
        if seq_idx is not None:
            given["seq_idx"] = seq_idx
        with rollback.guarded(cache), rollback.masked_as_static() if rollback.is_static(cache) else _nothing:
            return original(self, **given)

    return forward


def make_generate(original: Callable[..., Any]) -> Callable[..., Any]:
    """Make a ``generate`` that accepts ``cache=`` in versions whose own argument has another name."""

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = cache_names.take(kwargs)
        return original(self, *args, **kwargs, **({} if cache is None else cache_names.as_argument(cache)))

    return generate
