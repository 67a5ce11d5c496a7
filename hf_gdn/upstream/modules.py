"""Private attributes of ``torch.nn.Module`` and of what accelerate attaches to modules.

All of them exist in torch 2.7 to 2.14 and in accelerate 1.x. There is no public way to ask for them.
"""

from __future__ import annotations

from typing import Any


def has_forward_hooks(module: Any) -> bool:
    """Whether calling a module runs hooks that calling its forward, or reading its parameters, would not."""
    return bool(module._forward_pre_hooks or module._forward_hooks)
