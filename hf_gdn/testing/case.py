"""A call of an op and the invariant that holds for it; families, dtypes and sizes by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import registry
from ..registry import Kernel, Request
from .calls import Call
from .invariants import matches_reference
from .slots import in_slots

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF = (torch.float16, torch.bfloat16)
# By model family: the variant of its delta rule, and its `LayerSpec` where it differs from the default.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("gdn", {}),
    "qwen4_exp": ("gdn", dict(gate="sigmoid")),
    "olmo_hybrid": ("gdn", dict(beta_scale=2.0, eps=1e-5)),
    "kimi_linear": ("kda", dict(gate="sigmoid", norm_in_fp32=True)),
    "glm5_next": ("kda", dict(gate="sigmoid", norm_in_fp32=True, lower_bound=-5.0)),
    "bailing_hybrid": ("kda", dict(gate="sigmoid", norm_in_fp32=True, lower_bound=-5.0, decay_in_dtype=True)),
}


@dataclass(frozen=True)
class Case:
    """A call of an op, and what holds for it.

    Args:
        op: name of the op.
        name: of the call, unique among the op's cases of one invariant.
        invariant: a function of `hf_gdn.testing.invariants`.
        sizes: keyword arguments of the op's `make_inputs`.
        change: what makes the call of these inputs, if they are not the call already.
        options: further keyword arguments of the invariant.
        interpret: whether Triton's interpreter, which is slow, runs it too; where not, it runs a smaller call like it.
    """

    op: str
    name: str
    invariant: Callable[..., Any] = matches_reference
    sizes: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[Call], Call] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    interpret: bool = True

    def __str__(self) -> str:
        return f"{self.op}-{self.invariant.__name__}-{self.name}"

    def call(self, device: str | torch.device = "cpu") -> Call:
        """The arguments, with the same numbers each time."""
        inputs = registry.ops()[self.op].make_inputs(**self.sizes, device=device)
        return inputs if self.change is None else self.change(inputs)

    def why_not(self, kernel: Kernel, device_type: str = "cpu") -> str | None:
        """Why a kernel does not serve the call, or None if it does."""
        sizes = {"HK": 2, "HV": 2, "K": 64, "V": 64, "dtype": torch.float32, **self.sizes}
        if self.invariant is in_slots and self.op.startswith("prologue") and not kernel.slots:
            return "it takes no slots, and eager's prologue is called instead"
        heads = (sizes[name] for name in ("HK", "HV", "K", "V"))
        return kernel.why_not(Request(self.op, device_type, sizes["dtype"], *heads))

    def check(self, kernel: Kernel, device: str | torch.device = "cpu", apart: float = 0.0) -> None:
        """Raise AssertionError where the kernel does not keep the invariant.

        Args:
            kernel: a kernel of `op`.
            device: where to call it.
            apart: see `hf_gdn.testing.invariants`.
        """
        self.invariant(kernel, self.call(device), apart, **self.options)


def named_dtypes(dtypes: Iterable[torch.dtype]) -> list[tuple[torch.dtype, str]]:
    return [(dtype, str(dtype).removeprefix("torch.")) for dtype in dtypes]


def named_sizes(names: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Shapes by name as keyword arguments."""
    for name, shape in shapes.items():
        yield name, dict(zip(names.split(), shape, strict=True))


def families_of(op: str) -> dict[str, dict[str, Any]]:
    """The specs of the families whose variant is the op's, by name, the plain one first."""
    return {name: spec for name, (variant, spec) in FAMILIES.items() if op.endswith(variant)}


def norm_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What of a family's spec concerns the gated norm."""
    return {name: x for name, x in spec.items() if name in ("gate", "norm_in_fp32", "eps")}
