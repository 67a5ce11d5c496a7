"""Prompt lookup whose draft length adapts to the acceptance rate (`pace`).

transformers drafts a fixed number of tokens whenever it finds the last tokens earlier in the text.
"""

from __future__ import annotations

from typing import Any

from ..caches import rollback
from .pace import Pace

_SHORTEST = 2  # draft; it costs nothing to make
_MEMORY = 0.6  # short, for drafts are right as long as the text repeats, and not afterwards


class AdaptivePromptLookup:
    """Wraps transformers' `PromptLookupCandidateGenerator`; its ``num_output_tokens`` is the longest draft."""

    def __init__(self, lookup: Any) -> None:
        self.lookup = lookup
        self.longest = lookup.num_output_tokens
        self.pace, self.drafted = Pace(self.longest, cost=0.0, shortest=_SHORTEST, memory=_MEMORY), 0

    def __getattr__(self, name: str) -> Any:
        """Delegate everything else to the wrapped generator."""
        return getattr(self.lookup, name)

    def get_candidates(self, input_ids: Any, **kwargs: Any) -> Any:
        candidates, logits = input_ids, None
        length = min(self.pace.length(), self.lookup.max_length - input_ids.shape[1] - 1)
        if length > 0:
            self.lookup.num_output_tokens = length
            candidates, logits = self.lookup.get_candidates(input_ids, **kwargs)
        self.drafted = candidates.shape[1] - input_ids.shape[1]
        rollback.record_forwards(self.drafted > 0)
        return candidates, logits

    def update_candidate_strategy(self, input_ids: Any, scores: Any, num_matches: int) -> None:
        self.lookup.update_candidate_strategy(input_ids, scores, num_matches)
        self.pace.learn(self.drafted, int(num_matches))
