"""Stopping criteria inside a draft.

transformers asks them after each forward, whose accepted draft may go past the token at which plain decoding stops.
Here they are asked for every token, and what is behind the first stop is cut off: tokens, scores, cache, streamed text.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StoppingCriteriaList

from ..caches import rollback

# transformers cuts a draft at these itself, or they do not depend on the text.
_KNOWN = (MaxLengthCriteria, EosTokenCriteria, MaxTimeCriteria)
_PER_TOKEN = ("scores", "logits", "attentions", "hidden_states")  # of what generate() returns


class _Held:
    """A streamer that gets tokens only after the criteria have seen them."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._tokens: Tensor | None = None

    def put(self, tokens: Tensor) -> None:
        self.release()
        self._tokens = tokens

    def release(self, count: int | None = None) -> None:
        if self._tokens is not None:
            self._streamer.put(self._tokens[:, :count])
            self._tokens = None

    def end(self) -> None:
        self.release()
        self._streamer.end()


class StopInDrafts(StoppingCriteriaList):  # type: ignore[misc]
    """Criteria that are asked for every token of a draft.

    Args:
        criteria: of the call of ``generate``.
        cache: of the call.
        length: of the prompt.
        streamer: of the call, or None.

    Attributes:
        stop: the length of the text at which one of them stopped it, or None.
        streamer: to be used in place of the one given.
    """

    def __init__(self, criteria: Any, cache: Any, length: int, streamer: Any) -> None:
        super().__init__(criteria)
        self._cache = cache
        self.stop: int | None = None
        self.streamer = None if streamer is None else _Held(streamer)
        self._prompt = self._seen = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if not rollback.newly_verified(self._cache):
            # Some versions of transformers ask about a draft before they read it, and take a yes without one for one.
            found = super().__call__(input_ids, scores, **kwargs)
            return found & (input_ids.shape[1] > self._seen)
        first, done = self._seen, None
        for length in range(first + 1, input_ids.shape[1] + 1):
            known = scores[: length - self._prompt] if isinstance(scores, tuple) else scores
            done, self._seen = super().__call__(input_ids[:, :length], known, **kwargs), length
            if done.any():
                self.stop = length
                break
        if self.streamer is not None:
            self.streamer.release(self._seen - first)
        return done

    def cut(self, out: Any) -> Any:
        """What ``generate`` returns, up to the stop; the cache is rolled back to it."""
        sequences = out if isinstance(out, Tensor) else out.sequences
        if self.stop is None or self.stop == sequences.shape[1]:
            return out
        beyond = sequences.shape[1] - self.stop
        rollback.take_back(self._cache, int(self._cache.get_seq_length()) - beyond)
        if isinstance(out, Tensor):
            return out[:, : self.stop]
        out["sequences"] = sequences[:, : self.stop]
        for name in _PER_TOKEN:
            if out.get(name) is not None:
                out[name] = out[name][: self.stop - self._prompt]
        return out


def stop_in_drafts(kwargs: dict[str, Any], cache: Any, length: int) -> StopInDrafts | None:
    """Replace the criteria and the streamer among a call's arguments; None where transformers' own do.

    Args:
        kwargs: of assisted decoding; changed in place.
        cache: of the call.
        length: of the prompt.
    """
    criteria = kwargs.get("stopping_criteria") or ()
    if all(type(one) in _KNOWN for one in criteria):
        return None
    found = StopInDrafts(criteria, cache, length, kwargs.get("streamer"))
    kwargs["stopping_criteria"] = found
    if found.streamer is not None:
        kwargs["streamer"] = found.streamer
    return found
