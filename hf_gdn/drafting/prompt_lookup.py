"""Drafts of prompt lookup that cost little where they are refused.

transformers drafts the same number of tokens whenever the last one stands somewhere in the text, right or not. Reading
a draft is not free: its tokens go to experts of their own and through the recurrence, and states are taken back. So
drafts become short and rare where they are refused, and long again where they are right. Which tokens come out does not
depend on what was drafted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..upstream import seams

PROBE = 2  # tokens of a draft after one of which nothing was right
LONGEST_PAUSE = 32  # tokens


class AdaptivePromptLookup:
    """transformers' `PromptLookupCandidateGenerator`, whose ``num_output_tokens`` become the longest draft.

    After a draft of which no token was right drafts have `PROBE` tokens; after two such drafts there is none for 1, 2,
    4 ... `LONGEST_PAUSE` tokens. Where a token was right, drafts are long again.
    """

    def __init__(self, lookup: Any) -> None:
        self.lookup = lookup
        self.longest = lookup.num_output_tokens
        self.refusals, self.waiting, self.drafted = 0, 0, 0

    def __getattr__(self, name: str) -> Any:
        """Everything else that ``generate`` asks a candidate generator for is the wrapped one's."""
        return getattr(self.lookup, name)

    def get_candidates(self, input_ids: Any, **kwargs: Any) -> Any:
        self.drafted = 0
        if self.waiting > 0:
            self.waiting -= 1
            return input_ids, None
        self.lookup.num_output_tokens = min(PROBE, self.longest) if self.refusals else self.longest
        candidates, logits = self.lookup.get_candidates(input_ids, **kwargs)
        self.drafted = candidates.shape[1] - input_ids.shape[1]
        return candidates, logits

    def update_candidate_strategy(self, input_ids: Any, scores: Any, num_matches: int) -> None:
        self.lookup.update_candidate_strategy(input_ids, scores, num_matches)
        if self.drafted > 0:
            self.refusals = 0 if num_matches > 0 else min(self.refusals + 1, LONGEST_PAUSE)
            self.waiting = min(1 << self.refusals >> 2, LONGEST_PAUSE)


def make_get_candidate_generator(_: Any) -> Callable[..., Any]:
    """The method that stands before GenerationMixin's in a patched family."""

    def get_candidate_generator(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = getattr(seams.generation_class(), seams.CANDIDATES)(self, *args, **kwargs)
        return AdaptivePromptLookup(found) if type(found) is seams.prompt_lookup_class() else found

    return get_candidate_generator
