"""Private attributes of ``torch.nn.Module``, and those that accelerate and ``generate`` attach to modules and caches.

All exist in torch 2.7 to 2.14, accelerate 1.x and the supported transformers. There is no public API for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

# Instance attributes that may hold a bound forward; accelerate stores the one it has wrapped in the second.
HELD_FORWARDS = ("forward", "_old_forward")


def internal_attributes() -> set[str]:
    """Attributes that torch sets on every module (hooks, flags), without those that hold the module's state."""
    return set(vars(nn.Module())) - {"training", "_parameters", "_buffers"}


def own_tensors(module: Any) -> list[Tensor]:
    """Parameters and buffers of a module, without those of its children."""
    return [x for x in (*module._parameters.values(), *module._buffers.values()) if x is not None]


def forward_hooks(module: Any) -> list[Any]:
    """Hooks that run when a module is called."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def has_hooks(module: Any) -> bool:
    """Whether calling a module, or its backward, runs hooks that reading its parameters would skip."""
    own = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    return bool(own or has_hooks_of_all_modules())


def has_hooks_of_all_modules() -> bool:
    """Whether global hooks run when any module is called, or in its backward."""
    forward = _module._global_forward_hooks or _module._global_forward_pre_hooks
    return bool(forward or _module._global_backward_hooks or _module._global_backward_pre_hooks)


def accelerate_hook(module: Any) -> Any:
    """The hook with which accelerate moves a module's weights or inputs; None if there is none."""
    return vars(module).get("_hf_hook")


def runs_on(module: nn.Module) -> torch.device | None:
    """The device on which a module computes, which with offloaded weights is not theirs; None if it is not known."""
    for part in module.modules():
        offloaded = getattr(accelerate_hook(part), "execution_device", None)
        if offloaded is not None:
            return torch.device(offloaded)
    return next((parameter.device for parameter in module.parameters() if parameter.device.type != "meta"), None)


def unwrapped_forward(module: Any) -> Any:
    """The forward bound to an instance, without accelerate's wrapper; None if the instance has none."""
    return module.__dict__.get("_old_forward", module.__dict__.get("forward"))


def is_users_cache(cache: Any) -> bool:
    """Whether the user passed this cache to ``generate``; False if ``generate`` made it."""
    return bool(getattr(cache, "_is_user_defined", False))


def checkpointing_enable(model: Any, options: dict[str, Any] | None = None) -> None:
    """Turn on gradient checkpointing, by the name that the installed transformers gives it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def forget_compiled_call(model: Any) -> None:
    """Drop the compiled decode step that ``generate`` keeps on a model."""
    model.__dict__.pop("_compiled_call", None)
