"""What Triton's compiled kernels use of a device, and how it interprets them: private names of Triton 3.4 to 3.9."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

_PACKAGE = "hf_gdn.kernels.triton"


def jit_functions() -> list[Any]:
    """All Triton functions of this package's modules that are loaded."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(_PACKAGE)]
    found = [value for module in modules for value in vars(module).values() if hasattr(value, "device_caches")]
    return list({id(function): function for function in found}.values())


def _compiled() -> Iterator[Any]:
    """All kernels of this package that this process has compiled or loaded."""
    for function in jit_functions():
        for caches in function.device_caches.values():
            yield from caches[0].values()


def usage() -> dict[str, int]:
    """Registers a thread, spilled registers and bytes of shared memory a program: the largest of all kernels.

    Empty where nothing was compiled, or this version of Triton does not tell.
    """
    found: dict[str, int] = {}
    try:
        for kernel in _compiled():
            used = {"registers": kernel.n_regs, "spills": kernel.n_spills, "shared": kernel.metadata.shared}
            found = {name: max(found.get(name, 0), int(used[name])) for name in used if used[name] is not None}
    except (AttributeError, TypeError, KeyError, IndexError):
        return {}
    return found


def round_to_bf16() -> None:
    """Make Triton's interpreter round fp32 to bf16, as cards do.

    It cuts bits off, three times the error and all to one side, so that right kernels miss their tolerances.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert = getattr(interpreter, "_convert_float", None)
    if convert is None:
        return

    def rounded(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(x.copy()).bfloat16().view(torch.uint16).numpy()
        return convert(x, source, target, mode)

    interpreter._convert_float = rounded
