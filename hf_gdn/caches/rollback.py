"""Roll back tokens in linear-attention cache layers: recording, and `crop`.

A recurrent state cannot be reversed, so something must be stored for every token that may be rolled back. In
Qwen3-Next, a copy of the state takes 2 MiB per token and layer, the outputs of the token's projections take 24 KiB.
Replaying a few tokens costs as much as decoding them, and is needed only when tokens are rejected. So a layer stores a
copy of its states and the projections of the tokens since then (a *span*), and `crop` replays the tokens that are kept.

A new span starts before each draft and after each rollback, which bounds the tokens to replay. Earlier spans are kept,
because universal assistants tokenize the text again and may roll back more tokens than they added. Short spans are
joined, so a layer has at most three.

Convolution states are replayed together with recurrent states and keep their width; both are updated in place.

The drafts of `generate` record only the forwards that read a draft (`record_forwards`): others have nothing to reject.

A forward or a `crop` that raises half-way, Ctrl-C included, has moved some layers and not others. `guarded` notices it;
the cache is then refused until it is reset or restored. What raises between the two, a streamer for example, would
leave a draft in the cache that nobody has verified: `assisted` rolls it back.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..upstream.tensors import version

# The number of tokens that can always be rolled back. Spans of at least this length are not joined.
RECORDED = 64
_KEY = "_hf_gdn_history"  # in a cache layer's __dict__
_TORN = "_hf_gdn_torn"  # in the __dict__ of the layers of a cache whose layers hold different numbers of tokens
_UNRECORDED = "_hf_gdn_unrecorded"  # in a cache layer's __dict__: how many calls it did not record
Replay = Callable[[Any, Tensor, Tensor], Any]


@dataclass
class _Assisted:
    """A call of assisted decoding.

    Attributes:
        recorded: whether the next forward has to be recorded.
        unverified: the cache whose last forward may have read a draft, and the number of tokens it held before; None
            after its `crop`.
        verified: the cache that was cropped last; None after `newly_verified`.
    """

    recorded: bool = True
    unverified: tuple[Any, int] | None = None
    verified: Any = None


_assisted: ContextVar[_Assisted | None] = ContextVar("hf_gdn_assisted", default=None)


@contextlib.contextmanager
def assisted() -> Iterator[None]:
    """Assisted decoding, in which `record_forwards` has an effect."""
    now = _Assisted()
    token = _assisted.set(now)
    try:
        yield
    except BaseException:
        if now.unverified is not None:
            take_back(*now.unverified)
        raise
    finally:
        _assisted.reset(token)


def take_back(cache: Any, length: int) -> None:
    """Roll a cache back to a number of tokens; where that fails, it is refused from then on."""
    try:
        cache.crop(length - int(cache.get_seq_length()))
    except Exception:
        _tear(_recording_layers(cache))


def record_forwards(needed: bool) -> None:
    """Say whether the next forwards have to be recorded: whether they read tokens that may be rejected."""
    found = _assisted.get()
    if found is not None:
        found.recorded = needed


def _unneeded() -> bool:
    found = _assisted.get()
    return found is not None and not found.recorded


def records(layer: Any) -> bool:
    """Whether a call of a cache layer has to be recorded."""
    return bool(layer.record_past) and not _unneeded()


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

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A pickled cache has no history: `replay` refers to the layer's weights, which belong to the process."""
        return type(None), ()

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
    """Delete the history. Call when a layer that records processes tokens that are not recorded."""
    held = layer.__dict__
    held.pop(_KEY, None)
    held[_UNRECORDED] = held.get(_UNRECORDED, 0) + 1


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


def _recording_layers(cache: Any) -> list[Any]:
    """The layers of a cache that have recurrent states and record their past."""
    layers = getattr(cache, "layers", ())
    return [layer for layer in layers if hasattr(layer, "recurrent_states") and layer.record_past]


def check_whole(layers: list[Any]) -> None:
    """Raise RuntimeError if a forward or a `crop` of these layers' cache was interrupted."""
    if any(_TORN in vars(layer) and layer.has_previous_state[0] for layer in layers):
        raise RuntimeError(
            "an earlier forward or crop with this cache was interrupted, so its layers differ in length: "
            "reset() it, restore a snapshot, or make a new one"
        )


def check_cache(cache: Any) -> None:
    """`check_whole` for the layers of a cache that record their past."""
    check_whole(_recording_layers(cache))


def _tear(layers: list[Any]) -> None:
    """Refuse the cache of these layers until it is reset or restored."""
    for layer in layers:
        discard(layer)
        vars(layer)[_TORN] = True


def _progress(cache: Any) -> list[Any]:
    """A value for each layer that changes when the layer takes or loses tokens."""
    found = []
    for layer in cache.layers:
        recurrent, history = getattr(layer, "recurrent_states", {}).get(0), vars(layer).get(_KEY)
        held = None if recurrent is None else (id(recurrent), version(recurrent), layer.has_previous_state[0])
        # Compiled kernels count no versions.
        recorded = vars(layer).get(_UNRECORDED) if history is None else (id(history), len(history))
        found.append((held, recorded, getattr(layer, "keys", None) is None or layer.keys.shape))
    return found


@contextlib.contextmanager
def guarded(cache: Any) -> Iterator[None]:
    """Use a cache in a forward or a `crop`. One that records its past and is left half changed is refused afterwards.

    Raises:
        RuntimeError: it was left half changed before.
    """
    layers = _recording_layers(cache)
    if not layers:
        yield
        return
    check_whole(layers)
    for layer in layers:
        vars(layer).pop(_TORN, None)  # of a cache that was reset since
    before, call = _progress(cache), _assisted.get()
    unverified = (cache, int(cache.get_seq_length())) if call is not None and call.recorded else None
    try:
        yield
    except BaseException:
        if _progress(cache) != before:
            _tear(layers)
        raise
    if call is not None:
        call.unverified = unverified


def _check_crop(layer: Any, count: int) -> None:
    """Raise RuntimeError if a layer cannot roll back `count` tokens."""
    check_whole([layer])
    history = history_of(layer)
    recorded = 0 if history is None else history.max_rollback
    if count > recorded and any(layer.is_recurrent_states_initialized.values()):
        raise RuntimeError(
            f"crop(-{count}) rolls back {count} tokens, the layer has recorded {recorded}; after "
            f"activate_past_recording(), patched models record at least the last {RECORDED} tokens, without "
            "gradients and of several rows only without padding"
        )


def make_cache_crop(original: Callable[[Any, int], None]) -> Callable[[Any, int], None]:
    """Make the method that replaces ``crop`` of caches: no layer is changed if one cannot roll back."""

    @functools.wraps(original)
    def crop(self: Any, tokens_to_remove: int) -> None:
        if isinstance(tokens_to_remove, int) and tokens_to_remove == 0:
            original(self, 0)  # shortens what holds more than it needs
            return _verified(self)
        with guarded(self):
            recording = _recording_layers(self) if tokens_to_remove <= 0 else []
            for layer in recording:
                _check_crop(layer, -int(tokens_to_remove))
            lost = [
                layer for layer in self.layers if layer not in recording and not getattr(layer, "is_croppable", True)
            ]
            if recording and lost:
                name = type(lost[0]).__name__
                raise RuntimeError(f"crop({tokens_to_remove}): a {name} whose window has moved on cannot be cropped")
            original(self, tokens_to_remove)
        _verified(self)

    return crop


def _verified(cache: Any) -> None:
    """The cache holds no draft any more."""
    call = _assisted.get()
    if call is None:
        return
    call.verified = cache
    if call.unverified is not None and call.unverified[0] is cache:
        call.unverified = None


def newly_verified(cache: Any) -> bool:
    """Whether a draft of assisted decoding was verified since this was asked last."""
    call = _assisted.get()
    if call is None or call.verified is not cache:
        return False
    call.verified = None
    return True


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
        _check_crop(self, count)
        self.__dict__.pop(_KEY, None)
        if history is not None:
            history = self.__dict__[_KEY] = _roll_back(self, history, count)
        # The other convolution states of a layer: transformers keeps the whole past in them.
        for i, states in self.conv_states.items():
            if states is not None and (i > 0 or history is None):
                end = states.shape[-1] - count
                first = max(0, end - self.conv_kernel_size[i] - (0 if history is None else history.max_rollback))
                if first > 0 or count > 0:
                    self.conv_states[i] = states[..., first:end]

    return crop


def make_is_croppable(original: property) -> property:
    """Make the property that replaces ``is_croppable`` of linear-attention cache layers.

    ``generate`` reads it after the prefill of assisted decoding.
    """

    def is_croppable(self: Any) -> bool:
        """Whether `crop` can roll back tokens: true while the layer records its past."""
        recording = self.record_past and (history_of(self) is not None or _unneeded())
        return bool(recording or original.__get__(self))

    return property(is_croppable)


# Whether a forward runs whose static cache records its past.
_static: ContextVar[bool] = ContextVar("hf_gdn_static", default=False)


def is_static(cache: Any) -> bool:
    """Whether a cache records its past and has layers of fixed size."""
    layers = getattr(cache, "layers", ())
    return any(getattr(layer, "record_past", False) for layer in layers) and any(
        layer.is_compileable for layer in layers if not hasattr(layer, "record_past")
    )


@contextlib.contextmanager
def masked_as_static() -> Iterator[None]:
    """A forward with such a cache: single tokens get a mask, too.

    transformers leaves it out for caches that cannot be compiled, and linear layers that record cannot; so queries
    would attend to slots that hold no token yet.
    """
    token = _static.set(True)
    try:
        yield
    finally:
        _static.reset(token)


def make_is_compileable(original: property) -> property:
    """Make the property that replaces ``is_compileable`` of linear-attention cache layers.

    It is swapped only where it is a property; where it is a constant, static caches cannot roll back.
    """
    get: Any = original.fget  # torch.compile follows functions, not properties, that a function refers to

    def is_compileable(self: Any) -> bool:
        if torch.compiler.is_compiling():
            return bool(get(self))
        return bool(get(self) or _static.get())

    return property(is_compileable)


# Attribute of a linear-attention cache layer, and of a cache -> function that makes its replacement from the original.
METHODS: dict[str, Callable[[Any], Any]] = {
    "crop": make_crop,
    "is_croppable": make_is_croppable,
}
CACHE_METHODS: dict[str, Callable[[Any], Any]] = {"crop": make_cache_crop}
