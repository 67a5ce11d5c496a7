"""How fast `generate` is, original and patched in turns on the same weights, and whether they make the same tokens.

A and B take turns, so that what else the machine does hits both; ratios are taken turn by turn. In the lookup variants
both sides are patched, for the original has no prompt lookup: the first decodes plainly, the second drafts.
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
from ..errors import UserError, named
from ..loading.models import Loaded, check_length
from ..patches import patched, unpatched
from ..upstream import configs, modules, tensors
from . import lookup
from .generation import Call, compare_tokens, generate
from .options import SpeedOptions
from .progress import OnProgress
from .records import as_dict, read
from .results import SideFigures, Speed, SpeedCell, Speedup, Spread, TailSpread
from .resume import Row, Work

SIDES = ("original", "patched")


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
        prompt: kind of the prompt for prompt lookup, which the second side uses; None for the others.
    """

    arguments: Callable[[], dict[str, Any]] = dict
    warmups: int = 1
    cuda_graphs: bool = False
    prompt: str | None = None


def _compiled() -> dict[str, Any]:
    return {"cache_implementation": "static", "compile_config": configs.compile_on_all_devices()}


VARIANTS: dict[str, Variant] = {
    "eager": Variant(),
    "static": Variant(lambda: {"cache_implementation": "static", "disable_compile": True}),
    "compile": Variant(_compiled, 2),
    "graph": Variant(_compiled, 2, cuda_graphs=True),  # the original compiled, the patched from a CUDA graph
    **{f"lookup-{kind}": Variant(prompt=kind) for kind in lookup.PROMPTS},
}
# What --variant takes: a name, or one for several.
NAMES = {
    **{name: (name,) for name, variant in VARIANTS.items() if variant.prompt is None},
    "lookup": tuple(name for name, variant in VARIANTS.items() if variant.prompt is not None),
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
    if options.draft_tokens < 1:
        raise UserError(f"--draft-tokens must be at least 1, got {options.draft_tokens}")
    if min(*batch, *prompt, options.rounds) < 1 or new_tokens < 2:
        given = f"{_commas(batch)}; {_commas(prompt)}; {options.rounds}; {new_tokens}"
        raise UserError(f"--batch, --prompt and --rounds must be at least 1, --new-tokens at least 2, got {given}")
    if "lookup" in options.variants and 1 not in batch:
        raise UserError(f"--variant lookup generates one sequence at a time; --batch is {_commas(batch)}")
    names = [name for given in options.variants for name in NAMES[given]]
    return [
        Cell(b, p, new_tokens, name)
        for name in names
        for b in batch
        for p in prompt
        if b == 1 or VARIANTS[name].prompt is None
    ]


# --------------------------------------------------------------------------------------------------------------- a cell


def in_turns(
    runs: dict[str, Callable[[], Call]], warmups: int, rounds: int, on_progress: OnProgress
) -> dict[str, list[Call]]:
    """Calls by name, A B A B ..., the warm-ups first; `on_progress` is told of each."""
    calls: dict[str, list[Call]] = {name: [] for name in runs}
    for _ in range(warmups + rounds):
        for name, run in runs.items():
            calls[name].append(run())
            on_progress(1)
    return calls


def _spread(values: list[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def summarize(cell: Cell, calls: list[Call], warmups: int) -> SideFigures:
    """A side's figures; the first call is the cold one, warm-ups count no further."""
    timed = calls[warmups:]
    between = [1e3 * gap for call in timed for gap in call.between]
    p90 = statistics.quantiles(between, n=10)[-1] if len(between) > 1 else between[0]
    peaks = [call.peak_mib for call in timed if call.peak_mib is not None]
    return SideFigures(
        ttft_ms=_spread([1e3 * call.first for call in timed]),
        tpot_ms=TailSpread(**vars(_spread(between)), p90=p90),
        prefill_tokens_s=_spread([cell.batch * cell.prompt / call.first for call in timed]),
        decode_tokens_s=_spread([cell.batch * len(call.between) / sum(call.between) for call in timed]),
        generate_tokens_s=_spread([call.tokens.numel() / call.seconds for call in timed]),
        peak_mib=max(peaks) if peaks else None,
        first_call_s=calls[0].seconds,
    )


def _ratios(original: list[Call], patched: list[Call]) -> Speedup:
    def ratios(of: Callable[[Call], float]) -> Spread:
        return _spread([of(a) / of(b) for a, b in zip(original, patched)])

    return Speedup(
        prefill=ratios(lambda call: call.first),
        decode=ratios(lambda call: sum(call.between)),
        generate=ratios(lambda call: call.seconds),
    )


def _patches(side: str, loaded: Loaded, backend: str, variant: Variant) -> AbstractContextManager[Any]:
    if side == "original" and variant.prompt is None:
        return unpatched()
    return patched(loaded.families, backend=backend, strict=True, cuda_graphs=variant.cuda_graphs)


def _measure(
    loaded: Loaded, cell: Cell, prompt: Tensor, backend: str, options: SpeedOptions, on_progress: OnProgress
) -> SpeedCell:
    variant = VARIANTS[cell.variant]
    drafts = {} if variant.prompt is None else {"prompt_lookup_num_tokens": options.draft_tokens}
    vocabulary = loaded.config.vocab_size

    def runner(side: str) -> Callable[[], Call]:
        def run() -> Call:
            more = drafts if side == "patched" else {}
            with _patches(side, loaded, backend, variant):
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
                around.enter_context(lookup.random_drafts(vocabulary))
            runs = {side: runner(side) for side in SIDES}
            calls = in_turns(runs, variant.warmups, options.rounds, on_progress)
    except (torch.OutOfMemoryError, tensors.compiler_error()) as error:
        return SpeedCell(**vars(cell), counts=False, failed=f"{named(error)}")
    made = {side: calls[side][-1].tokens for side in SIDES}
    tokens = compare_tokens(loaded.model, prompt, made["original"], made["patched"], loaded.dtype)
    return SpeedCell(
        **vars(cell),
        counts=tokens.verdict != "other",
        rounds=options.rounds,
        original=summarize(cell, calls["original"], variant.warmups),
        patched=summarize(cell, calls["patched"], variant.warmups),
        speedup=_ratios(calls["original"][variant.warmups :], calls["patched"][variant.warmups :]),
        tokens=tokens,
        repeatable=all(torch.equal(call.tokens, made[side]) for side in SIDES for call in calls[side]),
    )


def prompts(loaded: Loaded, ids: Tensor | None, batch: int, length: int) -> Tensor:
    """Prompts ``[batch, length]``: stretches of a text's tokens, spread over it, or random tokens for ids None."""
    if ids is None:
        random = torch.Generator().manual_seed(0)
        return torch.randint(0, loaded.config.vocab_size, (batch, length), generator=random)
    begin = torch.arange(batch) * (len(ids) // batch)
    return ids[(begin[:, None] + torch.arange(length)) % len(ids)]


def measure(loaded: Loaded, ids: Tensor | None, options: SpeedOptions, backend: str, work: Work) -> Speed | None:
    """Time a model; arguments as for `hf_gdn.eval.parity.measure`, with the text's tokens `ids` for prompts.

    Returns:
        The part of a report in the main process, None in the others.
    """
    cells = {f"speed-{cell.key}": cell for cell in plan(options, loaded.model.device)}
    for cell in cells.values():
        check_length(loaded, cell.prompt + cell.new_tokens, "prompt and new tokens together")
    total = sum(2 * (options.rounds + VARIANTS[cells[key].variant].warmups) for key in work.todo(cells))
    on_progress = work.bars.add(f"{loaded.source.label}: speed", total, "calls")

    def compute(key: str) -> Row:
        cell = cells[key]
        prompt, kind = prompts(loaded, ids, cell.batch, cell.prompt), VARIANTS[cell.variant].prompt
        if kind is not None:
            prompt = lookup.prompt(kind, prompt, loaded.config.vocab_size)
        return as_dict(_measure(loaded, cell, prompt.to(loaded.model.device), backend, options, on_progress))

    rows = [read(SpeedCell, row) for row in work.fill(cells, compute, spread=False)]
    return Speed(rows, all(row.counts for row in rows)) if rows else None
