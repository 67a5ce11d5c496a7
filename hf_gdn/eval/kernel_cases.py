"""What `hf-gdn kernels` times: which calls of ops and layers, on which backends, and the plan that they make."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote

import torch

from .. import gradients, registry
from ..errors import UserError
from ..loading import models
from ..loading.options import DeviceOptions
from ..loading.shapes import LARGE, SHAPES
from . import candidates, timing
from .options import KernelBenchOptions

DIRECTIONS = ("forward", "backward")
# Batch and tokens of a chunk op's call, batches of a decode step, sizes of the ops around the delta rule.
_CUDA_CALLS = ((1, 512), (1, 2048), (1, 8192), (1, 32768), (1, 131072), (8, 2048), (16, 4096))
_CALLS = {"chunk_gdn": ((1, 512), (1, 2048)), "chunk_kda": ((1, 128), (1, 512))}
_CUDA_STEPS, _STEPS = (1, 8, 32, 128, 256), (1, 4)
_CUDA_OTHERS, _OTHERS = ((1, 8192), (8, 2048)), ((1, 512),)
_TOKENS = 512  # where batches were asked for and tokens were not


def ops_of(shape: str) -> tuple[str, ...]:
    """Names of all ops of a shape's layers; `Shape.ops`, the first of them, are measured by default."""
    foreign = tuple(f"_{other.variant}" for other in SHAPES.values() if other.variant != SHAPES[shape].variant)
    others = [op for op in registry.ops() if not op.endswith(foreign)]
    return tuple(dict.fromkeys((*SHAPES[shape].ops, *others)))


@functools.cache
def _arguments(op: str) -> frozenset[str]:
    return frozenset(registry.ops()[op].make_inputs(B=1, T=1, HK=1, HV=1, K=8, V=8))


def is_delta_rule(op: str) -> bool:
    """Whether an op has the delta rule's own signature; the others surround it, or are all of a layer's step."""
    return "initial_state" in _arguments(op)


def is_decode(op: str) -> bool:
    """Whether an op reads the next token of a sequence, its state updated in place."""
    return op.startswith("recurrent") or "state" in _arguments(op)


@dataclass(frozen=True)
class Case:
    """One row: a call of `op` at `shape`, ``batch`` sequences of ``tokens``, on one backend."""

    op: str
    shape: str
    batch: int
    tokens: int
    direction: str
    backend: str


def key(case: Case) -> str:
    """A name that no other case has, usable as a file name."""
    return f"{case.op}.{case.shape}.{case.batch}x{case.tokens}.{case.direction}.{quote(case.backend, safe='')}"


def target(options: KernelBenchOptions, where: DeviceOptions) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a run. Raises UserError where they cannot be used."""
    device = models.pick_device(where.device)
    name = where.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    known("dtype", [name], models.DTYPES)
    if options.gpu_graph and device.type != "cuda":
        raise UserError(f"--gpu-graph needs a CUDA device; the device is {device}")
    if options.gpu_graph and not timing.has_triton():
        raise UserError("--gpu-graph needs triton, whose timer captures the graph: pip install triton")
    return device, models.DTYPES[name]


def plan(options: KernelBenchOptions, where: DeviceOptions) -> list[Case]:
    """The cases of a run, every backend of a call side by side, transformers first.

    Raises:
        UserError: a name is not known, options do not fit together, or a backend asked for by name refuses.
    """
    device, dtype = target(options, where)
    cases = []
    for name, op, direction in _calls(options):
        refusals = _refusals(name, op, direction, options.backends, device, dtype)
        for backend, refusal in refusals.items():
            if refusal is not None and options.backends:
                raise UserError(f"backend {backend!r} cannot serve {op} at {name}: {refusal}")
        for batch, tokens in _sizes(op, options, device):
            cases += [Case(op, name, batch, tokens, direction, b) for b, refusal in refusals.items() if refusal is None]
    for backend in options.backends:
        served = {case.op for case in cases if case.backend == backend}
        if not served or not served.issuperset(options.ops):
            lacking = [op for op in dict.fromkeys(op for _, op, _ in _calls(options)) if op not in served]
            raise UserError(f"backend {backend!r} has no kernel of {' or '.join(lacking)}")
    return list(dict.fromkeys(cases))


def left_out(options: KernelBenchOptions, where: DeviceOptions) -> list[str]:
    """Why backends have no row in `plan`, a line each."""
    device, dtype = target(options, where)
    ops: dict[tuple[str, str], list[str]] = {}
    for name, op, direction in _calls(options):
        for backend, refusal in _refusals(name, op, direction, options.backends, device, dtype).items():
            if refusal is not None and op not in ops.setdefault((backend, refusal), []):
                ops[backend, refusal].append(op)
    return [f"{backend} is left out of {', '.join(names)}: it {refusal}" for (backend, refusal), names in ops.items()]


def known(name: str, values: Iterable[str], valid: Iterable[str]) -> None:
    valid = list(valid)
    for value in values:
        if value not in valid:
            raise UserError(f"--{name} {value} is not known; {name}s: {', '.join(valid)}")


def check(options: KernelBenchOptions) -> None:
    """Raise UserError for what is wrong whatever the level is."""
    known("shape", options.shapes, SHAPES)
    known("backend", options.backends, candidates.backends())
    for name, values in (("batch", options.batch), ("tokens", options.tokens)):
        if any(value < 1 for value in values):
            raise UserError(f"--{name} must be at least 1, got {', '.join(map(str, values))}")
    if not options.seconds > 0:
        raise UserError(f"--seconds must be above 0, got {options.seconds}")


def _calls(options: KernelBenchOptions) -> list[tuple[str, str, str]]:
    """Shape, op and direction of what is to be measured, after checking all that no device is needed for."""
    check(options)
    known("op", options.ops, registry.ops())
    known("direction", options.directions, DIRECTIONS)
    if not options.directions:
        raise UserError(f"no direction is given; directions: {', '.join(DIRECTIONS)}")
    if options.first_call:
        raise UserError("--first-call is of --level layer, got --level op")
    if options.quantize is not None:
        raise UserError("--quantize is of --level layer, got --level op")
    shapes = options.shapes or LARGE
    had = dict.fromkeys(op for name in shapes for op in ops_of(name))
    ops = options.ops or tuple(op for name in shapes for op in SHAPES[name].ops)
    for op in ops:
        if op not in had:
            raise UserError(f"--op {op} is of none of the shapes {', '.join(shapes)}; their ops: {', '.join(had)}")
    for name in options.shapes:
        if not set(ops_of(name)) & set(ops):
            raise UserError(f"--shape {name} has no op {' or '.join(ops)}; it has: {', '.join(ops_of(name))}")
    untrained = [op for op in ops if not op.startswith("chunk")]
    if "backward" in options.directions and (len(untrained) == len(ops) or (options.ops and untrained)):
        raise UserError(f"--direction backward is of chunk ops: nothing is trained through {untrained[0]}")
    return [
        (name, op, direction)
        for name in shapes
        for op in ops_of(name)
        for direction in options.directions
        if op in ops and (direction == "forward" or op.startswith("chunk"))
    ]


def _sizes(op: str, options: KernelBenchOptions, device: torch.device) -> Iterable[tuple[int, int]]:
    """Pairs of batch and tokens."""
    cuda = device.type == "cuda"
    if is_decode(op):
        tokens = options.tokens if op in options.ops and options.tokens else (1,)
        return itertools.product(options.batch or (_CUDA_STEPS if cuda else _STEPS), tokens)
    if not options.batch and not options.tokens:
        if not is_delta_rule(op):
            return _CUDA_OTHERS if cuda else _OTHERS
        return _CUDA_CALLS if cuda else _CALLS[op]
    return itertools.product(options.batch or (1,), options.tokens or (_TOKENS,))


def _refusals(
    shape: str, op: str, direction: str, wanted: tuple[str, ...], device: torch.device, dtype: torch.dtype
) -> dict[str, str | None]:
    """Backend -> why it does not serve, or None, of those wanted that have a kernel of `op`."""
    request = SHAPES[shape].request(op, device, dtype)
    found = {}
    for kernel in candidates.candidates(op, SHAPES[shape].model_type):
        if not wanted or kernel.backend in wanted:
            trains = kernel.differentiable or gradients.has_backward(kernel)
            lacks = "has no backward" if direction == "backward" and not trains else None
            found[kernel.backend] = kernel.why_not(request) or lacks
    return found
