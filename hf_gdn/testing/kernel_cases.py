"""The table of what a kernel has to get right: for every op, calls by name, and the invariant that holds for each.

`cases(op)` are small enough for a CPU and for Triton's interpreter; `cases(op, "cuda")` have the shapes of real layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..registry import Kernel
from . import real_cases, small_cases
from .case import Case
from .invariants import host_never_asked

_TABLES: dict[tuple[str, str], Callable[[str], Iterator[Case]]] = {
    (f"{kind}_{variant}", device): table
    for kind, tables in {
        "chunk": (small_cases.chunk, real_cases.chunk),
        "backward": (small_cases.backward, real_cases.backward),
        "recurrent": (small_cases.recurrent, real_cases.recurrent),
        "step": (small_cases.step, real_cases.step),
        "prologue": (small_cases.prologue, real_cases.prologue),
        "backward_prologue": (small_cases.backward_prologue, real_cases.backward_prologue),
    }.items()
    for variant in ("gdn", "kda")
    for device, table in zip(("cpu", "cuda"), tables)
}
_TABLES["gated_norm", "cpu"], _TABLES["gated_norm", "cuda"] = small_cases.gated_norm, real_cases.gated_norm
_TABLES["backward_gated_norm", "cpu"] = small_cases.backward_gated_norm
_TABLES["backward_gated_norm", "cuda"] = real_cases.gated_norm


def check_kernel(kernel: Kernel, device: str = "cpu", apart: float = 0.0, asynchronous: bool | None = None) -> int:
    """Run every case of the kernel's op that the kernel does not refuse; returns how many there were.

    Args:
        kernel: the kernel, registered or not.
        device: ``"cpu"`` for small calls, ``"cuda"`` for calls with the shapes of real layers.
        apart: relative error allowed between a call and the same in pieces, batched or packed; 0 asks for equal bits.
        asynchronous: the kernel promises never to read a tensor's values on the host; true by default on a GPU.

    Raises:
        AssertionError: an invariant does not hold; the message names the case.

    Examples:
        >>> from hf_gdn import registry
        >>> from hf_gdn.testing import check_kernel
        >>> check_kernel(registry.get("gated_norm", "eager"), apart=1e-6) > 20
        True
    """
    asynchronous = device != "cpu" if asynchronous is None else asynchronous
    ran = 0
    for case in cases(kernel.op, torch.device(device).type):
        if case.why_not(kernel, torch.device(device).type) or (case.invariant is host_never_asked and not asynchronous):
            continue
        try:
            case.check(kernel, device, apart)
        except AssertionError as error:
            raise AssertionError(f"{case} of backend {kernel.backend}: {error}") from error
        ran += 1
    return ran


def cases(op: str, device_type: str = "cpu") -> list[Case]:
    """All cases of an op.

    Raises:
        KeyError: the table does not have the op.

    Examples:
        >>> from hf_gdn.testing import cases
        >>> print(cases("chunk_gdn")[1])
        chunk_gdn-matches_reference-one_token
    """
    return list(_TABLES[op, "cpu" if device_type == "cpu" else "cuda"](op))
