"""Report what is patched: status, the kernels that a model's layers run on, and the original forwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .. import registry
from ..gradients import has_backward
from ..upstream import seams, versions
from . import in_force
from .families import all_families
from .family_patch import FamilyPatch, layer_class, rollback_missing
from .swap import class_attribute, describe, foreign_forward


@dataclass(frozen=True)
class FamilyStatus:
    """Status of one family.

    Attributes:
        name, layer: the model type and the name of its layer class.
        state: ``"patched"``, ``"original"``, ``"absent from transformers ..."`` or ``"replaced by ..."``.
        cuda_graphs: whether ``generate`` replays the decode steps of its models from CUDA graphs.
        reason: why `hf_gdn.patch` left the family original; None if it is patched or was not requested.
    """

    name: str
    layer: str
    state: str
    cuda_graphs: bool = False
    reason: str | None = None

    def __str__(self) -> str:
        text = f"{self.name:<16}{self.layer:<32}{self.state}"
        return text + (", CUDA graphs" if self.cuda_graphs else "") + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Status:
    """Result of `hf_gdn.status()`; prints as a small table.

    Attributes:
        backend: the backends of the patched families, ``"none"`` if no family is patched.
        families: one row per family.
        transformers: the installed version.
        missing: why this version cannot roll back tokens; None if it can or if no family is patched.
    """

    backend: str
    families: tuple[FamilyStatus, ...]
    transformers: str
    missing: str | None = None

    @property
    def active(self) -> bool:
        """Whether any family is patched."""
        return any(family.state == "patched" for family in self.families)

    def __str__(self) -> str:
        rows = [f"hf_gdn: backend {self.backend}, transformers {self.transformers}"]
        rows += [f"  {family}" for family in self.families]
        return "\n".join(rows + ([f"  tokens cannot be rolled back: {self.missing}"] if self.missing else []))


def status() -> Status:
    """Return which families are patched, and on which backend.

    Examples:
        >>> _ = hf_gdn.patch("kimi_linear")
        >>> [family.name for family in hf_gdn.status().families if family.state == "patched"]
        ['kimi_linear']
    """
    rows, table = [], in_force.current()
    for name, family in all_families().items():
        change = table.patches.get(name)
        if not seams.has_module(family.module):
            state = f"absent from transformers {versions.version()}"
        elif change is None:
            state = "original"
        else:
            current = class_attribute(change.layer.cls, "forward")
            state = "patched" if current is change.layer.replacement else f"replaced by {describe(current)}"
        seam = change.decode_swap if change is not None else None
        replays = seam is not None and class_attribute(seam.cls, seam.name) is seam.replacement
        rows.append(FamilyStatus(name, family.class_name, state, replays, table.misfits.get(name)))
    backend = ", ".join(dict.fromkeys(change.settings.backend for change in table.patches.values())) or "none"
    missing = rollback_missing() if table.patches else None
    return Status(backend, tuple(rows), versions.version(), missing)


def original_forward(family: str) -> Callable[..., Any]:
    """Return transformers' own forward of a family's layers, whether they are patched or not."""
    change = in_force.current().patches.get(family)
    return change.layer.original if change is not None else layer_class(all_families()[family]).forward


def families_in(model: torch.nn.Module) -> list[str]:
    """Names of the families whose layers a model contains, including those in text towers of multimodal models."""
    layers = {type(module).__name__ for module in model.modules()}
    return [name for name, family in all_families().items() if family.class_name in layers]


def unpatchable(model: torch.nn.Module) -> str | None:
    """Why the `hf_gdn.patch` in force left layers of a model original; None if it left none."""
    misfits = in_force.current().misfits
    found = [f"{name}: {misfits[name]}" for name in families_in(model) if name in misfits]
    return "; ".join(found) or None


def layer_kernels(model: torch.nn.Module, *, needs_grad: bool = False) -> dict[str, str]:
    """Return the kernels that the layers of a patched model run on.

    Args:
        model: the model.
        needs_grad: in training; otherwise without gradients.

    Returns:
        Layer name in the model -> ``"chunk_gdn: triton, step_gdn: triton"`` (in training ``"chunk_gdn: triton,
        backward_gdn: triton"``, without the second where PyTorch differentiates the first), or ``"original"`` if its
        class is not patched, or ``"replaced by ..."`` if the layer instance has its own forward.

    Examples:
        >>> from hf_gdn.patches import layer_kernels
        >>> with hf_gdn.patched(backend="eager"):
        ...     print(layer_kernels(model)["model.layers.0.linear_attn"])
        chunk_gdn: eager, step_gdn: eager
    """
    names = {family.class_name for family in all_families().values()}
    patches = in_force.current().patches.values()
    layers = {}
    for name, module in model.named_modules():
        change = next((change for change in patches if isinstance(module, change.layer.cls)), None)
        if change is None:
            if type(module).__name__ in names:
                layers[name] = "original"
            continue
        theirs = foreign_forward(module, change.layer)
        layers[name] = f"replaced by {theirs}" if theirs else _kernels(module, change, needs_grad)
    return layers


def _kernels(layer: Any, change: FamilyPatch, needs_grad: bool) -> str:
    weight, dims = layer.conv1d.weight, change.family.dims(layer)
    kind, backend = (weight.device.type, weight.dtype, (*dims,)), change.settings.backend
    chunk, recurrent, step = (f"{name}_{change.family.variant}" for name in ("chunk", "recurrent", "step"))
    beta_max = change.family.spec(layer).beta_scale
    if needs_grad:
        kernel = registry.resolve_cached(chunk, *kind, backend, True, beta_max)
        gradients = f", {registry.backward_of(chunk)}: {kernel.backend}" if has_backward(kernel) else ""
        return f"{chunk}: {kernel.backend}{gradients}"
    prefill, decode = (
        registry.resolve_cached(op, *kind, backend, False, beta_max).backend for op in (chunk, recurrent)
    )
    op = recurrent if registry.companion(step, *kind, decode) is None else step
    return f"{chunk}: {prefill}, {op}: {decode}"
