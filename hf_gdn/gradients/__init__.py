"""The ops in training: an operator for the forward, and one for the op that computes its gradients.

autograd, `torch.compile(fullgraph=True)`, checkpointing and `torch.func.grad` see one operator each way. There are no
second derivatives.
"""

from __future__ import annotations

from .delta_rule import TRAINING_OPERATORS, call_with_backward, has_backward, with_backward
from .gated_norm import norm_with_backward
from .prologue import prologue_with_backward

__all__ = [
    "TRAINING_OPERATORS",
    "call_with_backward",
    "has_backward",
    "norm_with_backward",
    "prologue_with_backward",
    "with_backward",
]
