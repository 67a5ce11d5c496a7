"""Private attributes of ``torch.nn.Module``, and those that accelerate and ``generate`` attach to modules and caches.

All exist in torch 2.7 to 2.14, accelerate 1.x and the supported transformers. There is no public way to ask for them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as _module

# Where an instance may hold a forward that its class does not know: accelerate keeps the one that it has wrapped.
HELD_FORWARDS = ("forward", "_old_forward")


def internal_attributes() -> set[str]:
    """Attributes that every module has and that hold no state of its own: hooks, caches, flags of the class."""
    return set(vars(nn.Module())) - {"training", "_parameters", "_buffers"}


def own_tensors(module: Any) -> list[Tensor]:
    """Parameters and buffers of a module itself, without its children's."""
    return [x for x in (*module._parameters.values(), *module._buffers.values()) if x is not None]


def forward_hooks(module: Any) -> list[Any]:
    """Hooks that run when a module is called."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def has_forward_hooks(module: Any) -> bool:
    """Whether calling a module runs hooks that calling its forward, or reading its parameters, would not."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def has_hooks_of_all_modules() -> bool:
    """Whether some hook runs when any module is called."""
    return bool(_module._global_forward_hooks or _module._global_forward_pre_hooks)


def accelerate_hook(module: Any) -> Any:
    """The hook by which accelerate moves a module's weights or inputs, None without."""
    return vars(module).get("_hf_hook")


def unwrapped_forward(module: Any) -> Any:
    """The forward that an instance holds itself, as it was before accelerate wrapped it; None without."""
    return module.__dict__.get("_old_forward", module.__dict__.get("forward"))


def is_users_cache(cache: Any) -> bool:
    """Whether ``generate`` was given a cache, rather than made it."""
    return bool(getattr(cache, "_is_user_defined", False))


def forget_compiled_call(model: Any) -> None:
    """Drop the compiled decode step that ``generate`` keeps on a model."""
    model.__dict__.pop("_compiled_call", None)
