"""How a chat keeps a conversation and answers. The command line prints these texts as help."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UserError
from ..options import option


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
        None, "Sampling temperature, 0 for greedy; the model's generation_config decides by default."
    )
    top_p: float | None = option(
        None, "Nucleus sampling: cumulative probability to sample from; generation_config decides by default."
    )
    backend: str = option("auto", "Backend: auto, or a name; a named backend serves every call or raises.")
    seed: int | None = option(None, "Seed of the random number generator for sampling.")

    def sampling(self) -> dict[str, Any]:
        """Arguments of ``generate``. Raises UserError for values that make no sense."""
        t, p = self.temperature, self.top_p
        if t is not None and not 0 <= t < math.inf:
            raise UserError(f"--temperature must be 0, which is greedy, or more, got {t}")
        if p is not None and not 0 < p <= 1:
            raise UserError(f"--top-p must be above 0 and at most 1, got {p}")
        if t == 0 and p is not None:
            raise UserError("--temperature 0 is greedy, and --top-p samples; expected one of them")
        if t == 0:
            return dict(do_sample=False, temperature=None, top_p=None, top_k=None)
        given = {name: value for name, value in (("temperature", t), ("top_p", p)) if value is not None}
        return dict(given, do_sample=True) if given else {}
