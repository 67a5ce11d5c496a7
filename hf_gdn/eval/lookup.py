"""Prompt lookup against plain decoding: prompts whose drafts are accepted, and prompts whose drafts are not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..drafting.mtp import MtpDrafts
from ..upstream import seams

# By name, what stands behind the prompt's tokens: a quarter of them said four times, which a model goes on with; the
# text as it is; ids drawn at random; the text, with random drafts in place of those that lookup finds.
PROMPTS = ("repetitive", "text", "random", "refused")


def prompt(kind: str, text: Tensor, vocabulary: int, seed: int = 0) -> Tensor:
    """A prompt ``[1, T]`` of a kind, from one of plain text; `seed` of random ids."""
    length = text.shape[1]
    if kind == "repetitive":
        return text[:, : -(-length // 4)].repeat(1, 4)[:, :length]
    if kind == "random":
        return torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(seed))
    return text


@contextlib.contextmanager
def random_mtp_drafts(vocabulary: int) -> Iterator[None]:
    """What a head drafts is replaced likewise, after it has computed its own."""
    original = MtpDrafts._choose

    def choose(self: Any, logits: Tensor) -> Tensor:
        original(self, logits)
        return torch.randint(vocabulary, (1, 1), device=logits.device)

    MtpDrafts._choose = choose  # type: ignore[method-assign]
    try:
        yield
    finally:
        MtpDrafts._choose = original  # type: ignore[method-assign]


@contextlib.contextmanager
def random_drafts(vocabulary: int) -> Iterator[None]:
    """What prompt lookup finds is replaced with ids drawn at random, which the model all but never accepts."""
    cls = seams.prompt_lookup_class()
    original = cls.get_candidates

    def get_candidates(self: Any, input_ids: Tensor, **_: Any) -> Any:
        draft = torch.randint(vocabulary, (1, self.num_output_tokens), device=input_ids.device)
        return torch.cat((input_ids, draft), 1), None

    cls.get_candidates = get_candidates
    try:
        yield
    finally:
        cls.get_candidates = original
