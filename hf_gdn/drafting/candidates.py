"""Which generator of drafts ``generate`` gets: ours for prompt lookup and multi-token prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..upstream import seams
from .continued import check_generator
from .mtp import MtpDrafts
from .mtp_head import head_of
from .prompt_lookup import AdaptivePromptLookup


def make_get_candidate_generator(why_no_mtp: str | None) -> Callable[[Any], Callable[..., Any]]:
    """Make the maker of the method of a patched family that overrides GenerationMixin's.

    Args:
        why_no_mtp: which family's models cannot draft with a head of their own, and why; None if they can.
    """

    def make(_: Any) -> Callable[..., Any]:
        def get_candidate_generator(self: Any, *args: Any, **kwargs: Any) -> Any:
            options = args[0] if args else kwargs.get("generation_config")
            if getattr(options, "use_mtp", None) and getattr(options, "prompt_lookup_num_tokens", None) is None:
                if why_no_mtp is not None:
                    raise ValueError(f"use_mtp=True is not supported: {why_no_mtp}")
                return MtpDrafts(self, head_of(self), options, kwargs.get("logits_processor"))
            found = getattr(seams.generation_class(), seams.CANDIDATES)(self, *args, **kwargs)
            check_generator(found)
            return AdaptivePromptLookup(found) if type(found) is seams.prompt_lookup_class() else found

        return get_candidate_generator

    return make
