"""Compare a kernel's results with the oracle's on its proofs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from .. import registry
from ..errors import named
from ..registry import Kernel, Request
from ..testing import calls, tolerances
from ..testing.compare import error
from ..upstream.device_errors import is_sticky, is_transient
from .proofs import HARD, proofs


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        refused: why the kernel must not be used, None if it passed.
        errors: by proof and result: the relative error, and the largest allowed.
        seconds: what the check took, compilation included.
    """

    refused: str | None
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    seconds: float = 0.0


def check(kernel: Kernel, request: Request, device: torch.device) -> Verdict:
    """Run a kernel on the proofs of a request, on one device.

    A result passes within the tolerance of the tests (`hf_gdn.testing.tolerances`), or twice the error of eager on the
    same call where that is more.

    Raises:
        Exception: the kernel has left the device unusable, memory or disk space was short (`is_transient`), or the
            oracle failed.
    """
    start, errors, refused = time.perf_counter(), dict[str, tuple[float, float]](), None
    eager = registry.get(request.op, "eager")
    for proof in proofs(request):
        call = proof.call(device)
        exact = calls.reference(request.op, call)
        try:
            got = calls.run(kernel, call)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
        except Exception as raised:
            if is_transient(raised) or is_sticky(raised, device):
                raise
            refused = f"{proof.name} raised {named(raised)}"
            break
        plain = calls.run(eager, call)
        for name, wanted in exact.items():
            found = error(got[name], wanted)
            factor = tolerances.HARD_CALLS if proof.name == HARD else 1
            bar = factor * tolerances.budget(request.op, request.dtype, name)
            bar = max(bar, 2 * error(plain[name], wanted) + 1e-7)
            errors[f"{proof.name}: {name}"] = found, bar
            if not found <= bar and refused is None:
                refused = f"error {found:.1e} of {name} ({proof.name}), at most {bar:.1e} is right"
        if refused is not None:
            break
    return Verdict(refused, errors, time.perf_counter() - start)
