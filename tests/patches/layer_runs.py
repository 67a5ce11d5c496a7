"""What a run of a layer computes, and what it leaves in the cache."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


def states(cache):
    return cache.layers[0].conv_states[0], cache.layers[0].recurrent_states[0]


def launched(monkeypatch) -> list[str]:
    """A list that takes down the names of the kernels that run in Triton's interpreter from now on."""
    from triton.runtime.interpreter import GridExecutor

    launches, execute = [], GridExecutor.__call__

    def counted(self, *args, **kwargs):
        launches.append(self.fn.__name__)
        with _disable_current_modes():  # what the interpreter does is none of ours
            return execute(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    return launches


class ComputedOperators(TorchDispatchMode):
    """Names of the operators that compute or copy something: not views, and not memory that is handed out."""

    FREE = ("view", "unsqueeze", "squeeze", "split", "unbind", "slice", "select", "expand", "t", "transpose", "detach")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.strip("_")
        if not name.startswith(self.FREE) and name not in ("empty", "unsafe_view"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


# Input projections, f_a, f_b, g_a and g_b of KDA among them, and the output projection.
PRODUCTS = {
    "qwen3_next": 3, "qwen3_5": 5, "qwen3_5_moe": 5, "qwen4_exp": 5, "lara_mini": 5, "olmo_hybrid": 7, "kimi_linear": 9,
    "glm5_next": 9, "bailing_hybrid": 7,
}  # fmt: skip


class FromTheLeft(torch.nn.Module):
    """A linear layer that computes (W x^T)^T, as some quantized ones do: its output's last dimension is strided."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x):
        return (self.weight @ x.flatten(0, -2).t()).t().unflatten(0, x.shape[:-1])


def multiply_from_the_left(layer: torch.nn.Module) -> None:
    """Make all projections of a mixer `FromTheLeft`."""
    for module in list(layer.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, FromTheLeft(child))


def stride_parameters(layer: torch.nn.Module) -> None:
    """Make all parameters of a mixer strided: every other number of a tensor twice as large."""
    for parameter in layer.parameters():
        parameter.data = parameter.data[..., None].repeat_interleave(2, -1)[..., 0]
