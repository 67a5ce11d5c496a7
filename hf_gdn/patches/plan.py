"""Choose the kernels of a layer, once per layer, device and dtype, and cache the choice."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .. import registry
from ..kernels.contract import LayerSpec, Projections, Weights
from ..registry import Kernel
from .families.base import Dims, Family

MAX_WIDTH = 8  # widest convolution that the Triton kernels serve


@dataclass(frozen=True)
class Settings:
    """How patched layers run."""

    backend: str = "auto"
    strict: bool = False


class Route(NamedTuple):
    """The kernels for one call of a layer; norm is None if the norm module has to be called."""

    delta_rule: Kernel
    prologue: Kernel
    norm: Kernel | None


class KernelPlan:
    """The kernels of a layer for one device, dtype and gradient mode.

    Attributes:
        dims, spec: dimensions and options of the layer.
        needs_grad: whether gradients are needed.
        asked: the backend that the user asked for.
        few: the route for a few tokens, with the recurrent kernel.
        step: the kernel that does everything between the projections for the next few tokens of a cache; None if its
            backend has none that serves the layer.
    """

    def __init__(
        self, family: Family, settings: Settings, layer: Any, projected: Projections, weights: Weights, grad: bool
    ) -> None:
        self.dims: Dims = family.dims(layer)
        self.spec: LayerSpec = family.spec(layer)
        self.needs_grad, self.asked = grad, settings.backend
        self._variant, self._gate_known = family.variant, isinstance(self.spec.gate, str)
        self._has_norm = weights.norm is not None
        # Whether every backend's kernels support this convolution and these gates.
        self._plain = self.spec.activation == "silu" and projected.a is not None and weights.conv.shape[1] <= MAX_WIDTH
        self._kind = projected.q.device.type, projected.q.dtype, (*self.dims,)
        self._request = *self._kind, settings.backend, grad, self.spec.beta_scale
        self.few = self._route("recurrent")
        self._many: Route | None = None
        serves = self._plain and self._has_norm and self._gate_known and not grad
        self.step = self._companion(f"step_{self._variant}", self.few.delta_rule) if serves else None

    def route(self, tokens: int) -> Route:
        """The kernels for a call with this number of tokens."""
        if tokens <= self.few.delta_rule.max_tokens:
            return self.few
        if self._many is None:
            self._many = self._route("chunk")
        return self._many

    def _route(self, kind: str) -> Route:
        kernel = registry.resolve_cached(f"{kind}_{self._variant}", *self._request)
        prologue = self._companion_or_eager(f"prologue_{self._variant}", kernel, self._plain)
        norm = self._companion_or_eager("gated_norm", kernel, self._gate_known) if self._has_norm else None
        return Route(kernel, prologue, norm)

    def _companion(self, op: str, kernel: Kernel) -> Kernel | None:
        """The kernel for `op` of the same backend as `kernel`; None if it has none that serves, gradients included."""
        device_type, dtype, dims = self._kind
        if op == "gated_norm":
            dims = (dims[1], dims[1], dims[3], dims[3])  # a norm does not depend on the keys
        return registry.companion(op, device_type, dtype, dims, kernel.backend, self.needs_grad)

    def _companion_or_eager(self, op: str, kernel: Kernel, serves: bool) -> Kernel:
        found = (self._companion(op, kernel) if serves else None) or registry.get_or_none(op, "eager")
        assert found is not None
        return found


class Plans:
    """The plans of all layers of a patched family, cached by layer and by the properties they depend on."""

    def __init__(self, family: Family, settings: Settings) -> None:
        self.family, self.settings = family, settings
        self.layers = 0  # that have run, those freed since included
        self._known: WeakKeyDictionary[nn.Module, dict[Hashable, KernelPlan]] = WeakKeyDictionary()

    def of(self, layer: Any, projected: Projections) -> tuple[KernelPlan, Weights]:
        """Return a layer's plan for these projection outputs, and its weights.

        Weights are read on every call, because offloading and training replace them.
        """
        family, weights = self.family, self.family.weights(layer)
        grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*projected, *weights))
        if torch.compiler.is_compiling():
            return KernelPlan(family, self.settings, layer, projected, weights, grad), weights
        plans = self._known.get(layer)
        if plans is None:
            plans = self._known[layer] = {}
            self.layers += 1
        norm = getattr(layer, family.norm_name)
        key = (
            projected.q.device.type,
            projected.q.dtype,
            grad,
            projected.a is None,
            weights.conv.shape[1],
            norm,
            weights.norm is None,
            registry.generation,
        )
        plan = plans.get(key)
        if plan is None:
            plan = plans[key] = KernelPlan(family, self.settings, layer, projected, weights, grad)
        return plan, weights
