"""The forward that replaces a text model's: packed sequences by ``position_ids``, and caches that plan forwards.

``cu_seq_lens_q`` and ``seq_idx`` reach the layers as keywords (`packing`). ``position_ids`` that restart do not:
transformers makes masks of full attention of them and does not pass them to its linear layers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..upstream import cache_names, versions

# Called with a text model each time it runs eagerly; False leaves the call to the original.
FirstRun = Callable[[Any], bool]


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


def _check_recording(cache: Any) -> None:
    """Raise ValueError for a static cache of a hybrid model that records its past, where transformers masks it wrongly.

    Where a recording cache counts as not compileable, decode steps get no mask: queries attend to slots that hold no
    token yet, in the original models too.
    """
    layers = getattr(cache, "layers", ())
    recording = next((layer for layer in layers if hasattr(layer, "record_past")), None)
    if recording is None or not recording.record_past or cache.is_compileable:
        return
    if any(layer.is_compileable for layer in layers if not hasattr(layer, "record_past")):
        raise ValueError(
            f"a {type(cache).__name__} of a hybrid model that records its past, as assisted decoding makes it, is "
            f"masked wrongly by {versions.installed()}: decode steps attend to empty slots; expected a DynamicCache"
        )


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
            _check_recording(cache)
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
