"""How fast `generate` is, original and patched in turns on the same weights, and whether they make the same tokens.

A and B take turns, so that what else the machine does hits both; ratios are taken turn by turn. In the variants that
draft tokens both sides are patched, for the original refuses drafts: the first decodes plainly, the second drafts.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import cuda_graphs
from ..drafting import pace
from ..drafting.mtp import LONGEST
from ..drafting.mtp_head import NoHead, head_of
from ..errors import UserError, named
from ..loading.models import Loaded, check_length
from ..log import logger
from ..patches import all_families, patched, unpatched
from ..patches.families.base import MTP as MTP_FEATURE
from ..upstream import configs, modules, tensors
from . import lookup
from .generation import Call, compare_tokens, generate
from .options import SpeedOptions
from .progress import OnProgress
from .records import as_dict, read
from .results import Drafts, SideFigures, Speed, SpeedCell, Speedup, TokenMatch
from .resume import Row, Work
from .spreads import Spread, TailSpread, spread

SIDES = ("original", "patched")
LOOKUP, MTP = "lookup", "mtp"
_RANDOM_DRAFTS = {LOOKUP: lookup.random_drafts, MTP: lookup.random_mtp_drafts}


@dataclass(frozen=True)
class Cell:
    """One combination."""

    batch: int
    prompt: int
    new_tokens: int
    variant: str

    @property
    def key(self) -> str:
        """Name of its row."""
        return f"b{self.batch}-p{self.prompt}-n{self.new_tokens}-{self.variant}"


# ------------------------------------------------------------------------------------------------------------ variants


@dataclass(frozen=True)
class Variant:
    """A way to generate.

    Args:
        arguments: of ``generate``, for both sides.
        warmups: untimed calls until it is warm.
        cuda_graphs: whether the patched side replays CUDA graphs.
        drafts: how the second side drafts tokens: `LOOKUP`, `MTP`, or None.
        prompt: kind of the prompt where tokens are drafted.
    """

    arguments: Callable[[], dict[str, Any]] = dict
    warmups: int = 1
    cuda_graphs: bool = False
    drafts: str | None = None
    prompt: str = "text"


def _compiled() -> dict[str, Any]:
    return {"cache_implementation": "static", "compile_config": configs.compile_on_all_devices()}


VARIANTS: dict[str, Variant] = {
    "eager": Variant(),
    "static": Variant(lambda: {"cache_implementation": "static", "disable_compile": True}),
    "compile": Variant(_compiled, 2),
    "graph": Variant(_compiled, 2, cuda_graphs=True),  # the original compiled, the patched from a CUDA graph
    **{f"lookup-{kind}": Variant(drafts=LOOKUP, prompt=kind) for kind in lookup.PROMPTS},
    **{f"mtp-{kind}": Variant(drafts=MTP, prompt=kind) for kind in ("text", "refused")},
}
# What --variant takes: a name, or one for several.
NAMES = {
    **{name: (name,) for name, variant in VARIANTS.items() if variant.drafts is None},
    **{kind: tuple(name for name, variant in VARIANTS.items() if variant.drafts == kind) for kind in (LOOKUP, MTP)},
}


def _commas(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def plan(options: SpeedOptions, device: torch.device) -> list[Cell]:
    """The cells, with the device's defaults. Raises UserError for values that cannot be used."""
    unknown = [name for name in options.variants if name not in NAMES]
    if unknown or not options.variants:
        raise UserError(f"--variant {','.join(unknown)} is not known; variants: {', '.join(NAMES)}")
    if "graph" in options.variants and device.type not in cuda_graphs.CAPTURES:
        raise UserError(f"--variant graph needs a CUDA device; the model is on {device.type}")
    fast = device.type != "cpu"
    batch = options.batch or ((1, 8) if fast else (1, 4))
    prompt = options.prompt or ((512, 4096) if fast else (128, 512))
    new_tokens = options.new_tokens or (128 if fast else 64)
    if options.draft_tokens is not None and options.draft_tokens < 1:
        raise UserError(f"--draft-tokens must be at least 1, got {options.draft_tokens}")
    if min(*batch, *prompt, options.rounds) < 1 or new_tokens < 2:
        given = f"{_commas(batch)}; {_commas(prompt)}; {options.rounds}; {new_tokens}"
        raise UserError(f"--batch, --prompt and --rounds must be at least 1, --new-tokens at least 2, got {given}")
    names = [name for given in options.variants for name in NAMES[given]]
    cells = [
        Cell(b, p, new_tokens, name)
        for name in names
        for b in batch
        for p in prompt
        if b == 1 or VARIANTS[name].drafts is None
    ]
    if not cells:
        asked = ",".join(options.variants)
        raise UserError(f"--variant {asked} generates one sequence at a time; --batch is {_commas(batch)}")
    return cells


# --------------------------------------------------------------------------------------------------------------- a cell


def in_turns(
    runs: dict[str, Callable[[int], Call]], warmups: int, rounds: int, on_progress: OnProgress
) -> dict[str, list[Call]]:
    """Calls by name, A B A B ..., the warm-ups first; each is told its round, and `on_progress` is told of each."""
    calls: dict[str, list[Call]] = {name: [] for name in runs}
    for turn in range(-warmups, rounds):
        for name, run in runs.items():
            calls[name].append(run(max(turn, 0)))
            on_progress(1)
    return calls


def summarize(cell: Cell, calls: list[Call], warmups: int) -> SideFigures:
    """A side's figures; the first call is the cold one, warm-ups count no further."""
    timed = calls[warmups:]
    between = [1e3 * gap for call in timed for gap in call.between]
    p90 = statistics.quantiles(between, n=10)[-1] if len(between) > 1 else between[0]
    peaks = [call.peak_mib for call in timed if call.peak_mib is not None]
    return SideFigures(
        ttft_ms=spread([1e3 * call.first for call in timed]),
        tpot_ms=TailSpread(**vars(spread(between)), p90=p90),
        prefill_tokens_s=spread([cell.batch * cell.prompt / call.first for call in timed]),
        decode_tokens_s=spread([cell.batch * len(call.between) / sum(call.between) for call in timed]),
        generate_tokens_s=spread([call.tokens.numel() / call.seconds for call in timed]),
        peak_mib=max(peaks) if peaks else None,
        first_call_s=calls[0].seconds,
    )


def _ratios(original: list[Call], patched: list[Call]) -> Speedup:
    def ratios(of: Callable[[Call], float]) -> Spread:
        return spread([of(a) / of(b) for a, b in zip(original, patched)])

    return Speedup(
        prefill=ratios(lambda call: call.first),
        decode=ratios(lambda call: sum(call.between)),
        generate=ratios(lambda call: call.seconds),
    )


def _patches(side: str, loaded: Loaded, backend: str, variant: Variant) -> AbstractContextManager[Any]:
    if side == "original" and variant.drafts is None:
        return unpatched()
    return patched(loaded.families, backend=backend, strict=True, cuda_graphs=variant.cuda_graphs)


def _measure(
    loaded: Loaded, cell: Cell, texts: list[Tensor], backend: str, options: SpeedOptions, on_progress: OnProgress
) -> SpeedCell:
    """Time a cell; `texts` are the prompts of the rounds, or the one of all."""
    variant = VARIANTS[cell.variant]
    drafts: dict[str, Any] = {}
    if variant.drafts == LOOKUP:
        drafts = {"prompt_lookup_num_tokens": options.draft_tokens or 10}
    elif variant.drafts == MTP:
        drafts = {"use_mtp": True, "num_assistant_tokens": options.draft_tokens or LONGEST}
    vocabulary = loaded.config.vocab_size

    def runner(side: str) -> Callable[[int], Call]:
        def run(turn: int) -> Call:
            more = drafts if side == "patched" else {}
            with _patches(side, loaded, backend, variant):
                prompt = texts[turn % len(texts)]
                return generate(loaded.model, prompt, cell.new_tokens, **variant.arguments(), **more)

        return run

    # Every cell compiles anew: its first call is cold, and the compiler's limit of variants a function is not met.
    torch.compiler.reset()
    cuda_graphs.release()
    modules.forget_compiled_call(loaded.model)
    try:
        # Around all turns, so that a graph is kept from one to the next.
        with contextlib.ExitStack() as around:
            around.enter_context(_patches("patched", loaded, backend, variant))
            if variant.prompt == "refused":
                around.enter_context(_RANDOM_DRAFTS[str(variant.drafts)](vocabulary))
            paces = around.enter_context(pace.watching())
            runs = {side: runner(side) for side in SIDES}
            calls = in_turns(runs, variant.warmups, options.rounds, on_progress)
    except (torch.OutOfMemoryError, tensors.compiler_error()) as error:
        return SpeedCell(**vars(cell), counts=False, failed=f"{named(error)}")
    timed = {side: calls[side][variant.warmups :] for side in SIDES}
    tokens = TokenMatch("same")
    for turn in range(min(len(texts), options.rounds)):
        first, second = (timed[side][turn].tokens for side in SIDES)
        found = compare_tokens(loaded.model, texts[turn], first, second, loaded.dtype)
        tokens = found if tokens.verdict == "same" or found.verdict == "other" else tokens
    return SpeedCell(
        **vars(cell),
        counts=tokens.verdict != "other",
        rounds=options.rounds,
        original=summarize(cell, calls["original"], variant.warmups),
        patched=summarize(cell, calls["patched"], variant.warmups),
        speedup=_ratios(timed["original"], timed["patched"]),
        tokens=tokens,
        drafts=None if variant.drafts is None else _counted(paces[variant.warmups :]),
        repeatable=all(_repeated(calls[side], variant.warmups, len(texts)) for side in SIDES),
    )


def _counted(found: list[pace.Pace]) -> Drafts:
    return Drafts(sum(p.drafts for p in found), sum(p.drafted for p in found), sum(p.accepted for p in found))


def _repeated(calls: list[Call], warmups: int, prompts: int) -> bool:
    """Whether all calls with the same prompt made the same tokens."""
    first = calls[warmups:]
    rounds = [0] * warmups + list(range(len(first)))
    return all(torch.equal(call.tokens, first[turn % prompts].tokens) for turn, call in zip(rounds, calls))


def prompts(loaded: Loaded, ids: Tensor | None, batch: int, length: int) -> Tensor:
    """Prompts ``[batch, length]``: stretches of a text's tokens, spread over it, or random tokens for ids None."""
    if ids is None:
        random = torch.Generator().manual_seed(0)
        return torch.randint(0, loaded.config.vocab_size, (batch, length), generator=random)
    begin = torch.arange(batch) * (len(ids) // batch)
    return ids[(begin[:, None] + torch.arange(length)) % len(ids)]


def _without_mtp(loaded: Loaded, planned: list[Cell]) -> list[Cell]:
    """Leave out `MTP` where the model cannot draft so. Raises UserError if nothing is left."""
    refused = {name: dict(all_families()[name].cannot).get(MTP_FEATURE) for name in loaded.families}
    reason = next((f"{name}: {why}" for name, why in refused.items() if why), None)
    try:
        if reason is None:
            head_of(loaded.model)
            return planned
    except NoHead:
        reason = f"the checkpoint of {loaded.source.label} has no multi-token-prediction head"
    except ValueError as error:
        reason = str(error)
        logger.warning("--variant mtp is left out: %s", reason)
    planned = [cell for cell in planned if VARIANTS[cell.variant].drafts != MTP]
    if not planned:
        raise UserError(f"--variant mtp: {reason}")
    return planned


def measure(loaded: Loaded, ids: Tensor | None, options: SpeedOptions, backend: str, work: Work) -> Speed | None:
    """Time a model; arguments as for `hf_gdn.eval.parity.measure`, with the text's tokens `ids` for prompts.

    Returns:
        The part of a report in the main process, None in the others.
    """
    planned = plan(options, loaded.model.device)
    if MTP in options.variants:
        planned = _without_mtp(loaded, planned)
    cells = {f"speed-{cell.key}": cell for cell in planned}
    for cell in cells.values():
        check_length(loaded, cell.prompt + cell.new_tokens, "prompt and new tokens together")
    total = sum(2 * (options.rounds + VARIANTS[cells[key].variant].warmups) for key in work.todo(cells))
    on_progress = work.bars.add(f"{loaded.source.label}: speed", total, "calls")

    def compute(key: str) -> Row:
        cell, vocabulary = cells[key], loaded.config.vocab_size
        variant = VARIANTS[cell.variant]
        if variant.drafts is None:
            given = [prompts(loaded, ids, cell.batch, cell.prompt)]
        else:  # how much of a draft is right depends on the text: another in every round
            texts = prompts(loaded, ids, options.rounds, cell.prompt)
            given = [lookup.prompt(variant.prompt, text, vocabulary, n) for n, text in enumerate(texts.split(1))]
        given = [prompt.to(loaded.model.device) for prompt in given]
        return as_dict(_measure(loaded, cell, given, backend, options, on_progress))

    rows = [read(SpeedCell, row) for row in work.fill(cells, compute, spread=False)]
    return Speed(rows, all(row.counts for row in rows)) if rows else None
