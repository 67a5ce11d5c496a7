"""Roll back tokens in linear-attention cache layers: recording, and `crop`.

A recurrent state cannot be reversed, so something must be stored for every token that may be rolled back. In
Qwen3-Next, a copy of the state takes 2 MiB per token and layer, the outputs of the token's projections take 24 KiB.
Replaying a few tokens costs as much as decoding them, and is needed only when tokens are rejected. So a layer stores a
copy of its states and the projections of the tokens since then (a *span*), and `crop` replays the tokens that are kept.

A new span starts before each draft and after each rollback, which bounds the tokens to replay. Earlier spans are kept,
because universal assistants tokenize the text again and may roll back more tokens than they added. Short spans are
joined, so a layer has at most three.

Convolution states are replayed together with recurrent states and keep their width; both are updated in place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..upstream.tensors import version

# The number of tokens that can always be rolled back. Spans of at least this length are not joined.
RECORDED = 64
_KEY = "_hf_gdn_history"  # in a cache layer's __dict__
Replay = Callable[[Any, Tensor, Tensor], Any]


class TokenRun(NamedTuple):
    """The tokens of one call.

    Attributes:
        projected: a named tuple of tensors ``[B, t, ...]`` or None.
        real: ``[T]``, true for the t positions of the call that hold tokens, false for padding; None if t = T.
        length: T.
    """

    projected: Any
    real: Tensor | None
    length: int

    def take(self, count: int) -> TokenRun:
        """The first `count` positions."""
        if count == self.length:
            return self
        kept = count if self.real is None else int(self.real[:count].sum())
        projected = type(self.projected)(*(x if x is None else x[:, :kept] for x in self.projected))
        return TokenRun(projected, None if self.real is None else self.real[:count], count)


@dataclass
class History:
    """A span: copies of a layer's states before some tokens, and these tokens.

    Args:
        current: the layer's own convolution and recurrent state, after the tokens.
        versions: version counters of these two tensors after the tokens.
        conv_state, state: copies of them from before the first token.
        empty: whether the layer held no tokens before the first one.
        runs: the tokens of the span.
        replay: ``replay(projected, conv_state, state)`` updates both states in place; None until it is known.
        earlier: the previous span, if it is kept (`_next_span`).
    """

    current: tuple[Tensor, Tensor]
    versions: tuple[int, ...]
    conv_state: Tensor
    state: Tensor
    empty: bool
    runs: list[TokenRun]
    replay: Replay | None = None
    earlier: History | None = None

    def __len__(self) -> int:
        return sum([run.length for run in self.runs])

    @property
    def max_rollback(self) -> int:
        """Number of tokens that can be rolled back."""
        return len(self) + (0 if self.earlier is None else self.earlier.max_rollback)

    def __deepcopy__(self, memo: dict[int, Any]) -> History:
        current, earlier = copy.deepcopy((self.current, self.earlier), memo)
        states = self.conv_state.clone(), self.state.clone()
        return History(current, _versions(current), *states, self.empty, list(self.runs), self.replay, earlier)

    def take(self, count: int) -> list[TokenRun]:
        """The first `count` positions."""
        found = []
        for run in self.runs:
            if count <= 0:
                break
            found.append(run.take(min(count, run.length)))
            count -= run.length
        return found

    def replay_tokens(self, runs: list[TokenRun], conv_state: Tensor, state: Tensor) -> None:
        """Replay tokens: update both states in place."""
        assert self.replay is not None
        for run in runs:
            if run.projected[0].shape[1] > 0:
                self.replay(run.projected, conv_state, state)


def _versions(tensors: tuple[Tensor, Tensor]) -> tuple[int, ...]:
    return tuple(map(version, tensors))


def history_of(layer: Any) -> History | None:
    """The recorded history of a cache layer; None if there is none or other code has modified the states since."""
    history = layer.__dict__.get(_KEY)
    if history is None:
        return None
    if history.current[0] is not layer.conv_states[0] or history.current[1] is not layer.recurrent_states[0]:
        return None
    return history if history.versions == _versions(history.current) else None


def _next_span(history: History, conv_state: Tensor, state: Tensor) -> History:
    """Start the span that follows `history`. The two states at its beginning are stored, not copied."""
    closed = history.earlier
    if closed is None or len(closed) >= RECORDED:
        closed = history
    else:
        closed.runs += history.runs
    if len(closed) >= RECORDED:
        closed.earlier = None
    return History(history.current, history.versions, conv_state, state, False, [], history.replay, closed)


def begin_recording(layer: Any, conv_state: Tensor, state: Tensor, length: int) -> History:
    """Call before a recording layer processes `length` tokens. If the layer is empty, pass states of zeros."""
    history = history_of(layer) if layer.has_previous_state[0] else None
    if history is None:
        empty = not layer.has_previous_state[0]
        copies = (conv_state, state) if empty else (conv_state.clone(), state.clone())  # zeros belong to this call
        return History((conv_state, state), (), *copies, empty, [])
    if history.runs and (length > 1 or len(history) >= RECORDED):  # several tokens are a draft, which may be rejected
        history = layer.__dict__[_KEY] = _next_span(history, conv_state.clone(), state.clone())
    return history


def record(layer: Any, history: History, projected: Any, real: Tensor | None) -> None:
    """Call after the layer has processed the tokens; arguments as in `TokenRun`."""
    history.current = layer.conv_states[0], layer.recurrent_states[0]
    history.versions = _versions(history.current)
    history.runs.append(TokenRun(projected, real, projected[0].shape[1] if real is None else len(real)))
    layer.__dict__[_KEY] = history


def discard(layer: Any) -> None:
    """Delete the history. Call when a layer processes tokens that are not recorded."""
    layer.__dict__.pop(_KEY, None)


def _roll_back(layer: Any, history: History, count: int) -> History:
    """Roll back `count` tokens, at most `max_rollback`. Returns the layer's new history."""
    if count == 0:
        return history
    while count > len(history):
        assert history.earlier is not None
        count, history = count - len(history), history.earlier
    runs = history.take(len(history) - count)
    conv_state, state = history.conv_state.clone(), history.state.clone()
    history.replay_tokens(runs, conv_state, state)
    current = layer.conv_states[0], layer.recurrent_states[0]
    current[0].copy_(conv_state)
    current[1].copy_(state)
    layer.has_previous_state[0] = bool(runs) or not history.empty
    history.runs = runs
    if runs:
        history = _next_span(history, conv_state, state)
    history.current, history.versions = current, _versions(current)
    return history


def make_crop(original: Callable[[Any, int], None]) -> Callable[[Any, int], None]:
    """Make the method that replaces ``crop`` of linear-attention cache layers."""

    def crop(self: Any, tokens_to_remove: int) -> None:
        """Roll back the last `-tokens_to_remove` tokens, including recurrent states.

        Raises:
            RuntimeError: the layer does not record its past, or has recorded fewer tokens. Nothing is changed.
        """
        if not self.record_past or tokens_to_remove > 0:
            return original(self, tokens_to_remove)  # raises an error
        history, count = history_of(self), -int(tokens_to_remove)  # generate() passes tensors
        recorded = 0 if history is None else history.max_rollback
        if count > recorded and any(self.is_recurrent_states_initialized.values()):
            raise RuntimeError(
                f"crop({tokens_to_remove}) rolls back {count} tokens, the layer has recorded {recorded}; after "
                f"activate_past_recording(), patched models record at least the last {RECORDED} tokens, without "
                "gradients and of several rows only without padding"
            )
        discard(self)
        if history is not None:
            history = self.__dict__[_KEY] = _roll_back(self, history, count)
        # The other convolution states of a layer: transformers keeps the whole past in them.
        for i, states in self.conv_states.items():
            if states is not None and (i > 0 or history is None):
                end = states.shape[-1] - count
                width = self.conv_kernel_size[i] + (0 if history is None else history.max_rollback)
                self.conv_states[i] = states[..., max(0, end - width) : end]

    return crop


def make_is_croppable(original: property) -> property:
    """Make the property that replaces ``is_croppable`` of linear-attention cache layers.

    ``generate`` reads it after the prefill of assisted decoding.
    """

    def is_croppable(self: Any) -> bool:
        """Whether `crop` can roll back tokens: true while the layer records its past."""
        return bool((self.record_past and history_of(self) is not None) or original.__get__(self))

    return property(is_croppable)


# Attribute of a linear-attention cache layer -> function that makes its replacement from the original.
METHODS: dict[str, Callable[[Any], Any]] = {"crop": make_crop, "is_croppable": make_is_croppable}
