"""Taking tokens back: what linear-attention layers keep while a cache records its past, and `crop`.

A recurrent state cannot be run backwards, so something has to be kept for every token that may be taken back. A state
of its own for each is 2 MiB a layer in Qwen3-Next; what the projections made of the token is some 24 KiB, and running a
few of them again from the state before them costs what decoding them did, once, only when tokens are really refused.
So a layer keeps the states as they were and the projections since, and `crop` replays those that stay.

Before a draft, and where tokens have been taken back, a new span of tokens begins, so that little is to be replayed.
Those before are kept: universal assistants, whose tokens are made anew from text, take back more than they have added.
Spans are joined until they have enough tokens, so that there are three at most.

Convolution windows are replayed with the states and stay as wide as ever; both keep their addresses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..upstream.tensors import version

# Tokens that can be taken back at least.
RECORDED = 64
_KEY = "_hf_gdn_past"  # in a cache layer's __dict__
Step = Callable[[Any, Tensor, Tensor], Any]


class Read(NamedTuple):
    """Tokens of one call.

    Attributes:
        raw: a named tuple of tensors ``[B, t, ...]`` or None.
        places: ``[T]``, t of them true: where among the call's T places the tokens stood; None where t = T.
        length: T.
    """

    raw: Any
    places: Tensor | None
    length: int

    def first(self, count: int) -> Read:
        """What stood in the first `count` places."""
        if count == self.length:
            return self
        kept = count if self.places is None else int(self.places[:count].sum())
        raw = type(self.raw)(*(x if x is None else x[:, :kept] for x in self.raw))
        return Read(raw, None if self.places is None else self.places[:count], count)


@dataclass
class Past:
    """States before some tokens, and the tokens.

    Args:
        of: the layer's window and state, which this is the past of, and how often they had been written to.
        window, state: copies of them from before the first token.
        empty: the layer held nothing then.
        tokens: what was read since.
        step: ``step(raw, window, state)`` moves both on, in place; None until it is known.
        earlier: the past of the first token, where that is kept (`_next`).
    """

    of: tuple[Tensor, Tensor]
    versions: tuple[int, ...]
    window: Tensor
    state: Tensor
    empty: bool
    tokens: list[Read]
    step: Step | None = None
    earlier: Past | None = None

    def __len__(self) -> int:
        return sum([read.length for read in self.tokens])

    @property
    def reach(self) -> int:
        """How many tokens can be taken back."""
        return len(self) + (0 if self.earlier is None else self.earlier.reach)

    def __deepcopy__(self, memo: dict[int, Any]) -> Past:
        of, earlier = copy.deepcopy((self.of, self.earlier), memo)
        states = self.window.clone(), self.state.clone()
        return Past(of, _versions(of), *states, self.empty, list(self.tokens), self.step, earlier)

    def first(self, count: int) -> list[Read]:
        """What stood in the first `count` places."""
        found = []
        for read in self.tokens:
            if count <= 0:
                break
            found.append(read.first(min(count, read.length)))
            count -= read.length
        return found

    def replay(self, tokens: list[Read], window: Tensor, state: Tensor) -> None:
        """Let tokens into window and state."""
        assert self.step is not None
        for read in tokens:
            if read.raw[0].shape[1] > 0:
                self.step(read.raw, window, state)


def _versions(tensors: tuple[Tensor, Tensor]) -> tuple[int, ...]:
    return tuple(map(version, tensors))


def past_of(layer: Any) -> Past | None:
    """What a cache layer has recorded; None where that is nothing, or somebody else has written to its states since."""
    past = layer.__dict__.get(_KEY)
    if past is None or past.of[0] is not layer.conv_states[0] or past.of[1] is not layer.recurrent_states[0]:
        return None
    return past if past.versions == _versions(past.of) else None


def _next(past: Past, window: Tensor, state: Tensor) -> Past:
    """The span after one that ends in `window` and `state`, which are kept."""
    closed = past.earlier
    if closed is None or len(closed) >= RECORDED:
        closed = past
    else:
        closed.tokens += past.tokens
    if len(closed) >= RECORDED:
        closed.earlier = None
    return Past(past.of, past.versions, window, state, False, [], past.step, closed)


def before(layer: Any, window: Tensor, state: Tensor, length: int) -> Past:
    """Call before `length` tokens move a recording layer on; where it holds nothing yet, window and state are zeros."""
    past = past_of(layer) if layer.has_previous_state[0] else None
    if past is None:
        empty = not layer.has_previous_state[0]
        copies = (window, state) if empty else (window.clone(), state.clone())  # zeros are nobody else's
        return Past((window, state), (), *copies, empty, [])
    if past.tokens and (length > 1 or len(past) >= RECORDED):  # of a draft some will be taken back
        past = layer.__dict__[_KEY] = _next(past, window.clone(), state.clone())
    return past


def after(layer: Any, past: Past, raw: Any, places: Tensor | None) -> None:
    """Call when tokens have moved the layer on (`Read`)."""
    past.of = layer.conv_states[0], layer.recurrent_states[0]
    past.versions = _versions(past.of)
    past.tokens.append(Read(raw, places, raw[0].shape[1] if places is None else len(places)))
    layer.__dict__[_KEY] = past


def forget(layer: Any) -> None:
    """Call when a layer is moved on by tokens that are not recorded."""
    layer.__dict__.pop(_KEY, None)


def _back(layer: Any, past: Past, count: int) -> Past:
    """Take `count` tokens back that `past` reaches; returns what is the past then."""
    if count == 0:
        return past
    while count > len(past):
        assert past.earlier is not None
        count, past = count - len(past), past.earlier
    tokens = past.first(len(past) - count)
    window, state = past.window.clone(), past.state.clone()
    past.replay(tokens, window, state)
    of = layer.conv_states[0], layer.recurrent_states[0]
    of[0].copy_(window)
    of[1].copy_(state)
    layer.has_previous_state[0] = bool(tokens) or not past.empty
    past.tokens = tokens
    if tokens:
        past = _next(past, window, state)
    past.of, past.versions = of, _versions(of)
    return past


def make_crop(original: Callable[[Any, int], None]) -> Callable[[Any, int], None]:
    """The method that replaces a linear-attention cache layer's ``crop``."""

    def crop(self: Any, tokens_to_remove: int) -> None:
        """Roll the last `-tokens_to_remove` tokens back, recurrent states included.

        Raises:
            RuntimeError: the layer does not record its past, or has not recorded so many tokens. Nothing is changed.
        """
        if not self.record_past or tokens_to_remove > 0:
            return original(self, tokens_to_remove)  # which refuses
        past, count = past_of(self), -int(tokens_to_remove)  # generate() gives tensors
        recorded = 0 if past is None else past.reach
        if count > recorded and any(self.is_recurrent_states_initialized.values()):
            raise RuntimeError(
                f"crop({tokens_to_remove}) takes {count} tokens back, the layer has recorded {recorded}; patched "
                f"models record the last {RECORDED} or more since activate_past_recording(), without gradients, of "
                "several rows without padding"
            )
        forget(self)
        if past is not None:
            past = self.__dict__[_KEY] = _back(self, past, count)
        for i, states in self.conv_states.items():  # other layers' windows, in which transformers keeps all of the past
            if states is not None and (i > 0 or past is None):
                end = states.shape[-1] - count
                width = self.conv_kernel_size[i] + (0 if past is None else past.reach)
                self.conv_states[i] = states[..., max(0, end - width) : end]

    return crop


def make_is_croppable(original: property) -> property:
    """The property that replaces a linear-attention cache layer's ``is_croppable``.

    ``generate`` reads it after the prefill that starts assisted decoding.
    """

    def is_croppable(self: Any) -> bool:
        """Whether `crop` can roll tokens back: it can while the layer records its past."""
        return bool((self.record_past and past_of(self) is not None) or original.__get__(self))

    return property(is_croppable)


# Attribute of a linear-attention cache layer -> what makes its replacement from the original.
METHODS: dict[str, Callable[[Any], Any]] = {"crop": make_crop, "is_croppable": make_is_croppable}
