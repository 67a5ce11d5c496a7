"""How a chat keeps a conversation and answers. The command line prints these texts as help."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UserError
from ..options import option

# Fields of a generation config by which a model says how it is sampled, and what holds where it has none of them.
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
TEMPERATURE, PENALTY = 0.7, 1.1


@dataclass(frozen=True)
class ChatOptions:
    """`sinks` first and `window` last tokens are kept by full-attention layers."""

    PANEL: ClassVar[str] = "Chat"
    sinks: int = option(4, "Number of first tokens to keep (attention sinks).", name="sink-tokens", minimum=1)
    window: int | None = option(
        None, "Number of last tokens to keep; 4092, or 508 for embedded models, by default.", minimum=1
    )
    new_tokens: int = option(512, "Maximum number of tokens in an answer.", name="max-new-tokens", minimum=1)
    temperature: float | None = option(
        None, "Sampling temperature, 0 for greedy; the model's generation_config decides by default, else 0.7."
    )
    top_p: float | None = option(
        None, "Nucleus sampling: cumulative probability to sample from; generation_config decides by default."
    )
    repetition_penalty: float | None = option(
        None, "Above 1, tokens that are in the conversation become less likely; generation_config decides, else 1.1."
    )
    greedy: bool = option(False, "Always the most likely token.")
    backend: str = option("auto", "Backend: auto, or a name; a named backend serves every call or raises.")
    seed: int | None = option(None, "Seed of the random number generator for sampling.")

    def sampling(self, config: Any = None) -> dict[str, Any]:
        """Arguments of ``generate``. Raises UserError for values that make no sense.

        Args:
            config: the model's generation config. Where it says nothing about sampling, answers are sampled mildly:
                greedy ones of small models soon repeat a line for ever.
        """
        t, p, penalty = self.temperature, self.top_p, self.repetition_penalty
        if t is not None and not 0 <= t < math.inf:
            raise UserError(f"--temperature must be 0, which is greedy, or more, got {t}")
        if p is not None and not 0 < p <= 1:
            raise UserError(f"--top-p must be above 0 and at most 1, got {p}")
        if penalty is not None and not 0 < penalty < math.inf:
            raise UserError(f"--repetition-penalty must be above 0, got {penalty}")
        if self.greedy and t:
            raise UserError(f"--greedy takes the likeliest token, and --temperature {t} samples; expected one of them")
        greedy = self.greedy or t == 0
        if greedy and p is not None:
            name = "--greedy" if self.greedy else "--temperature 0"
            raise UserError(f"{name} is greedy, and --top-p samples; expected one of them")
        kept = {} if penalty is None else {"repetition_penalty": penalty}
        if greedy:
            return dict(kept, do_sample=False, temperature=None, top_p=None, top_k=None)
        given = {name: value for name, value in (("temperature", t), ("top_p", p)) if value is not None}
        said = {name for name in SAMPLING if getattr(config, name, None) is not None}
        if not said:
            return {"temperature": TEMPERATURE, "repetition_penalty": PENALTY, **given, **kept, "do_sample": True}
        return dict(given, **kept, do_sample=True) if given else kept
