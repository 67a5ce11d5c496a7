"""Calls that the original forward serves because hf_gdn would be slower: patching must not slow a model down.

Where the original's delta rule is a kernel of another package or of the hub, and the only backend of hf_gdn that serves
a call is eager (no backward of ours, a kernel that failed its check), the original forward runs. Padded, packed and
recorded calls stay, since the original is wrong there or cannot do it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import registry
from ..upstream.original_kernels import delta_rule_of
from .families.base import Family
from .plan import Settings


def _on_accelerator(x: Tensor) -> bool:
    return x.device.type != "cpu"


class Handover:
    """Decides for a patched family which calls the original serves.

    Args:
        family, settings: the family, and how it runs.
        original: the original forward.
    """

    def __init__(self, family: Family, settings: Settings, original: Callable[..., Any]) -> None:
        self.family, self.settings, self.original = family, settings, original
        self._known: WeakKeyDictionary[Any, tuple[registry.Dims, float]] = WeakKeyDictionary()

    @functools.cached_property
    def theirs(self) -> str:
        """What the original's delta rule runs on."""
        return delta_rule_of(self.original)

    def reason(self, layer: Any, x: Tensor) -> str | None:
        """Why the original is to serve a call on x ``[B, T, hidden]``; None if hf_gdn does."""
        asked = registry.DEFAULT_BACKEND if self.settings.backend == "auto" else self.settings.backend
        if asked != "auto" or self.settings.strict or not _on_accelerator(x) or torch.compiler.is_compiling():
            return None
        if self.theirs == "torch":
            return None
        grad = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters()))
        known = self._known.get(layer)
        if known is None:  # a layer keeps both
            known = self._known[layer] = (*self.family.dims(layer),), self.family.spec(layer).beta_scale
        kind = x.device.type, x.dtype, known[0], "auto", grad, known[1]
        few = registry.resolve_cached(f"recurrent_{self.family.variant}", *kind)
        chunk = few.max_tokens < x.shape[1]
        kernel = registry.resolve_cached(f"chunk_{self.family.variant}", *kind) if chunk else few
        if kernel.backend != "eager":
            return None
        return f"its {self.theirs} kernels are faster than the eager backend, the only one that serves this call"
