"""What the original forwards of transformers run on: its torch functions, another package's kernels, or the hub's.

transformers binds these names in a modeling module when that is imported, or when the ``kernels`` package replaces
them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from .hub_kernels import wrapped


def implementation(function: Any) -> str:
    """Where one of transformers' kernel functions resolved to: "torch", the package's name, or "hub: ...".

    "hf_gdn" is `hf_gdn.kernel_mapping`.
    """
    if isinstance(function, torch.nn.Module):  # the kernels package made it one, and may have given it another forward
        forward = getattr(function.forward, "__func__", function.forward)
        if forward is not type(function).forward:
            module = inspect.unwrap(forward).__module__
            return "hf_gdn" if module.startswith("hf_gdn.") else f"hub: {module}"
        function = wrapped(function)
    bound = inspect.getclosurevars(function).nonlocals.get("implementation", function)
    package = getattr(bound, "__module__", "?").partition(".")[0]
    return "torch" if package == "transformers" else package


def kernels_of(forward: Callable[..., Any]) -> dict[str, str]:
    """The kernel functions of a layer's original forward by name, and where each resolved to."""
    forward = inspect.unwrap(forward)
    names = [name for name in forward.__code__.co_names if "conv1d_" in name or "delta_" in name]
    return {name: implementation(forward.__globals__[name]) for name in names if name in forward.__globals__}


def delta_rule_of(forward: Callable[..., Any]) -> str:
    """What the delta rule of a layer's original forward runs on: "torch", another package, or "hub: ..."."""
    found = [where for name, where in kernels_of(forward).items() if "delta_" in name]
    return next((where for where in found if where not in ("torch", "hf_gdn")), "torch")
