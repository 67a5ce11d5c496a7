"""Taking tokens back: what linear-attention layers keep while a cache records its past, and `crop`.

A recurrent state cannot be run backwards, so something has to be kept for every token that may be taken back. A state
of its own for each is 2 MiB a layer in Qwen3-Next; what the projections made of the token is some 24 KiB, and running a
few of them again from the state before them costs what decoding them did, once, only when tokens are really refused.
So a layer keeps the states as they were and the projections since, and `crop` replays those that stay.

A crop begins a new span of tokens and keeps the one before: universal assistants, whose tokens are made anew from text,
take back more than they have added. Spans are joined until they have enough tokens, so that there are at most three.

Convolution windows are replayed with the states and stay as wide as ever; both keep their addresses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import cache_utils

# Tokens that can be taken back; between one and two times as many are kept.
RECORDED = 256
# Tokens from before a crop that a later one can take back as well; fewer than twice as many are kept, and a draft.
ACROSS = 32
_KEY = "_hf_gdn_past"  # in a cache layer's __dict__


@dataclass
class Past:
    """States before some tokens, and the tokens.

    Args:
        of: the layer's window and state, which this is the past of, and how often they had been written to.
        window, state: copies of them from before the first token.
        empty: the layer held nothing then.
        tokens: tuples of tensors ``[B, t, ...]`` or None, and the places ``[T]`` that they were given in, t of them
            true, or None where t places held t tokens.
        step: ``step(tokens, window, state)`` moves both on, in place.
        earlier: the past of the first token, where a crop has kept it.
    """

    of: tuple[Tensor, Tensor]
    versions: tuple[int, ...]
    window: Tensor
    state: Tensor
    empty: bool
    tokens: list[tuple[Any, Tensor | None]]
    step: Callable[[Any, Tensor, Tensor], Any]
    earlier: Past | None = None

    def __len__(self) -> int:
        return sum(map(_places, self.tokens))

    @property
    def reach(self) -> int:
        """How many tokens can be taken back."""
        return len(self) + (0 if self.earlier is None else self.earlier.reach)

    def __deepcopy__(self, memo: dict[int, Any]) -> Past:
        of, earlier = copy.deepcopy((self.of, self.earlier), memo)
        states = self.window.clone(), self.state.clone()
        return Past(of, _versions(of), *states, self.empty, list(self.tokens), self.step, earlier)

    def first(self, count: int) -> list[tuple[Any, Tensor | None]]:
        """The tokens in the first `count` places."""
        found = []
        for some, places in self.tokens:
            taken = min(count, _places((some, places)))
            if taken > 0:
                kept = taken if places is None else int(places[:taken].sum())
                part = type(some)(*(x if x is None else x[:, :kept] for x in some))
                found.append((part, None if places is None else places[:taken]))
            count -= taken
        return found

    def replay(self, tokens: list[tuple[Any, Tensor | None]], window: Tensor, state: Tensor) -> None:
        """Let tokens into window and state."""
        for some, _ in tokens:
            if some[0].shape[1] > 0:
                self.step(some, window, state)


def _places(entry: tuple[Any, Tensor | None]) -> int:
    some, places = entry
    return some[0].shape[1] if places is None else len(places)


def _versions(tensors: tuple[Tensor, Tensor]) -> tuple[int, ...]:
    return tuple(0 if x.is_inference() else x._version for x in tensors)


def past_of(layer: Any) -> Past | None:
    """What a cache layer has recorded; None where that is nothing, or somebody else has written to its states since."""
    past = layer.__dict__.get(_KEY)
    if past is None or past.of[0] is not layer.conv_states[0] or past.of[1] is not layer.recurrent_states[0]:
        return None
    return past if past.versions == _versions(past.of) else None


def before(layer: Any, window: Tensor, state: Tensor) -> Past:
    """Call before tokens move a recording layer on; where it holds nothing yet, window and state are zeros."""
    past = past_of(layer) if layer.has_previous_state[0] else None
    if past is None:
        empty = not layer.has_previous_state[0]
        past = Past((window, state), (), window.clone(), state.clone(), empty, [], _nothing)
    return past


def _nothing(*_: Any) -> None:
    pass


def after(
    layer: Any, past: Past, tokens: Any, places: Tensor | None, step: Callable[[Any, Tensor, Tensor], Any]
) -> None:
    """Call when `tokens` in `places` have moved the layer on (`Past`)."""
    past.of = layer.conv_states[0], layer.recurrent_states[0]
    past.versions = _versions(past.of)
    past.tokens.append((tokens, places))
    past.step = step
    if len(past) > 2 * RECORDED:
        old, kept = 0, len(past)
        while kept - _places(past.tokens[old]) >= RECORDED:
            kept -= _places(past.tokens[old])
            old += 1
        past.replay(past.tokens[:old], past.window, past.state)
        past.tokens, past.empty, past.earlier = past.tokens[old:], past.empty and not old, None
    layer.__dict__[_KEY] = past


def forget(layer: Any) -> None:
    """Call when a layer is moved on by tokens that are not recorded."""
    layer.__dict__.pop(_KEY, None)


def _back(layer: Any, past: Past, count: int) -> Past:
    """Take `count` tokens back that `past` reaches; returns what is the past then."""
    while count > len(past):
        assert past.earlier is not None
        count, past = count - len(past), past.earlier
    of = layer.conv_states[0], layer.recurrent_states[0]
    tokens = past.first(len(past) - count)
    if count == 0 and not tokens:
        return past
    window, state = (x.clone() for x in ((past.window, past.state) if count > 0 else of))
    if count > 0:
        past.replay(tokens, window, state)
        of[0].copy_(window)
        of[1].copy_(state)
        layer.has_previous_state[0] = bool(tokens) or not past.empty
    past.tokens = tokens
    if tokens:
        closed = past.earlier
        if closed is None or len(closed) >= ACROSS:
            closed = past
        else:
            closed.tokens += tokens
        if len(closed) >= ACROSS:
            closed.earlier = None
        past = Past(of, (), window, state, False, [], past.step, closed)
    past.of, past.versions = of, _versions(of)
    return past


_original_crop = cache_utils.LinearAttentionCacheLayerMixin.crop


def crop(self: Any, tokens_to_remove: int) -> None:
    """Take the last `-tokens_to_remove` tokens back, recurrent states included.

    Raises:
        RuntimeError: the layer does not record its past, or has not recorded so many tokens. Nothing is changed then.
    """
    if not self.record_past or tokens_to_remove > 0:
        return _original_crop(self, tokens_to_remove)  # which refuses
    past, count = past_of(self), -tokens_to_remove
    recorded = 0 if past is None else past.reach
    if count > recorded and any(self.is_recurrent_states_initialized.values()):
        raise RuntimeError(
            f"crop({tokens_to_remove}) takes {count} tokens back, the layer has recorded {recorded}: of patched models "
            f"the last {RECORDED} or more since activate_past_recording() or the last crop and {ACROSS} or more before "
            "that crop, without gradients, and without padding where there are several rows"
        )
    forget(self)
    if past is not None:
        past = self.__dict__[_KEY] = _back(self, past, count)
    for i, states in self.conv_states.items():  # other layers' windows, in which transformers keeps all of the past
        if states is not None and (i > 0 or past is None):
            end = states.shape[-1] - count
            width = self.conv_kernel_size[i] + (0 if past is None else past.reach)
            self.conv_states[i] = states[..., max(0, end - width) : end]


METHODS = (crop,)
