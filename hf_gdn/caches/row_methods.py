"""Select and repeat sequences in the caches of linear-attention layers.

transformers' attention cache layers have ``batch_select_indices`` and ``batch_repeat_interleave``, its linear-attention
ones do not: contrastive search, or one prefill for several answers, raises AttributeError. ``patch()`` adds both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..upstream import seams


def _each(layer: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Replace all convolution and recurrent states. If `change` raises, none is replaced."""
    kinds = (
        (layer.conv_states, layer.is_conv_states_initialized),
        (layer.recurrent_states, layer.is_recurrent_states_initialized),
    )
    changed = [{i: change(states[i]) for i, held in there.items() if held} for states, there in kinds]
    for (states, _), new in zip(kinds, changed):
        states.update(new)


def batch_repeat_interleave(self: Any, repeats: int) -> None:
    """Repeat every sequence of the layer's states `repeats` times; copies are adjacent."""
    _each(self, lambda states: states.repeat_interleave(repeats, dim=0))
    _also(self, "batch_repeat_interleave", repeats)


def batch_select_indices(self: Any, indices: Tensor) -> None:
    """Keep the sequences of the layer's states selected by `indices` ``[N]`` or a boolean mask ``[B]``."""
    _each(self, lambda states: states[indices.to(states.device), ...])
    _also(self, "batch_select_indices", indices)


def _also(layer: Any, name: str, argument: Any) -> None:
    """Call the same method of the next base class, which layers that also hold keys and values have."""
    method = getattr(super(seams.linear_cache_mixin(), layer), name, None)
    if method is not None:
        method(argument)


# Method of a linear-attention cache layer -> function that makes its replacement from the original.
METHODS: dict[str, Callable[[Any], Any]] = {
    "batch_repeat_interleave": lambda _: batch_repeat_interleave,
    "batch_select_indices": lambda _: batch_select_indices,
}
