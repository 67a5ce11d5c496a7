"""Drafts by the multi-token-prediction head of a model's own checkpoint, for ``generate(use_mtp=True)``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..caches import rollback
from ..upstream import mtp
from .mtp_head import MtpHead
from .mtp_layer import HeadCache, Rotary
from .pace import Pace

LONGEST = 6  # draft, where num_assistant_tokens is not given
_THEIR_DEFAULT = 20  # what transformers sets num_assistant_tokens to where it is not given
# What it takes to draft a token, in layers of the model: one, the output head, and what each call of it costs. Measured
# on the embedded model on a CPU.
_LAYERS = 1.2


class MtpDrafts:
    """Generator of drafts with transformers' interface.

    The head reads every token of the text once, with the model's hidden states; what it read of a draft by its own
    outputs is dropped. While drafting pauses, hidden states are kept, and read before the next draft.

    Args:
        model, head: the model and its head.
        generation_config: of this call; ``num_assistant_tokens`` is the longest draft.
        logits_processor: applied to the head's logits, as to the model's.
    """

    requires_model_outputs = True

    def __init__(self, model: Any, head: MtpHead, generation_config: Any, logits_processor: Any) -> None:
        asked = generation_config.num_assistant_tokens
        longest = LONGEST if asked in (None, _THEIR_DEFAULT) else int(asked)
        self.pace = Pace(longest, cost=_LAYERS / len(model.get_decoder().layers))
        self.model_kwargs_overrides = mtp.last_hidden_states(all_of_them=bool(generation_config.output_hidden_states))
        self.drafted = 0
        self._model, self._head, self._cache = model, head, HeadCache()
        self._embed, self._output = model.get_input_embeddings(), model.get_output_embeddings()
        self._processors, self._sample = list(logits_processor or ()), bool(generation_config.do_sample)
        self._max_length, self._ends = generation_config.max_length, mtp.end_tokens(generation_config)
        self._unread: list[Tensor] = []  # hidden states of tokens that the head has not read
        self._ahead = 0  # tokens at the end of the head's cache that it read by its own outputs

    @torch.no_grad()
    def get_candidates(
        self,
        input_ids: Tensor,
        model_kwargs: dict[str, Any],
        model_outputs: Any,
        is_first_iteration: bool,
        n_last_matches: int,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Draft tokens behind `input_ids` ``[1, L]``.

        Returns:
            The tokens with the draft ``[1, L + n]``, and the logits of the draft ``[1, n, vocabulary]``; None for none.
        """
        tokens = logits = None
        if not is_first_iteration:  # in which there are no hidden states yet
            hidden = model_outputs.hidden_states[-1]
            known = self._unread or self._cache.length > 0
            read = int(n_last_matches) + 1
            # At first all, but for those of a prompt given as embeddings, whose tokens are unknown.
            self._unread.append(hidden[:, :read] if known else hidden[:, -input_ids.shape[1] :])
            length = min(self.pace.length(), self._max_length - input_ids.shape[1] - 1)
            if length > 0:
                tokens, logits = self._draft(input_ids, _positions(model_kwargs, input_ids), length)
        self.drafted = 0 if tokens is None else tokens.shape[1]
        rollback.record_forwards(self.drafted > 0)
        return (input_ids if tokens is None else torch.cat((input_ids, tokens), 1)), logits

    def _draft(self, text: Tensor, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        self._cache.drop(self._ahead)
        hidden = torch.cat(self._unread, 1) if len(self._unread) > 1 else self._unread[0]
        self._unread, count = [], hidden.shape[1]
        ahead = positions[..., -2:-1] + torch.arange(1, length, device=positions.device)
        rotary = Rotary.of(self._model, hidden, torch.cat((positions[..., -count - 1 : -1], ahead), -1))
        tokens, at = text[:, -count:], rotary.part(0, count)
        drafted: list[Tensor] = []
        logits: list[Tensor] = []
        while True:
            hidden = self._head.read(self._embed(tokens), hidden, at, self._cache)[:, -1:]
            logits.append(self._logits(hidden, text, drafted))
            tokens = self._choose(logits[-1])
            drafted.append(tokens)
            if len(drafted) == length:
                break
            at = rotary.part(count + len(drafted) - 1, count + len(drafted))
        self._ahead = length - 1
        found = torch.cat(drafted, 1)
        end = length if self._ends is None else _first(torch.isin(found[0], self._ends.to(found.device)), length)
        return found[:, :end], torch.stack(logits, 1)[:, :end]

    def _logits(self, hidden: Tensor, text: Tensor, drafted: list[Tensor]) -> Tensor:
        """``[1, vocabulary]``, processed as the model's are."""
        logits = self._output(hidden)[:, -1].to(text.device, torch.float32)
        if self._processors:
            known = torch.cat((text, *drafted), 1)
            for processor in self._processors:  # calling their list looks at every signature, which takes longer
                logits = processor(known, logits)
        return logits

    def _choose(self, logits: Tensor) -> Tensor:
        """A token ``[1, 1]``."""
        if self._sample:
            return torch.multinomial(logits.softmax(-1), 1)
        return logits.argmax(-1, keepdim=True)

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Take note of how many drafted tokens were accepted."""
        self.pace.learn(self.drafted, int(num_matches))


def _positions(model_kwargs: dict[str, Any], input_ids: Tensor) -> Tensor:
    """Positions ``[1, L]`` of the text, or ``[3, 1, L]`` of a multimodal one."""
    found = model_kwargs.get("position_ids")
    if found is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return found[1:] if found.ndim == 3 and len(found) == 4 else found  # the first are those of the text alone


def _first(ends: Tensor, length: int) -> int:
    """How many tokens to keep: up to the first that ends the text."""
    places = ends.nonzero()
    return int(places[0]) + 1 if len(places) else length
