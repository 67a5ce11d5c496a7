"""Speculative decoding that continues from a cache which already holds text.

``generate`` skips the tokens that a cache holds, except in assisted decoding, whose first forward reads the whole
prompt again behind them: the generated tokens are then wrong. Here that forward reads the tokens after the cache only,
whatever drafts the tokens. What cannot be continued is refused before anything is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from ..caches import rollback
from ..upstream import cache_names, seams
from .stopping import stop_in_drafts

# The cache from which assisted decoding continues, during `generate`; None otherwise.
_continued: ContextVar[Any] = ContextVar("hf_gdn_continued", default=None)


def _held(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _would_be_cut(input_ids: Tensor, mask: Tensor) -> bool:
    """Whether assisted decoding would cut a mask to `input_ids`. Raises ValueError if it has padding, too."""
    if mask.shape[1] <= input_ids.shape[1]:
        return False
    if not mask.all():
        raise ValueError(
            f"assisted decoding of a padded prompt needs input_ids as long as the attention_mask, {mask.shape[1]} "
            f"tokens; got {input_ids.shape[1]}"
        )
    return True


def _check_processors(processors: Any) -> None:
    """Raise ValueError for a processor that reads the text with a cache of its own, which cannot roll tokens back."""
    if any(isinstance(one, seams.guidance_class()) for one in processors or ()):
        raise ValueError(
            "guidance_scale cannot be used with drafts: its cache of the text is not rolled back; leave one of them out"
        )


def make_assisted_decoding(_: Any) -> Callable[..., Any]:
    """Make the method of a patched family that overrides GenerationMixin's."""
    original = getattr(seams.generation_class(), seams.ASSISTED)

    @functools.wraps(original)  # generate() looks at its arguments
    def assisted_decoding(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        _check_processors(kwargs.get("logits_processor"))
        cache, mask, embeds = cache_names.look(kwargs), kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
        stopping = stop_in_drafts(kwargs, cache, input_ids.shape[1])
        length = getattr(kwargs.get("generation_config"), "_mask_length", None) if mask is None else mask.shape[1]
        if mask is not None and _would_be_cut(input_ids, mask):
            del kwargs["attention_mask"]
        prompt, held = input_ids if embeds is None else embeds, _held(cache)
        check = getattr(cache, "check_drafts", None)
        if check is not None:
            check(kwargs["generation_config"].max_length)
        if length not in (None, prompt.shape[1]):
            cache = None  # generate() takes such a prompt for the tokens after the cache
        elif held >= prompt.shape[1]:
            raise ValueError(
                f"assisted decoding from a cache that holds {held} tokens needs a prompt of these tokens and at least "
                f"one more, got {prompt.shape[1]}"
            )
        token = _continued.set(cache)
        try:
            with rollback.assisted():
                out = getattr(seams.generation_class(), seams.ASSISTED)(self, input_ids, *args, **kwargs)
        finally:
            _continued.reset(token)
        return out if stopping is None else stopping.cut(out)

    return assisted_decoding


def check_generator(generator: Any) -> None:
    """Raise ValueError for a draft generator that needs the model's outputs for the text that the cache holds."""
    held = _held(_continued.get())
    if held > 0 and getattr(generator, "requires_model_outputs", False):
        raise ValueError(
            f"{type(generator).__name__} drafts from the model's outputs for the whole prompt; the cache already holds "
            f"{held} tokens of it, so pass an empty cache"
        )


def make_prepare_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Make the method that replaces GenerationMixin's ``prepare_inputs_for_generation``."""

    @functools.wraps(original)
    def prepare_inputs_for_generation(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = _continued.get()
        first = cache is not None and cache_names.look(kwargs) is cache and kwargs.get("is_first_iteration")
        if first and not args and kwargs.get("next_sequence_length") is None:
            embeds = kwargs.get("inputs_embeds")
            kwargs["next_sequence_length"] = (input_ids if embeds is None else embeds).shape[1] - _held(cache)
        return original(self, input_ids, *args, **kwargs)

    return prepare_inputs_for_generation
