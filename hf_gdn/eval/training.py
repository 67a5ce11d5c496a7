"""Does a patched model train the same? Two copies of a model take the same AdamW steps, original and patched in turns.

Before and after, both sides also compute the gradient of one batch on the same weights: what the kernels differ by,
which the optimizer then carries on.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..loading.models import Loaded, check_length
from . import forward_modes, timing, verdicts
from .accuracy import CLOSE_TRAINING, SAME_TRAINING
from .options import TrainOptions
from .resume import Row, Work
from .spreads import spread
from .training_batches import Batches, of_text, scored
from .training_results import ParameterGroup, Trained, Training, relative_differences
from .training_step import Copy, Way, copies, group_of, import_peft, norms, ways

MAX_SEED = 2**32 - 1  # a generator's is made of it and a step's number, and takes 64 bits
SAVE_EVERY = 60.0  # seconds at least between two states kept for --resume, and ten times what keeping one takes


def check(options: TrainOptions) -> None:
    """Raise UserError for options that cannot be used."""
    if not 0 < options.lr < math.inf:
        raise UserError(f"--lr must be above 0 and finite, got {options.lr:g}")
    if options.seed > MAX_SEED:
        raise UserError(f"--seed must be at most {MAX_SEED}, got {options.seed}")
    for dtype in SAME_TRAINING:
        verdicts.bounds(SAME_TRAINING[dtype], options.tolerance)
    if options.lora is not None:
        import_peft()


# ---------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class _Run:
    """A comparison under way: what its rows are computed from. Every process takes part in every row."""

    copies: dict[str, Copy]
    ways: dict[str, Way]
    batches: Batches
    device: torch.device
    work: Work

    def _backward(self, way: Way, copy: Copy, step: int) -> Callable[[], Tensor]:
        """Gradients of this process's part of a step's batch."""
        processes = self.work.processes
        mine = self.batches.documents(step, processes.index, processes.count)
        count = scored(self.batches.documents(step))
        return lambda: copy.backward(way, mine, count, seed=step)

    def _sum(self, *values: Tensor) -> None:
        """Sum values over all processes, in place."""
        if self.work.processes.count > 1:
            for value in values:
                torch.distributed.all_reduce(value)

    def step(self, number: int) -> Row:
        """Both sides take a step: loss, norms by group, and milliseconds, by side."""
        row: Row = {}
        for side, copy in self.copies.items():
            with self.ways[side].scope():
                backward = self._backward(self.ways[side], copy, number)
                ms, loss = self.work.processes.each(functools.partial(timing.clock, backward, self.device))
            gradients = copy.gradients()
            self._sum(loss, *gradients.values())
            found = {"loss": loss.item(), "norms": norms(gradients)}
            row[side] = {**found, "ms": ms + timing.clock(copy.update, self.device)[0]}
        return row

    def same_weights(self) -> Row:
        """Both sides compute a gradient on the patched side's weights.

        Returns:
            ``errors``, relative, and ``norms`` of the original's by group; ``peaks``, bytes that forward and backward
            take, by side.
        """
        copy, found, peaks = self.copies["patched"], {}, {}
        for side, way in self.ways.items():
            with way.scope():
                backward = self._backward(way, copy, 0)
                measure = functools.partial(timing.peak_bytes, backward, self.device)
                peaks[side] = self.work.processes.each(measure)
            found[side] = copy.gradients()
            self._sum(*found[side].values())
            copy.drop_gradients()
        of_original = norms(found["original"])
        apart = norms({name: found["patched"][name] - value for name, value in found["original"].items()})
        errors = {group: apart[group] / norm if norm else apart[group] for group, norm in of_original.items()}
        sizes: dict[str, int] = {}
        for name, p in copy.trained.items():
            sizes[group_of(name)] = sizes.get(group_of(name), 0) + p.numel()
        return {"errors": errors, "norms": of_original, "sizes": sizes, "peaks": peaks}

    def held_out(self) -> dict[str, list[float]]:
        """Losses of the windows held out, by side: nats per token of each."""
        processes = self.work.processes
        mine = self.batches.held_out[processes.index :: processes.count]

        def score(model: Any) -> Tensor:
            model.eval()
            rows = [forward_modes.log_probs(forward_modes.prefill(model, x[None, :-1]), x[None, 1:]) for x in mine]
            return torch.tensor([-row.mean().item() for row in rows], dtype=torch.float64)

        found = {}
        for side, copy in self.copies.items():
            with self.ways[side].scope():
                parts = processes.together(functools.partial(score, copy.model))
            found[side] = torch.cat(parts).tolist()
        return found

    def around(self) -> Row:
        """What is compared before and after the steps."""
        return {"held_out": self.held_out(), **self.same_weights()}


class _Saved:
    """The state of both copies, kept now and then."""

    KEY = "train-state"

    def __init__(self, run: _Run) -> None:
        self._run, self._work = run, run.work
        self._next = time.monotonic() + SAVE_EVERY

    def restore(self) -> int:
        """Go back to the last state kept. Returns how many steps it has."""
        if not self._work.has(self.KEY):
            return 0
        row = self._work.get(self.KEY)
        for side, copy in self._run.copies.items():
            state = {key.removeprefix(f"{side}."): value for key, value in row.items() if key.startswith(f"{side}.")}
            copy.restore(state)
        return row["steps"]

    def keep(self, steps: int) -> None:
        """Keep the state when it is time."""
        processes = self._work.processes
        if not processes.from_main(lambda: time.monotonic() >= self._next):
            return
        start = time.monotonic()
        row: Row = {"steps": steps}
        for side, copy in self._run.copies.items():
            row |= {f"{side}.{key}": value for key, value in copy.state().items()}
        self._work.put(self.KEY, row)
        end = time.monotonic()
        self._next = end + max(SAVE_EVERY, 10 * (end - start))


# ----------------------------------------------------------------------------------------------------------- a measure


def measure(
    loaded: Loaded, ids: Tensor, source: str, options: TrainOptions, backend: str, work: Work
) -> Training | None:
    """Train two copies of a model, of which one is the loaded model itself.

    Args:
        loaded: the model.
        ids: tokens ``[L]`` of the text; its last tenth is held out.
        source: name of the text.
        options: how to train.
        backend: which the patched layers run on.
        work: the processes, which share each batch, and where rows are kept.

    Returns:
        The part of a report in the main process, None in the others.

    Raises:
        UserError: the dtype, the batch or the text cannot be used.
    """
    if loaded.dtype not in SAME_TRAINING:
        raise UserError(
            f"train takes --dtype {' or '.join(SAME_TRAINING)}: AdamW's moments underflow in {loaded.dtype}"
        )
    if options.batch % work.processes.count:
        raise UserError(f"--batch must be a multiple of the {work.processes.count} processes, got {options.batch}")
    check_length(loaded, options.context, "--context")
    batches = of_text(ids, source, options)
    if not work.has("train-after"):
        _train(
            _Run(copies(loaded, options), ways(loaded, options, backend), batches, loaded.model.device, work), options
        )
    before, after = work.get("train-before"), work.get("train-after")
    rows = [work.get(_key(number)) for number in range(options.steps)]
    groups = _groups(before, after, rows)
    original, patched = (_trained(side, before, after, rows) for side in ("original", "patched"))
    tolerance = verdicts.bounds(SAME_TRAINING[loaded.dtype], options.tolerance)
    verdict = grade(original, patched, groups, loaded.dtype, tolerance)
    if not work.processes.main:
        return None
    return Training(
        text=source,
        text_tokens=len(ids),
        **{name: value for name, value in vars(options).items() if name != "tolerance"},
        trained=sum(before["sizes"].values()),
        tolerance=tolerance,
        original=original,
        patched=patched,
        speedup=spread([row["original"]["ms"] / row["patched"]["ms"] for row in _warm(rows)]),
        groups=groups,
        grade=verdict.grade,
        why=verdict.why,
        passed=verdict.grade == "same",
    )


def _key(step: int) -> str:
    return f"train-{step:06d}"


def _train(run: _Run, options: TrainOptions) -> None:
    """Compute the rows that are not there."""
    work = run.work
    work.once("train-before", run.around)
    saved = _Saved(run)
    done = saved.restore()
    on_progress = work.bars.add("training", options.steps - done, "steps")
    for number in range(done, options.steps):
        work.put(_key(number), run.step(number))
        saved.keep(number + 1)
        on_progress(1)
    work.put("train-after", run.around())


def _warm(rows: list[Row]) -> list[Row]:
    """Without the first step, in which things are compiled and allocated."""
    return rows[1:] or rows


def _perplexity(losses: list[float]) -> float:
    """Of windows of one length."""
    return forward_modes.perplexity(-torch.tensor(losses, dtype=torch.float64))


def _trained(side: str, before: Row, after: Row, rows: list[Row]) -> Trained:
    return Trained(
        losses=[row[side]["loss"] for row in rows],
        norms=[math.hypot(*row[side]["norms"].values()) for row in rows],
        held_out_after=after["held_out"][side],
        ppl_before=_perplexity(before["held_out"][side]),
        ppl_after=_perplexity(after["held_out"][side]),
        step_ms=spread([row[side]["ms"] for row in _warm(rows)]),
        first_step_ms=rows[0][side]["ms"],
        peak_mib=after["peaks"][side] / 2**20,
    )


def _groups(before: Row, after: Row, rows: list[Row]) -> list[ParameterGroup]:
    def difference(group: str) -> float:
        pairs = [(row["original"]["norms"][group], row["patched"]["norms"][group]) for row in rows]
        return max((abs(patched / original - 1) for original, patched in pairs if original), default=0.0)

    return [
        ParameterGroup(
            name, before["sizes"][name], norm, before["errors"][name], after["errors"][name], difference(name)
        )
        for name, norm in before["norms"].items()
    ]


# ------------------------------------------------------------------------------------------------------------- verdict


def _beyond(original: Trained, patched: Trained, groups: list[ParameterGroup], bounds: dict[str, float]) -> list[str]:
    beyond = []
    for when in ("before", "after"):
        worst = max(groups, key=lambda group: getattr(group, f"error_{when}"))
        error = getattr(worst, f"error_{when}")
        if not error <= bounds["gradient"]:
            beyond.append(f"gradient of {worst.name} {when} training is {error:.1e} off, above {bounds['gradient']:g}")
    usual = statistics.median(relative_differences(original.losses, patched.losses))
    if not usual <= bounds["loss"]:
        beyond.append(f"losses are {usual:.1e} off in the median, above {bounds['loss']:g}")
    ratios = [math.expm1(abs(b - a)) for a, b in zip(original.held_out_after, patched.held_out_after)]
    usual = statistics.median(ratios)
    if not usual <= bounds["ppl_ratio"]:
        beyond.append(f"held-out perplexities are {usual:.1e} off in the median, above {bounds['ppl_ratio']:g}")
    return beyond


def grade(
    original: Trained, patched: Trained, groups: list[ParameterGroup], dtype: str, tolerance: dict[str, float]
) -> verdicts.Verdict:
    """Do they train the same? `tolerance` has the bounds of `accuracy.SAME_TRAINING`; `dtype` is the model's."""
    bad = [
        what
        for what, values in (
            ("a loss", [*original.losses, *patched.losses]),
            ("a gradient", [*original.norms, *patched.norms]),
            ("a gradient", [error for group in groups for error in (group.error_before, group.error_after)]),
            ("a perplexity", [original.ppl_after, patched.ppl_after]),
        )
        if not all(map(math.isfinite, values))
    ]
    if bad:
        return verdicts.Verdict("not finite", f"NaN or inf in {bad[0]}")
    near = CLOSE_TRAINING.get(dtype)
    return verdicts.graded(lambda bounds: _beyond(original, patched, groups, bounds), tolerance, near)
