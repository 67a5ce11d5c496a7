"""The state of a model that a graph depends on (weights, forwards, flags, configs), and what prevents capturing it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..upstream import modules
from ..upstream.tensors import is_wrapper
from . import cache_state

_IGNORED = modules.internal_attributes()


def model_state(model: nn.Module) -> tuple[tuple[Any, ...], str | None]:
    """A comparable value of everything in a model that a graph depends on, and why it cannot be captured (or None)."""
    configs: set[int] = set()

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            return id(value) if is_wrapper(value) else value.data_ptr()
        if isinstance(value, dict):
            return tuple(
                (name if isinstance(name, cache_state.PLAIN) else None, describe(part)) for name, part in value.items()
            )
        if isinstance(value, (list, tuple, set)):
            return tuple(map(describe, value))
        if isinstance(value, PreTrainedConfig) and id(value) not in configs:
            configs.add(id(value))
            return describe(vars(value))
        return value if isinstance(value, cache_state.PLAIN) else type(value)

    found: list[Any] = []
    reason, devices = None, set()
    for name, module in model.named_modules():
        hooks = modules.forward_hooks(module)
        if modules.accelerate_hook(module) is not None:
            reason = f"{name or 'the model'} has an accelerate hook, which moves weights or inputs"
        elif any(not (getattr(hook, "__module__", None) or "").startswith("transformers.") for hook in hooks):
            reason = f"{name or 'the model'} has a forward hook, which a replay would not run"
        found.append(type(module).forward)
        found += [describe(value) for name, value in vars(module).items() if name not in _IGNORED]
        devices |= {x.device for x in modules.own_tensors(module)}
    if any(hasattr(parameter, "placements") for parameter in model.parameters()):
        reason = "its weights are sharded over processes"
    elif len(devices) > 1:
        reason = f"its weights are on several devices: {', '.join(sorted(map(str, devices)))}"
    elif modules.has_hooks_of_all_modules():
        reason = "global forward hooks are registered"
    elif model.training:
        reason = "it is in training mode"
    return tuple(found), reason
