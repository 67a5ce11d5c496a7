"""What families' layers share: decays and gated norms, each in transformers' own order of roundings."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN


def softplus_decay(A_log: Tensor, raw: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """Natural-log decay -exp(A_log) softplus(raw), in fp32, with raw seen as `shape`."""
    positive = F.softplus(raw)  # before the view: aot_autograd takes the strides of its gradient for others
    return -A_log.float().exp() * (positive if shape is None else positive.view(shape))


def bounded_decay(A_log: Tensor, raw: Tensor, lower_bound: float) -> Tensor:
    """Natural-log decay lower_bound sigmoid(exp(A_log) raw), between lower_bound and 0, in fp32."""
    return lower_bound * (A_log.float().exp() * raw).sigmoid()


def own_call(module: Any) -> bool:
    """Whether a module has to be called, not its parameters read: somebody hooked it (FSDP, users) or wrapped it."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def _wrapped_norm(norm: Any, o: Tensor, z: Tensor) -> Tensor | None:
    """The module's own result where it has to be called, or is another one than transformers' (PEFT's), else None."""
    if own_call(norm) or not hasattr(norm, "variance_epsilon"):
        return norm(o.flatten(0, -2), z.flatten(0, -2)).view(z.shape)
    return None


def gated_norm(norm: Any, o: Tensor, z: Tensor) -> Tensor:
    """RMS norm of o ``[..., V]`` gated by z: the weight is applied in o's dtype, the gate in fp32."""
    wrapped = _wrapped_norm(norm, o, z)
    if wrapped is not None:
        return wrapped
    o = norm.weight * F.rms_norm(o.float(), o.shape[-1:], eps=norm.variance_epsilon).to(o.dtype)
    return (o * _activation(norm)(z.float())).to(z.dtype)


def gated_norm_fp32(norm: Any, o: Tensor, z: Tensor) -> Tensor:
    """RMS norm of o ``[..., V]`` gated by z, all of it in fp32."""
    wrapped = _wrapped_norm(norm, o, z)
    if wrapped is not None:
        return wrapped
    o = F.rms_norm(o.float(), o.shape[-1:], norm.weight.float(), norm.variance_epsilon)
    return (o * _activation(norm)(z.float())).to(z.dtype)


def _activation(norm: Any) -> Any:
    return F.silu if norm.activation == "silu" else ACT2FN[norm.activation]
