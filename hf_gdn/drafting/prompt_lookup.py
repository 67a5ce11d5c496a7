"""Prompt lookup whose draft length adapts to the acceptance rate.

transformers drafts a fixed number of tokens whenever it finds the last tokens earlier in the text. Verifying a draft is
not free: its tokens use additional experts, go through the recurrence, and rejected ones are rolled back. So drafts
become shorter and less frequent when they are rejected, and long again when they are accepted. The generated tokens do
not depend on the drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..upstream import seams

PROBE = 2  # draft length after a draft that was rejected completely
LONGEST_PAUSE = 32  # longest pause between drafts, in tokens


class AdaptivePromptLookup:
    """Wraps transformers' `PromptLookupCandidateGenerator`; its ``num_output_tokens`` is the longest draft.

    After a draft without an accepted token, the next draft has `PROBE` tokens. After two and more such drafts in a row,
    drafting pauses for 1, 2, 4 ... `LONGEST_PAUSE` tokens. After an accepted token, drafts are long again.
    """

    def __init__(self, lookup: Any) -> None:
        self.lookup = lookup
        self.longest = lookup.num_output_tokens
        self.refusals, self.waiting, self.drafted = 0, 0, 0

    def __getattr__(self, name: str) -> Any:
        """Delegate everything else to the wrapped generator."""
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
    """Make the method of a patched family that overrides GenerationMixin's."""

    def get_candidate_generator(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = getattr(seams.generation_class(), seams.CANDIDATES)(self, *args, **kwargs)
        return AdaptivePromptLookup(found) if type(found) is seams.prompt_lookup_class() else found

    return get_candidate_generator
