"""How many tokens to draft: as many as pay, judged by how many were accepted, and none for a while where none pays.

The generated tokens do not depend on it. With p the share of drafted tokens that are accepted where all before them
were, a draft of n tokens yields 1 + p + ... + p^n tokens. It takes, in plain decoding steps,

    1 + VERIFYING + n (READING + cost)

with `cost` the time to draft a token. The draft is the one with the most tokens for its time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# In plain decoding steps: what a forward with a draft takes more than one without (recording, rolling back), and each
# drafted token in it. Measured on the embedded models on a CPU.
VERIFYING, READING = 0.26, 0.06
# Where no draft pays, a short one is tried after a pause of so many tokens, and each that is rejected makes the next
# pause so many times as long, up to the longest.
FIRST_PAUSE, GROWTH, LONGEST_PAUSE = 3, 3, 64
# What is known at first, as if 5 tokens had been drafted.
_ACCEPTED, _TRIED = 4.0, 5.0


_watched: ContextVar[list[Pace] | None] = ContextVar("hf_gdn_watched", default=None)


@contextmanager
def watching() -> Iterator[list[Pace]]:
    """Collect the paces of calls of ``generate`` in a list, for their counts."""
    found: list[Pace] = []
    token = _watched.set(found)
    try:
        yield found
    finally:
        _watched.reset(token)


class Pace:
    """Draft lengths.

    Args:
        longest: of drafts.
        cost: of drafting a token, in plain decoding steps.
        shortest: length of a draft that finds out whether drafts pay again.
        memory: how much of what was known a draft leaves; 0 to 1.

    Attributes:
        drafts, drafted, accepted: drafts so far, their tokens, and those of them that were accepted.
    """

    def __init__(self, longest: int, *, cost: float, shortest: int = 1, memory: float = 0.9) -> None:
        self.longest, self.cost, self.shortest, self.memory = longest, cost, min(shortest, longest), memory
        self.drafts, self.drafted, self.accepted = 0, 0, 0
        self.waiting, self._pause = 0, FIRST_PAUSE
        self._right, self._tried = _ACCEPTED, _TRIED
        watched = _watched.get()
        if watched is not None:
            watched.append(self)

    def _best(self) -> int:
        """The length that yields the most tokens for its time; 0 if that is none."""
        p, tokens, found, best = self._right / self._tried, 1.0, 0, 1.0
        for n in range(1, self.longest + 1):
            tokens += p**n
            rate = tokens / (1 + VERIFYING + n * (READING + self.cost))
            if rate > best:
                found, best = n, rate
        return found

    def length(self) -> int:
        """Length of the next draft; 0 during a pause, which it shortens by a token."""
        if self.waiting > 0:
            self.waiting -= 1
            return 0
        return self._best() or self.shortest

    def learn(self, drafted: int, accepted: int) -> None:
        """Take note of what became of a draft of `drafted` tokens."""
        if drafted == 0:
            return
        self.drafts, self.drafted, self.accepted = self.drafts + 1, self.drafted + drafted, self.accepted + accepted
        self._right = self.memory * self._right + accepted
        self._tried = self.memory * self._tried + accepted + (accepted < drafted)
        if accepted > 0:
            self._pause = FIRST_PAUSE
        elif self._best() == 0:
            self.waiting = self._pause
            self._pause = min(self._pause * GROWTH, LONGEST_PAUSE)
