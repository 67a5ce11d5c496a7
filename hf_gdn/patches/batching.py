"""Continuous batching: which models and settings it serves, and the managers that run.

transformers' `ContinuousBatchingManager` keeps the states of linear-attention layers in its paged cache
(`hf_gdn.upstream.paged`), and patched layers read and write them there (`paged`). What cannot be served is refused when
a manager is made and when it starts, before anything runs; while it runs, patches of its model stay as they are.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakSet

from .. import registry, verification
from ..errors import BatchingError, PatchError
from ..upstream import modules, paged
from .families import all_families
from .families.base import Family
from .paged_attention import make_sdpa
from .swap import Swap, class_attribute, foreign_forward

FEATURE = "continuous batching"
_managers: WeakSet[Any] = WeakSet()


def family_of(config: Any) -> Family | None:
    """The family of a text model's config; None if it is of none."""
    return all_families().get(config.model_type.removesuffix("_text"))


def states_of(config: Any) -> paged.LayerStates:
    """Shapes of what a linear-attention layer keeps of a request.

    Raises:
        BatchingError: no family, or a family whose models cannot be batched.
    """
    family = family_of(config)
    if family is None:
        raise BatchingError(
            f"expected a model of one of the families {', '.join(all_families())}, got {config.model_type!r}: hf_gdn "
            "does not know the states of its linear-attention layers"
        )
    dims = family.dims_of_config(config)
    channels = 2 * dims.num_k_heads * dims.head_k_dim + dims.num_v_heads * dims.head_v_dim
    return paged.LayerStates(
        dims.num_v_heads, dims.head_k_dim, dims.head_v_dim, channels, config.linear_conv_kernel_dim
    )


def _check_model(model: Any, patches: Any) -> None:
    """Raise BatchingError unless every linear-attention layer of a model is served."""
    families = {family.class_name: family for family in all_families().values()}
    for name, module in model.named_modules():
        family = families.get(type(module).__name__)
        if family is None:
            continue
        reason = dict(family.cannot).get(FEATURE)
        if reason is not None:
            raise BatchingError(f"{family.name} has no {FEATURE}: {reason}")
        missing = paged.missing()
        if missing is not None:
            raise BatchingError(missing)
        change = patches.get(family.name)
        if change is None or class_attribute(change.layer.cls, "forward") is not change.layer.replacement:
            raise BatchingError(
                f"{family.name} is not patched, and only patched layers serve {FEATURE}: call hf_gdn.patch() or "
                f"hf_gdn.patch({family.name!r}), see hf_gdn.status()"
            )
        theirs = foreign_forward(module, change.layer)
        if theirs is not None:
            raise BatchingError(f"{name} runs {theirs} instead of hf_gdn's forward, which alone serves {FEATURE}")


def _check_kernels(model: Any, patches: Any) -> None:
    """Raise BatchingError if a compiled kernel of a model's layers is wrong with states in slots of a pool."""
    seen = set()
    for module in model.modules():
        change = next((change for change in patches.values() if isinstance(module, change.layer.cls)), None)
        if change is None:
            continue
        weight, family = module.conv1d.weight, change.family
        device = modules.runs_on(module) or weight.device
        kind = device.type, weight.dtype, (*family.dims(module),)
        if (family.name, device, kind) in seen:
            continue
        seen.add((family.name, device, kind))
        for op in ("chunk", "recurrent"):
            beta_max = family.spec(module).beta_scale
            rule = registry.resolve_cached(f"{op}_{family.variant}", *kind, change.settings.backend, False, beta_max)
            others = [registry.companion(f"{x}_{family.variant}", *kind, rule.backend) for x in ("prologue", "step")]
            for kernel in (rule, *others):
                if kernel is None:
                    continue
                request = registry.Request(kernel.op, kind[0], kind[1], *kind[2])
                why = verification.why_not_in_slots(kernel, request, device)
                if why is not None:
                    raise BatchingError(
                        f"{kernel.op} of backend {kernel.backend!r} {why}. Other backends: hf_gdn.patch(backend=...)"
                    )


def _checked_settings(model: Any, settings: Any) -> Any:
    """The settings for a hybrid model. Raises BatchingError for those that it does not support."""
    graphs = settings.use_cuda_graph
    if any(graphs) if isinstance(graphs, tuple) else graphs:
        raise BatchingError(
            "expected use_cuda_graph=None or False, got True: CUDA graphs were never captured with the states of "
            "hybrid models in a paged cache"
        )
    if settings.use_async_batching:
        raise BatchingError(
            "expected use_async_batching=None or False, got True: a request that is offloaded while a batch runs goes "
            "one token back, which recurrent states cannot"
        )
    if paged.tensor_parallel_size(model) > 1:
        raise BatchingError(f"{FEATURE} of hybrid models runs in one process; the model is tensor-parallel")
    settings = copy.copy(settings)
    settings.use_cuda_graph = settings.use_async_batching = False
    return settings


def _check(model: Any) -> None:
    """Raise BatchingError unless the patches in force serve a model."""
    from . import in_force

    _check_model(model, in_force.current().patches)
    _check_kernels(model, in_force.current().patches)


def make_init(original: Callable[..., None]) -> Callable[..., None]:
    """Make the manager's ``__init__``: models with linear-attention layers are checked, and the manager remembered."""

    @functools.wraps(original)
    def init(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        known = {family.class_name for family in all_families().values()}
        if any(type(module).__name__ in known for module in model.modules()):
            _check(model)
            given = dict(zip(("generation_config", "continuous_batching_config", "workload_hints"), args)) | kwargs
            name = "continuous_batching_config"
            given[name] = _checked_settings(model, given[name])
            original(self, model, **given)
            _managers.add(self)
        else:
            original(self, model, *args, **kwargs)

    return init


def make_start(original: Callable[..., None]) -> Callable[..., None]:
    """Make the manager's ``start``: its model is checked again, since patches may have changed since it was made."""

    @functools.wraps(original)
    def start(self: Any) -> None:
        if self in _managers and not self.is_running():
            _check(self.model)
            paged.forget_prefixes(self)
        original(self)

    return start


def swaps() -> list[Swap]:
    """The swaps in transformers that continuous batching needs, whatever the families."""
    found = []
    for place, name, make in paged.places(states_of, make_init, make_start, make_sdpa):
        here = class_attribute(place, name)
        found.append(Swap(place, name, here, make(here)))
    return found


def leave(families: Iterable[str]) -> None:
    """Before patches of families change: raise PatchError if a manager runs a model of one of them.

    Managers that are kept for later are forgotten: their next call makes another one, or is refused.
    """
    names = {all_families()[name].class_name: name for name in families}
    idle = []
    for manager in list(_managers):
        found = {names[type(m).__name__] for m in manager.model.modules() if type(m).__name__ in names}
        if found and manager.is_running():
            raise PatchError(
                f"{', '.join(sorted(found))}: a manager of {FEATURE} runs a model of it; call its stop() before "
                "unpatching it or patching it otherwise. Nothing was changed"
            )
        if found:
            idle.append(manager)
    for manager in idle:
        paged.forget(manager)
