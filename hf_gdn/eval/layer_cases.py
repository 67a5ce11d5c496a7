"""What `hf-gdn kernels --level layer` times: whole layers, their phases and sizes, and the plan that they make."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from .. import registry
from ..errors import UserError
from ..loading.shapes import LARGE, SHAPES
from . import kernel_cases
from .options import KernelBenchOptions

PHASES = ("prefill", "decode")
# Batch and tokens of prefills, batches of decode steps.
_PREFILL = {"cuda": ((1, 512), (1, 2048), (8, 2048), (1, 16384)), "cpu": ((1, 512),)}
_DECODE = {"cuda": (1, 8, 32, 128, 256), "cpu": (1, 4)}


@dataclass(frozen=True)
class Case:
    """A layer's prefill or decode step; all sides are measured together."""

    shape: str
    phase: str
    batch: int
    tokens: int
    backends: tuple[str, ...]

    @property
    def key(self) -> str:
        """A name that no other case has, usable as a file name."""
        return f"layer.{self.shape}.{self.phase}.{self.batch}x{self.tokens}"


def _op(shape: str, phase: str) -> str:
    chunked, recurrent = SHAPES[shape].ops
    return chunked if phase == "prefill" else recurrent


def _refusals(shape: str, phase: str, wanted: tuple[str, ...], request: registry.Request) -> dict[str, str | None]:
    kernels = registry.kernels(_op(shape, phase))
    return {k.backend: k.why_not(request) for k in kernels if not wanted or k.backend in wanted}


def plan(options: KernelBenchOptions, device: torch.device, dtype: torch.dtype) -> tuple[list[Case], list[str]]:
    """The cases of a run, and why backends are left out, a line each.

    Raises:
        UserError: a name is not known, options do not fit together, or a backend asked for by name refuses.
    """
    kernel_cases.check(options)
    kernel_cases.known("phase", options.phases, PHASES)
    kernel_cases.known("backend", options.backends, registry.backends())
    if options.ops or options.directions != ("forward",) or options.normalized:
        raise UserError("--op, --direction and --normalized are of --level op")
    if options.first_call and options.quantize is not None:
        raise UserError("--first-call measures layers that are not quantized; give it or --quantize")
    if not options.phases:
        raise UserError(f"no phase is given; phases: {', '.join(PHASES)}")
    if options.tokens and "prefill" not in options.phases:
        raise UserError("--tokens are of --phase prefill; a decode step takes one token")
    cases, lines = [], dict[str, None]()
    kind = "cuda" if device.type == "cuda" else "cpu"
    for shape, phase in itertools.product(options.shapes or LARGE, options.phases):
        if SHAPES[shape].part > 1:
            raise UserError(f"--shape {shape} is a part of a layer; --level layer takes whole ones")
        request = SHAPES[shape].request(_op(shape, phase), device, dtype)
        refusals = _refusals(shape, phase, options.backends, request)
        for backend, refusal in refusals.items():
            if refusal is not None and options.backends:
                raise UserError(f"backend {backend!r} cannot serve {request.op} at {shape}: {refusal}")
            if refusal is not None:
                lines[f"{backend} is left out of {request.op}: it {refusal}"] = None
        backends = tuple(backend for backend, refusal in refusals.items() if refusal is None)
        if phase == "decode":
            sizes = [(batch, 1) for batch in options.batch or _DECODE[kind]]
        elif options.batch or options.tokens:
            sizes = list(itertools.product(options.batch or (1,), options.tokens or (_PREFILL[kind][0][1],)))
        else:
            sizes = list(_PREFILL[kind])
        cases += [Case(shape, phase, batch, tokens, backends) for batch, tokens in sizes]
    return cases, list(lines)
