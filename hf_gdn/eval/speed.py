"""How fast `generate` is, original and patched in turns on the same weights, and whether they make the same tokens.

Times are taken where tokens leave `generate`, through its streamer: time to first token (the prefill), time per output
token after that. A and B take turns, so that what else the machine does hits both; ratios are taken turn by turn.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from .. import cuda_graphs
from ..errors import UserError, reason
from ..loading.models import Loaded, check_length
from ..patches import patched, unpatched
from ..upstream import configs, modules, tensors
from .progress import Step
from .resume import Row, Work

# Two tokens whose logits are so close that rounding decides between them: this many units of the dtype's epsilon times
# the largest logit. In fp32 the error is that of sums of thousands of terms, in 16 bits that of the last roundings.
_TIE = {"float32": 64.0, "float16": 4.0, "bfloat16": 4.0}


@dataclass(frozen=True)
class SpeedOptions:
    """What is timed: every combination of batch size, prompt length and variant.

    Args:
        batch, prompt: sizes; empty for 1 and 8 by 512 and 4096 tokens on an accelerator, 1 and 4 by 128 and 512
            elsewhere.
        new_tokens: generated, whatever the end-of-sequence token says; None for 128, or 64 on a CPU.
        rounds: timed turns, after the warm-up.
        variants: names of `VARIANTS`.
    """

    batch: tuple[int, ...] = ()
    prompt: tuple[int, ...] = ()
    new_tokens: int | None = None
    rounds: int = 5
    variants: tuple[str, ...] = ("eager",)


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


def _compiled() -> dict[str, Any]:
    return {"cache_implementation": "static", "compile_config": configs.compile_on_all_devices()}


# Arguments of `generate` that make a variant, and how many untimed calls it takes to be warm.
VARIANTS: dict[str, tuple[Callable[[], dict[str, Any]], int]] = {
    "eager": (dict, 1),
    "static": (lambda: {"cache_implementation": "static", "disable_compile": True}, 1),
    "compile": (_compiled, 2),
    "graph": (_compiled, 2),  # the original compiled, the patched from a CUDA graph
}
# Called with the model's families, the backend and the variant.
SIDES: dict[str, Callable[[list[str], str, str], AbstractContextManager[Any]]] = {
    "original": lambda families, backend, variant: unpatched(),
    "patched": lambda families, backend, variant: patched(
        families, backend=backend, strict=True, cuda_graphs=variant == "graph"
    ),
}


def plan(options: SpeedOptions, device: torch.device) -> list[Cell]:
    """The cells, with the device's defaults. Raises UserError for values that cannot be used."""
    unknown = [name for name in options.variants if name not in VARIANTS]
    if unknown or not options.variants:
        raise UserError(f"--variant {','.join(unknown)} is not known; variants: {', '.join(VARIANTS)}")
    if "graph" in options.variants and device.type not in cuda_graphs.CAPTURES:
        raise UserError(f"--variant graph needs a CUDA device; the model is on {device.type}")
    fast = device.type != "cpu"
    batch = options.batch or ((1, 8) if fast else (1, 4))
    prompt = options.prompt or ((512, 4096) if fast else (128, 512))
    new_tokens = options.new_tokens or (128 if fast else 64)
    if min(*batch, *prompt, options.rounds) < 1 or new_tokens < 2:
        raise UserError("--batch, --prompt and --rounds must be at least 1, --new-tokens at least 2")
    return [Cell(b, p, new_tokens, name) for name in options.variants for b in batch for p in prompt]


# --------------------------------------------------------------------------------------------------------------- a call


class _Clock(BaseStreamer):
    """Notes when each token leaves `generate`."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


@dataclass(frozen=True)
class Call:
    """One call of `generate`: its new tokens ``[B, N]``, seconds to the first token, between tokens, and in all, and
    the peak memory in MiB."""

    tokens: Tensor
    first: float
    between: tuple[float, ...]
    seconds: float
    peak_mib: float | None


def generate(model: Any, prompt: Tensor, new_tokens: int, **arguments: Any) -> Call:
    """Greedy tokens after prompt ``[B, T]``, timed. `arguments` go to ``model.generate``."""
    clock = _Clock()
    _reset_peak(model.device)
    _wait(model.device)
    start = time.perf_counter()
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        streamer=clock,
        **arguments,
    )
    _wait(model.device)
    end = time.perf_counter()
    times = clock.times[1:]  # the first is the prompt's
    between = tuple(b - a for a, b in itertools.pairwise(times))
    return Call(out[:, prompt.shape[1] :].cpu(), times[0] - start, between, end - start, _peak_mib(model.device))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_PEAK = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    elif _PEAK[0].exists():
        with contextlib.suppress(OSError):  # not everywhere allowed; the peak is the process's then
            _PEAK[0].write_text("5")  # resets the peak of the resident set


def _peak_mib(device: torch.device) -> float | None:
    """Peak since the reset: of memory allocated on all devices, or of the process's resident set; None: unknown."""
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / 2**20
    if _PEAK[1].exists():
        for line in _PEAK[1].read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return None


# --------------------------------------------------------------------------------------------------------------- a cell


def in_turns(runs: dict[str, Callable[[], Call]], warmups: int, rounds: int, step: Step) -> dict[str, list[Call]]:
    """Calls by name, A B A B ..., the warm-ups first; `step` is told of each."""
    calls: dict[str, list[Call]] = {name: [] for name in runs}
    for _ in range(warmups + rounds):
        for name, run in runs.items():
            calls[name].append(run())
            step(1)
    return calls


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summarize(cell: Cell, calls: list[Call], warmups: int) -> dict[str, Any]:
    """A side's figures; the first call is the cold one, warm-ups count no further."""
    timed = calls[warmups:]
    between = [1e3 * gap for call in timed for gap in call.between]
    p90 = statistics.quantiles(between, n=10)[-1] if len(between) > 1 else between[0]
    peaks = [call.peak_mib for call in timed if call.peak_mib is not None]
    return {
        "ttft_ms": spread([1e3 * call.first for call in timed]),
        "tpot_ms": {**spread(between), "p90": p90},
        "prefill_tokens_s": spread([cell.batch * cell.prompt / call.first for call in timed]),
        "decode_tokens_s": spread([cell.batch * len(call.between) / sum(call.between) for call in timed]),
        "generate_tokens_s": spread([call.tokens.numel() / call.seconds for call in timed]),
        "peak_mib": max(peaks) if peaks else None,
        "first_call_s": calls[0].seconds,
    }


def _ratios(original: list[Call], patched: list[Call]) -> dict[str, dict[str, float]]:
    """Original time over patched time, turn by turn."""
    measures: dict[str, Callable[[Call], float]] = {
        "prefill": lambda call: call.first,
        "decode": lambda call: sum(call.between),
        "generate": lambda call: call.seconds,
    }
    return {
        name: spread([measure(a) / measure(b) for a, b in zip(original, patched)]) for name, measure in measures.items()
    }


def compare_tokens(model: Any, prompt: Tensor, original: Tensor, patched: Tensor, dtype: str) -> dict[str, Any]:
    """Did both generate the same?

    Returns:
        ``verdict``: "same", "tie" (they part where the original's own logits for the two tokens are closer than its
        dtype's rounding) or "other"; ``row`` and ``token``, where they part first, and ``gap``, how far the two logits
        are apart there, for the latter two.
    """
    worst: dict[str, Any] = {"verdict": "same"}
    for row in range(len(original)):
        differing = (original[row] != patched[row]).nonzero()
        if not len(differing):
            continue
        at = int(differing[0])
        ids = torch.cat((prompt[row].cpu(), original[row, :at]))[None].to(model.device)
        with torch.inference_mode(), unpatched():
            logits = model(ids, use_cache=False).logits[0, -1].double().cpu()
        gap = abs(logits[original[row, at]] - logits[patched[row, at]]).item()
        bound = _TIE[dtype] * torch.finfo(getattr(torch, dtype)).eps * logits.abs().max().item()
        found = {"verdict": "tie" if gap <= bound else "other", "row": row, "token": at, "gap": gap}
        if worst["verdict"] == "same" or found["verdict"] == "other":
            worst = found
        if found["verdict"] == "other":
            break
    return worst


def _measure(loaded: Loaded, cell: Cell, prompt: Tensor, backend: str, rounds: int, step: Step) -> Row:
    make, warmups = VARIANTS[cell.variant]

    def runner(side: str) -> Callable[[], Call]:
        def run() -> Call:
            with SIDES[side](loaded.families, backend, cell.variant):
                return generate(loaded.model, prompt, cell.new_tokens, **make())

        return run

    # Every cell compiles anew: its first call is cold, and the compiler's limit of variants a function is not met.
    torch.compiler.reset()
    cuda_graphs.release()
    modules.forget_compiled_call(loaded.model)
    row: Row = {"batch": cell.batch, "prompt": cell.prompt, "new_tokens": cell.new_tokens, "variant": cell.variant}
    try:
        # Around all turns, so that a graph is kept from one to the next.
        with SIDES["patched"](loaded.families, backend, cell.variant):
            calls = in_turns({side: runner(side) for side in SIDES}, warmups, rounds, step)
    except (torch.OutOfMemoryError, tensors.compiler_error()) as error:
        return {**row, "counts": False, "failed": f"{type(error).__name__}: {reason(error)}"}
    made = {side: calls[side][-1].tokens for side in SIDES}
    steady = all(torch.equal(call.tokens, made[side]) for side in SIDES for call in calls[side])
    tokens = compare_tokens(loaded.model, prompt, made["original"], made["patched"], loaded.dtype)
    return {
        **row,
        "counts": tokens["verdict"] != "other",
        "rounds": rounds,
        **{side: summarize(cell, calls[side], warmups) for side in SIDES},
        "speedup": _ratios(calls["original"][warmups:], calls["patched"][warmups:]),
        "tokens": tokens,
        "repeatable": steady,
    }


def prompts(loaded: Loaded, ids: Tensor | None, batch: int, length: int) -> Tensor:
    """Prompts ``[batch, length]``: stretches of a text's tokens, spread over it, or random tokens for ids None."""
    if ids is None:
        random = torch.Generator().manual_seed(0)
        return torch.randint(0, loaded.config.vocab_size, (batch, length), generator=random)
    begin = torch.arange(batch) * (len(ids) // batch)
    return ids[(begin[:, None] + torch.arange(length)) % len(ids)]


def measure(loaded: Loaded, ids: Tensor | None, options: SpeedOptions, backend: str, work: Work) -> dict[str, Any]:
    """Time a model; arguments as for `hf_gdn.eval.parity.measure`, with the text's tokens `ids` for prompts.

    Returns:
        The "speed" part of a report (docs/report.md) in the main process, an empty dict in the others.
    """
    cells = {f"speed-{cell.key}": cell for cell in plan(options, loaded.model.device)}
    for cell in cells.values():
        check_length(loaded, cell.prompt + cell.new_tokens, "prompt and new tokens together")
    total = sum(2 * (options.rounds + VARIANTS[cells[key].variant][1]) for key in work.todo(cells))
    step = work.bars.add(f"{loaded.source.label}: speed", total, "calls")

    def compute(key: str) -> Row:
        cell = cells[key]
        prompt = prompts(loaded, ids, cell.batch, cell.prompt).to(loaded.model.device)
        return _measure(loaded, cell, prompt, backend, options.rounds, step)

    rows = work.fill(cells, compute, spread=False)
    return {"cells": rows, "passed": all(row["counts"] for row in rows)} if rows else {}
