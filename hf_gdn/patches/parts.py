"""What families' layers share: decays and gated norms, each in transformers' own order of roundings."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN


def softplus_decay(A_log: Tensor, raw: Tensor) -> Tensor:
    """Natural-log decay -exp(A_log) softplus(raw), in fp32."""
    return -A_log.float().exp() * F.softplus(raw)


def bounded_decay(A_log: Tensor, raw: Tensor, lower_bound: float) -> Tensor:
    """Natural-log decay lower_bound sigmoid(exp(A_log) raw), between lower_bound and 0, in fp32."""
    return lower_bound * (A_log.float().exp() * raw).sigmoid()


def gated_norm(norm: Any, o: Tensor, z: Tensor) -> Tensor:
    """RMS norm of o ``[..., V]`` gated by z: the weight is applied in o's dtype, the gate in fp32."""
    o = norm.weight * F.rms_norm(o.float(), o.shape[-1:], eps=norm.variance_epsilon).to(o.dtype)
    return (o * _activation(norm)(z.float())).to(z.dtype)


def gated_norm_fp32(norm: Any, o: Tensor, z: Tensor) -> Tensor:
    """RMS norm of o ``[..., V]`` gated by z, all of it in fp32."""
    o = F.rms_norm(o.float(), o.shape[-1:], norm.weight.float(), norm.variance_epsilon)
    return (o * _activation(norm)(z.float())).to(z.dtype)


def _activation(norm: Any) -> Any:
    return F.silu if norm.activation == "silu" else ACT2FN[norm.activation]
