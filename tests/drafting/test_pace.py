"""Drafts are as long as pays, and rare where none pays."""

from itertools import pairwise

import pytest

from hf_gdn.drafting.pace import LONGEST_PAUSE, READING, VERIFYING, Pace


def drafted(pace, accepted, tokens):
    """Lengths of drafts while `tokens` are generated; of each, `accepted` tokens are right at most."""
    found, new = [], 0
    while new < tokens:
        length = pace.length()
        right = min(accepted, length)
        pace.learn(length, right)
        found.append(length)
        new += 1 + right
    return found


@pytest.mark.parametrize("cost", [0.0, 0.03, 0.4])
def test_rejected_drafts_become_short_and_rare(cost):
    pace = Pace(10, cost=cost)
    found = drafted(pace, 0, 1000)
    at = [i for i, length in enumerate(found) if length]
    lengths = [found[i] for i in at]
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] == 1
    pauses = [later - earlier - 1 for earlier, later in pairwise(at)]
    assert pauses == sorted(pauses) and pauses[-1] == LONGEST_PAUSE
    lost = sum(VERIFYING + length * (READING + cost) for length in found if length)
    assert lost < 0.03 * 1000
    assert pace.drafts == len(at) and pace.drafted == sum(found) and pace.accepted == 0


def test_free_drafts_that_are_right_are_long():
    pace = Pace(10, cost=0.0, shortest=2, memory=0.6)
    drafted(pace, 0, 300)
    pace.waiting = 0
    found = drafted(pace, 10, 50)
    assert found[0] == 2 and found[2:] == [10] * len(found[2:])  # two right ones bring long drafts back


def test_the_length_yields_most():
    """Against a search with the same model of time, for some shares of accepted tokens."""
    for right in range(1, 20):
        pace = Pace(6, cost=0.1)
        pace._right, pace._tried = right, 20
        rates = [
            sum((right / 20) ** i for i in range(n + 1)) / (1 + (VERIFYING + n * (READING + 0.1)) * (n > 0))
            for n in range(7)
        ]
        assert pace._best() == rates.index(max(rates))
