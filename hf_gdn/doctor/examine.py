"""Examine one row, in a child process: ``python -m hf_gdn.doctor.examine`` reads rows and writes findings, as JSON."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .. import registry, verification
from ..errors import named, reason
from ..eval.timing import captured
from ..registry import Kernel, Request
from ..testing import calls, tolerances
from ..testing.calls import Call, Results
from ..testing.compare import error
from ..upstream import triton_kernels
from ..upstream.device_errors import is_sticky, is_transient
from ..verification.trial import Verdict, check
from .rows import Row

CHECKED, REFUSED, NOT_SERVED = "checked", "refused", "not served"

# Launch parameters depend on the batch and the length; the chunk kernels' on both, a step's on the batch.
_BATCHES = (1, 5, 17, 65)
_LENGTHS = {"chunk": (1, 17, 100, 300), "prologue": (1, 17, 100, 300), "recurrent": (1, 3), "step": (1, 3)}
# Chunk kernels and their gradients have launch parameters by dtype; those of the others are the same for all.
_SWEPT = "bfloat16"
_BY_DTYPE = ("chunk_gdn", "chunk_kda", "backward_gdn", "backward_kda")


@dataclass(frozen=True)
class Finding:
    """What was found about a row.

    Attributes:
        row: the row.
        state: `CHECKED`, `REFUSED` (it is wrong or raises here) or `NOT_SERVED` (it is not for such calls).
        reason: why it is refused or does not serve; None if it was checked.
        error, bound: of the result closest to its bound, both relative.
        seconds: of the check, compilation included.
        launches: how many further batch sizes and lengths were compared.
        captured: how many of these were replayed from a CUDA graph, with the same bits.
        usage: registers, spills and bytes of shared memory of its compiled kernels, the largest of each.
    """

    row: Row
    state: str
    reason: str | None = None
    error: float | None = None
    bound: float | None = None
    seconds: float = 0.0
    launches: int = 0
    captured: int = 0
    usage: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {**self.row.as_json(), **{name: x for name, x in vars(self).items() if name != "row"}}

    @classmethod
    def of_json(cls, found: dict[str, Any]) -> Finding:
        of_row = {name: found.pop(name) for name in Row.__dataclass_fields__}
        return cls(Row.of_json(of_row), **found)


def examine(row: Row) -> Finding:
    """Examine a row in this process."""
    device, kernel = torch.device(row.device), registry.get(row.op, row.backend)
    refusal = kernel.why_not(row.request)
    if refusal is not None:
        return Finding(row, NOT_SERVED, refusal)
    if kernel.checked:
        verdict = verification.verdict_of(kernel, row.request, device, fresh=True)
    else:
        k_heads, v_heads, k_dim, v_dim = row.dims  # it is not compiled for their number, so one key head will do
        verdict = _check_plain(kernel, replace(row, dims=(1, v_heads // k_heads, k_dim, v_dim)).request, device)
    worst = max(verdict.errors.values(), key=lambda pair: pair[0] / pair[1], default=(None, None))
    found = Finding(row, CHECKED, None, *worst, seconds=verdict.seconds)
    if verdict.refused is not None:
        return replace(found, state=REFUSED, reason=verdict.refused)
    if device.type == "cuda" and kernel.checked and (row.dtype == _SWEPT or row.op in _BY_DTYPE):
        found = _sweep(kernel, found, device)
    return replace(found, usage=triton_kernels.usage() if kernel.checked else {})


@functools.cache
def _check_plain(kernel: Kernel, request: Request, device: torch.device) -> Verdict:
    return check(kernel, request, device)


def _sweep(kernel: Kernel, found: Finding, device: torch.device) -> Finding:
    """Compare every batch size and length with eager in fp32, and with its own replay from a CUDA graph.

    Larger batches repeat the rows of a small one, so that inputs and oracle are made once.
    """
    row, eager, few = found.row, registry.get(kernel.op, "eager"), 5
    lengths = _LENGTHS.get(row.op.partition("_")[0], (1, 300))
    sizes = dict(row.request.sizes, B=few, T=lengths[-1], dtype=row.request.dtype)
    longest = registry.ops()[row.op].make_inputs(**sizes, device=device)
    for length in lengths:
        small = calls.tokens(row.op, longest, slice(length))
        exact = calls.mapped(lambda x: x.float() if x.is_floating_point() else x, small)
        wanted = calls.run(eager, exact)
        for batch in _BATCHES:
            rows = torch.arange(batch, device=device) % few
            try:
                sentence = _compare(kernel, calls.rows(row.op, small, rows), wanted, rows)
            except Exception as raised:
                if is_sticky(raised, device):
                    raise verification.unusable(kernel, row.request, device, raised) from raised
                sentence = f"raised {named(raised)}"
            if sentence is not None:
                return replace(found, state=REFUSED, reason=f"{batch} × {length}: {sentence}")
            found = replace(found, launches=found.launches + 1, captured=found.captured + 1)
    return found


def _compare(kernel: Kernel, call: Call, wanted: Results, rows: torch.Tensor) -> str | None:
    """How a call differs from `wanted`, or from its own replay; None if it does not."""
    again, dtype = captured(lambda: calls.run(kernel, call), rows.device)(), calls.dtype_of(kernel.op, call)
    summed = calls.SIGNATURES[kernel.op].summed  # over all rows, of which there are others in `wanted`
    for name, x in calls.run(kernel, call).items():
        off = 0.0 if name in summed else error(x, wanted[name][rows])
        bar = tolerances.budget(kernel.op, dtype, name) + 1e-7
        if not off <= bar:
            return f"error {off:.1e} of {name}, at most {bar:.1e} is right"
        if not torch.equal(x, again[name]):
            return f"{name} differs when replayed from a CUDA graph"
    return None


def main() -> None:
    """Read rows from standard input, one JSON object a line, and write a finding for each to standard output."""
    for line in sys.stdin:
        row = Row.of_json(json.loads(line))
        try:
            found = examine(row)
        except (RuntimeError, MemoryError, OSError) as error:
            print(json.dumps(Finding(row, REFUSED, reason(error)).as_json()), flush=True)
            if is_transient(error):
                continue
            sys.exit(1)  # the device does not work any more: another process goes on
        print(json.dumps(found.as_json()), flush=True)


if __name__ == "__main__":
    main()
