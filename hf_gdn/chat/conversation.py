"""A conversation with a model on a `SinkCache`: of any length, in fixed memory.

It is a list of token ids; the cache holds all of them but those that are yet to be read: the newest turn, and an
answer's last token. Ctrl-C is looked at between pieces and between tokens, never within a forward, so the cache is
whole at any time.
"""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from ..caches import SinkCache
from ..errors import HfGdnError, UserError, named, reason
from ..files import write_whole
from ..loading import models
from ..upstream import cache_names
from .options import ChatOptions

FORMAT, VERSION = "hf_gdn.chat", 1
PIECE = 512  # tokens of a long input that are read at once
WINDOW, EMBEDDED_WINDOW = 4092, 508  # the embedded models were trained on 512 tokens
# What a chat asks of `generate` whatever the model's generation config says: one sequence of ids, read once.
_ONE_ANSWER = dict(num_beams=1, num_return_sequences=1, use_cache=True, return_dict_in_generate=False)
_ANSWER = "\ue000answer\ue000"  # stands for an answer in a rendered template; private use, so no text has it


class Interrupt(StoppingCriteria):
    """While it is in force, Ctrl-C only notes that somebody asked to stop."""

    asked = False

    def __enter__(self) -> Interrupt:
        self.asked = False
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), self.asked, device=input_ids.device)


class _Show(TextStreamer):
    """Hands an answer on word by word."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.show(text)


class Conversation:
    """What was said, as token ids, and the cache that has read it. The model must be patched."""

    def __init__(self, loaded: models.Loaded, options: ChatOptions) -> None:
        self.loaded, self.options = loaded, options
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.cache, self.ids = self.empty(), list[int]()
        self.read = self.answered = (0, 0.0)  # tokens and seconds, of the last turn
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        self.key = hashlib.sha256(vocabulary.encode()).hexdigest()

    def empty(self) -> SinkCache:
        """A new cache."""
        return SinkCache(self.model.config, self.options.sinks, window(self.loaded.source.name, self.options))

    def reset(self) -> None:
        """Forget everything; the cache's memory stays where it is."""
        self.cache.reset()
        self.ids, self.read, self.answered = [], (0, 0.0), (0, 0.0)

    def ask(self, text: str, show: Callable[[str], None], stop: Interrupt) -> None:
        """Read a turn and answer it; `show` is called with every few words."""
        new = self.turn(text)
        if not new:
            return
        before, self.ids = self.ids, self.ids + new
        if not self._feed(self.cache, self.ids, stop):
            return
        ids = torch.tensor([self.ids], device=self.model.device)
        begin = time.perf_counter()
        try:
            said = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **cache_names.as_argument(self.cache),
                streamer=_Show(self.tokenizer, show),
                max_new_tokens=self.options.new_tokens,
                stopping_criteria=StoppingCriteriaList([stop]),
                disable_compile=True,
                **_ONE_ANSWER,
                **self.options.sampling(self.model.generation_config),
            )
        except (HfGdnError, torch.OutOfMemoryError):
            raise
        except (ValueError, TypeError, LookupError, RuntimeError) as error:
            self.ids = before
            self.cache.reset()  # it may have read tokens of an answer
            raise UserError(
                f"no answer, and the turn is dropped: {named(error)} (the model's generation_config.json, or options)"
            ) from error
        self.answered = said.shape[1] - len(self.ids), time.perf_counter() - begin
        self.ids = said[0].tolist()

    def turn(self, text: str) -> list[int]:
        """Token ids that a turn adds: the text as it is, or what the chat template makes of it after an answer."""
        if self.tokenizer.chat_template is None:
            return self.tokenizer(text, add_special_tokens=not self.ids).input_ids
        said = {"role": "user", "content": text}
        messages = [said, {"role": "assistant", "content": _ANSWER}, said] if self.ids else [said]
        try:
            rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # of any type: a template is a program
            why = reason(error) if isinstance(error, TemplateError) else named(error)
            raise UserError(f"the chat template refuses this turn: {why}") from error
        if self.ids and _ANSWER not in rendered:
            raise UserError("the chat template leaves answers out, so a conversation cannot go on")
        ids = self.tokenizer(rendered.rpartition(_ANSWER)[2], add_special_tokens=False).input_ids
        ended = self.ids[-1:] == ids[:1] and ids[:1] and ids[0] in self.tokenizer.all_special_ids
        return ids[1:] if ended else ids  # an answer that came to its end has said its end itself

    @torch.no_grad()
    def _feed(self, cache: SinkCache, ids: list[int], stop: Interrupt) -> bool:
        """Read ids up to the last, in pieces, from where the cache is; False when interrupted."""
        rest, begin = ids[int(cache.seen()) : -1], time.perf_counter()
        for piece in torch.tensor([rest], dtype=torch.long, device=self.model.device).split(PIECE, 1):
            if stop.asked:
                return False
            if piece.numel():
                self.model(piece, **cache_names.as_argument(cache), logits_to_keep=1)
        self.read = len(rest), time.perf_counter() - begin
        return not stop.asked

    def save(self, path: str) -> None:
        """Write ids and text. Raises UserError; the file there is whole at any time."""
        text = self.tokenizer.decode(self.ids, clean_up_tokenization_spaces=False)
        held = {"format": FORMAT, "version": VERSION, "model": self.loaded.source.label, "tokenizer": self.key}
        whole = json.dumps({**held, "text": text, "ids": self.ids}, indent=1) + "\n"
        try:
            write_whole(path, lambda partial: partial.write_text(whole, encoding="utf-8"))
        except (OSError, ValueError) as error:  # of a path that can name no file
            raise UserError(f"{path!r} cannot be written: {reason(error)}") from error

    def load(self, path: str, stop: Interrupt) -> bool:
        """Take a saved conversation and read it into a new cache; UserError, or False when interrupted: as before."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path!r} cannot be read: {reason(error)}") from error
        if not isinstance(found, dict) or (found.get("format"), found.get("version")) != (FORMAT, VERSION):
            raise UserError(f"{path!r} is no conversation of {FORMAT}, version {VERSION}")
        if found.get("tokenizer") != self.key:
            raise UserError(f"{path!r} was saved with model {found.get('model')!r}, which has other tokens")
        ids, size = found.get("ids"), self.model.get_input_embeddings().num_embeddings
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < size for i in ids):
            raise UserError(f"{path!r} is damaged: its ids are no token ids")
        cache = self.empty()
        if not self._feed(cache, ids, stop):
            return False
        self.cache, self.ids, self.answered = cache, ids, (0, 0.0)
        return True

    def stats(self) -> str:
        """One line a subject."""
        rates = [
            f"{name} {count:,} tokens" + (f", {count / seconds:,.1f} a second" if count and seconds else "")
            for name, (count, seconds) in (("read", self.read), ("answered", self.answered))
        ]
        seen, slots = int(self.cache.seen()), self.cache.sizes.slots
        kept = f"conversation: {len(self.ids):,} tokens, {min(seen, slots):,} kept of {slots:,} at most"
        return f"{kept}\ncache: {self.cache.nbytes:,} bytes\nlast turn: {'; '.join(rates)}"


def window(name: str, options: ChatOptions) -> int:
    """The window asked for, or the default."""
    return options.window or (EMBEDDED_WINDOW if name in models.embedded() else WINDOW)
