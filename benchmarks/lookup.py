"""Prompt-lookup decoding on a recurrent model against plain decoding: tokens a second where drafts are taken and not.

    python benchmarks/lookup.py [--model NAME] [--device cuda] [--dtype bfloat16] [--tokens 10] [--output FILE]

Both run patched; transformers refuses the first without the patch. Four prompts: ``repetitive``, a passage said four
times, which a model goes on with; ``text``, the passage as it is; ``random``, ids drawn at random; ``refused``, the
passage with random drafts in place of those that lookup finds, so that none is ever right. Greedy; what is counted is
the time of whole `generate` calls with 256 new tokens, in turns, medians of 7. A row counts when both give the same
tokens, but for ties: where they part, the two logits are within the dtype's rounding of each other
(`hf_gdn.eval.speed.compare_tokens`). The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import publish
from rich.table import Table
from transformers.generation import PromptLookupCandidateGenerator

import hf_gdn
from hf_gdn.eval.speed import compare_tokens
from hf_gdn.loading import models, texts

NEW, ROUNDS = 256, 7


def prompts(loaded: models.Loaded) -> dict[str, torch.Tensor]:
    """Ids ``[1, T]`` of every kind."""
    random = torch.Generator().manual_seed(0)
    passage = texts.tokenize(loaded.tokenizer, texts.embedded())[:96]
    ids = torch.randint(0, loaded.model.config.get_text_config().vocab_size, (384,), generator=random)
    return {
        "repetitive": passage.repeat(4)[None],
        "text": passage[None],
        "random": ids[None],
        "refused": passage[None],
    }


@contextlib.contextmanager
def random_drafts(vocabulary: int) -> Iterator[None]:
    """What prompt lookup finds is replaced with ids drawn at random."""
    original = PromptLookupCandidateGenerator.get_candidates

    def get_candidates(self: Any, input_ids: torch.Tensor, **_: Any) -> Any:
        draft = torch.randint(vocabulary, (1, self.num_output_tokens), device=input_ids.device)
        return torch.cat((input_ids, draft), 1), None

    PromptLookupCandidateGenerator.get_candidates = get_candidates
    try:
        yield
    finally:
        PromptLookupCandidateGenerator.get_candidates = original


def run(model: Any, ids: torch.Tensor, **kwargs: Any) -> tuple[float, torch.Tensor]:
    """Seconds and the new tokens."""
    start = time.perf_counter()
    out = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, **kwargs)
    found = out[:, ids.shape[1] :].cpu()  # waits for the device
    return time.perf_counter() - start, found


def measure(loaded: models.Loaded, kind: str, ids: torch.Tensor, tokens: int, dtype: str) -> dict[str, Any]:
    lookup = {"prompt_lookup_num_tokens": tokens}
    plain, ahead = run(loaded.model, ids)[1], run(loaded.model, ids, **lookup)[1]
    same = compare_tokens(loaded.model, ids, plain, ahead, dtype)
    seconds: dict[str, list[float]] = {"plain": [], "lookup": []}
    for _ in range(ROUNDS):
        seconds["plain"].append(run(loaded.model, ids)[0])
        seconds["lookup"].append(run(loaded.model, ids, **lookup)[0])
    rates = {name: NEW / statistics.median(times) for name, times in seconds.items()}
    ratio = rates["lookup"] / rates["plain"]
    return dict(
        prompt=kind,
        plain=rates["plain"],
        lookup=rates["lookup"],
        ratio=ratio,
        tokens=same,
        passed=same["verdict"] != "other",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3_next-tiny,kimi_linear-tiny", help="names, separated by commas")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(models.DTYPES), default="float32")
    parser.add_argument("--tokens", type=int, default=10, help="prompt_lookup_num_tokens")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    device, rows = torch.device(options.device), []
    table = Table("model", "prompt", "plain, tokens/s", "lookup, tokens/s", "ratio", title="prompt lookup")
    hf_gdn.patch()
    for name in options.model.split(","):
        loaded = models.load(models.Source(name), device, models.DTYPES[options.dtype])
        for kind, ids in prompts(loaded).items():
            vocabulary = loaded.model.config.get_text_config().vocab_size
            with random_drafts(vocabulary) if kind == "refused" else contextlib.nullcontext():
                row = measure(loaded, kind, ids.to(device), options.tokens, options.dtype)
            rows.append(dict(model=name, **row))
            figures = [f"{row['plain']:.0f}", f"{row['lookup']:.0f}", f"{row['ratio']:.2f}x"]
            table.add_row(name, kind, *(figures if row["passed"] else ["other tokens", "", ""]))
    found = dict(dtype=options.dtype, draft=options.tokens, new_tokens=NEW, rows=rows)
    return publish("lookup", table, device, options.output, **found)


if __name__ == "__main__":
    raise SystemExit(main())
