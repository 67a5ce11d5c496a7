"""What a comparison of two trainings finds: dataclasses (docs/report.md)."""

from __future__ import annotations

from dataclasses import dataclass

from .spreads import Spread


def relative_differences(original: list[float], patched: list[float]) -> list[float]:
    """How far each patched value is from the original's; the value itself where that is zero."""
    return [abs(b - a) / a if a else abs(b) for a, b in zip(original, patched)]


@dataclass(frozen=True)
class Trained:
    """One side's training.

    ``losses``: of each step before its update, nats per token. ``norms``: of the whole gradient, each step.
    ``held_out_after``: of each window held out, after training, nats per token. ``ppl_before``, ``ppl_after``: their
    perplexity. ``step_ms``: forward, backward and update, without the first
    step, which takes ``first_step_ms``. ``peak_mib``: memory that a forward and backward takes beside weights and
    optimizer.
    """

    losses: list[float]
    norms: list[float]
    held_out_after: list[float]
    ppl_before: float
    ppl_after: float
    step_ms: Spread
    first_step_ms: float
    peak_mib: float


@dataclass(frozen=True)
class ParameterGroup:
    """The gradients of the parameters that have one name in all layers.

    ``norm``: of the original's gradient before training. ``error_before``, ``error_after``: relative Frobenius error
    of the patched model's gradient on the same weights and batch, before and after training. ``norm_difference``: the
    largest relative difference of the two trainings' norms at a step.
    """

    name: str
    parameters: int
    norm: float
    error_before: float
    error_after: float
    norm_difference: float


@dataclass(frozen=True)
class Training:
    """The part of a report that says whether the patched model trains the same.

    ``trained``: number of parameters that are trained. ``grade`` and ``why`` as for parity.
    """

    text: str
    text_tokens: int
    steps: int
    batch: int
    context: int
    lr: float
    seed: int
    lora: int | None
    packed: bool
    checkpointing: bool
    trained: int
    tolerance: dict[str, float]
    original: Trained
    patched: Trained
    speedup: Spread
    groups: list[ParameterGroup]
    grade: str
    why: str
    passed: bool

    def sides(self) -> dict[str, Trained]:
        """Original and patched."""
        return {"original": self.original, "patched": self.patched}

    def worst_group(self) -> ParameterGroup:
        """Whose gradient is farthest from the original's."""
        return max(self.groups, key=lambda group: max(group.error_before, group.error_after))

    def loss_differences(self) -> list[float]:
        """Relative difference of the losses, each step."""
        return relative_differences(self.original.losses, self.patched.losses)
