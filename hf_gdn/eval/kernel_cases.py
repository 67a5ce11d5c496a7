"""What `hf-gdn kernels` measures: shapes of models, sizes, directions and backends, and the plan that they make."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import torch

from ..errors import UserError
from ..loading import models
from ..registry import Request
from . import candidates


@dataclass(frozen=True)
class Shape:
    """The dimensions of a model's linear-attention layers.

    Args:
        model_type: the family in transformers.
        mixer: ``"gdn"`` or ``"kda"``.
        k_heads, v_heads: heads of q and k; of v, gates and state.
        k_dim, v_dim: K and V of a head.
    """

    model_type: str
    mixer: str
    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int

    @property
    def ops(self) -> tuple[str, str]:
        """The chunked and the recurrent op."""
        return f"chunk_{self.mixer}", f"recurrent_{self.mixer}"

    def request(self, op: str, device: torch.device, dtype: torch.dtype) -> Request:
        """What the registry is asked."""
        return Request(op, device.type, dtype, self.k_heads, self.v_heads, self.k_dim, self.v_dim)


def _read(path: Path) -> Shape:
    config = json.loads(path.read_text(encoding="utf-8"))
    if "linear_num_heads" in config:
        heads, dim = config["linear_num_heads"], config["linear_head_dim"]
        return Shape(config["model_type"], "kda", heads, heads, dim, dim)
    names = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    return Shape(config["model_type"], "gdn", *(config[name] for name in names))


# Released models, with the defaults of transformers' config classes, and the embedded ones.
SHAPES = {
    "qwen3_next-80b": Shape("qwen3_next", "gdn", 16, 32, 128, 128),
    "kimi_linear-48b": Shape("kimi_linear", "kda", 32, 32, 128, 128),
    "qwen3_5_moe-35b": Shape("qwen3_5_moe", "gdn", 16, 32, 128, 128),
    # What each of eight processes has of them.
    "qwen3_next-80b-tp8": Shape("qwen3_next", "gdn", 2, 4, 128, 128),
    "kimi_linear-48b-tp8": Shape("kimi_linear", "kda", 4, 4, 128, 128),
    "olmo_hybrid": Shape("olmo_hybrid", "gdn", 30, 30, 96, 192),
    **{path.parent.name: _read(path) for path in sorted(models.ASSETS.glob("*/config.json"))},
}
DEFAULT_SHAPES = ("qwen3_next-80b", "kimi_linear-48b")
OPS = tuple(dict.fromkeys(op for shape in SHAPES.values() for op in shape.ops))
DIRECTIONS = ("forward", "backward")
# Batch and tokens of a chunk op's call, batches of a decode step.
_CUDA_CALLS = ((1, 512), (1, 2048), (1, 8192), (1, 32768), (1, 131072), (8, 2048), (16, 4096))
_CALLS = {"chunk_gdn": ((1, 512), (1, 2048)), "chunk_kda": ((1, 128), (1, 512))}
_CUDA_STEPS, _STEPS = (1, 8, 32, 128, 256), (1, 4)
_TOKENS = 512  # where batches were asked for and tokens were not


@dataclass(frozen=True)
class KernelBenchOptions:
    """What is to be measured, and how; empty means the defaults.

    Args:
        shapes: names from `SHAPES`.
        ops: names from `OPS`; all that the shapes have.
        backends: every one that can serve.
        batch: sequences a call.
        tokens: tokens a sequence, of chunk ops; a decode step has one. Where batch or tokens are given, every pair is
            measured, with 1 sequence or 512 tokens where the other is not.
        directions: ``"forward"``, and ``"backward"`` for forward and backward together, of chunk ops.
        dtype: float32 on a CPU, else bfloat16.
        device: the best there is.
        gpu_graph: time replays of a CUDA graph.
        seconds: budget of one measurement.
    """

    shapes: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    batch: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    directions: tuple[str, ...] = ("forward",)
    dtype: str | None = None
    device: str | None = None
    gpu_graph: bool = False
    seconds: float = 1.0


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


def target(options: KernelBenchOptions) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a run. Raises UserError where they cannot be used."""
    device = models.pick_device(options.device)
    name = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    _known("dtype", [name], models.DTYPES)
    if options.gpu_graph and device.type != "cuda":
        raise UserError(f"--gpu-graph needs a CUDA device; the device is {device}")
    return device, models.DTYPES[name]


def plan(options: KernelBenchOptions) -> list[Case]:
    """The cases of a run, every backend of a call side by side, transformers first.

    Raises:
        UserError: a name is not known, options do not fit together, or a backend asked for by name refuses.
    """
    device, dtype = target(options)
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


def left_out(options: KernelBenchOptions) -> list[str]:
    """Why backends have no row in `plan`, a line each."""
    device, dtype = target(options)
    ops: dict[tuple[str, str], list[str]] = {}
    for name, op, direction in _calls(options):
        for backend, refusal in _refusals(name, op, direction, options.backends, device, dtype).items():
            if refusal is not None and op not in ops.setdefault((backend, refusal), []):
                ops[backend, refusal].append(op)
    return [f"{backend} is left out of {', '.join(names)}: it {refusal}" for (backend, refusal), names in ops.items()]


def _known(name: str, values: Iterable[str], valid: Iterable[str]) -> None:
    valid = list(valid)
    for value in values:
        if value not in valid:
            raise UserError(f"--{name} {value} is not known; {name}s: {', '.join(valid)}")


def _calls(options: KernelBenchOptions) -> list[tuple[str, str, str]]:
    """Shape, op and direction of what is to be measured, after checking all that no device is needed for."""
    _known("shape", options.shapes, SHAPES)
    _known("op", options.ops, OPS)
    _known("backend", options.backends, candidates.backends())
    _known("direction", options.directions, DIRECTIONS)
    for name, values in (("batch", options.batch), ("tokens", options.tokens)):
        if any(value < 1 for value in values):
            raise UserError(f"--{name} must be at least 1, got {', '.join(map(str, values))}")
    if not options.directions:
        raise UserError(f"no direction is given; directions: {', '.join(DIRECTIONS)}")
    if not options.seconds > 0:
        raise UserError(f"--seconds must be above 0, got {options.seconds}")
    shapes = options.shapes or DEFAULT_SHAPES
    had = tuple(dict.fromkeys(op for name in shapes for op in SHAPES[name].ops))
    ops = options.ops or had
    for op in ops:
        if op not in had:
            raise UserError(f"--op {op} is of none of the shapes {', '.join(shapes)}; their ops: {', '.join(had)}")
    for name in options.shapes:
        if not set(SHAPES[name].ops) & set(ops):
            raise UserError(f"--shape {name} has no op {' or '.join(ops)}; it has: {', '.join(SHAPES[name].ops)}")
    steps = [op for op in ops if op.startswith("recurrent")]
    if options.tokens and len(steps) == len(ops):
        raise UserError(f"--tokens are of chunk ops; a call of {steps[0]} takes one token")
    if "backward" in options.directions and (len(steps) == len(ops) or (options.ops and steps)):
        raise UserError(f"--direction backward is of chunk ops: nothing is trained through decode steps of {steps[0]}")
    return [
        (name, op, direction)
        for name in shapes
        for op in SHAPES[name].ops
        for direction in options.directions
        if op in ops and (direction == "forward" or op.startswith("chunk"))
    ]


def _sizes(op: str, options: KernelBenchOptions, device: torch.device) -> Iterable[tuple[int, int]]:
    """Pairs of batch and tokens."""
    cuda = device.type == "cuda"
    if op.startswith("recurrent"):
        return [(batch, 1) for batch in options.batch or (_CUDA_STEPS if cuda else _STEPS)]
    if not options.batch and not options.tokens:
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
            lacks = "has no backward" if direction == "backward" and not kernel.differentiable else None
            found[kernel.backend] = kernel.why_not(request) or lacks
    return found
