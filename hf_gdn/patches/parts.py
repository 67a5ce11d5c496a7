"""What families read off their layers' modules."""

from __future__ import annotations

from typing import Any


def must_call(module: Any) -> bool:
    """Whether a module has to be called, its parameters not read: somebody hooked it, as FSDP and users do."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def must_call_norm(norm: Any) -> bool:
    """The same of a gated norm, which may also be another one than transformers' (PEFT wraps it)."""
    return must_call(norm) or not hasattr(norm, "variance_epsilon")
