"""Decoding in plain PyTorch: everything between a layer's projections, for the next few tokens of a cache.

    q, k, v <- silu(conv(conv_state | q | k | v)) ;  q, k <- l2norm ;  g, beta <- gates(a, b)
    o <- delta rule ;  y <- norm(o) gate(z)

Both states are updated in place. The oracle is `hf_gdn.kernels.reference.step`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...registry import Kernel, register
from ..contract import LayerSpec, Projections, Weights
from .gated_norm import gated_norm
from .math import causal_conv, log_decay, writing_strength
from .recurrent import recurrent
from .runtime import why_not


def step(projected: Projections, weights: Weights, spec: LayerSpec, conv_state: Tensor, state: Tensor) -> Tensor:
    """Everything between a layer's projections for the next few tokens of a cache. No gradients.

    Args:
        projected: outputs for tokens ``[B, T]``; a must be given.
        weights: norm must be given.
        spec: activation must be silu, gate a key of `ACTIVATIONS`.
        conv_state: the last inputs of the convolution, ``[B, C, width]``, in the model's dtype; updated in place.
        state: ``[B, HV, K, V]``, contiguous, in fp32 (float64 for float64); updated in place.

    Returns:
        ``[B, T, HV, V]`` in the model's dtype, normed and gated.
    """
    batch, length, k_heads, k_dim = projected.q.shape
    v_heads, v_dim = k_heads * projected.v.shape[3], projected.v.shape[4]
    qkv = projected.joined()
    size, width = conv_state.shape[2], weights.conv.shape[1]
    x = torch.cat((conv_state, qkv.transpose(1, 2)), -1)
    if length == 1:
        dtype = torch.promote_types(x.dtype, torch.float32)
        out = torch.linalg.vecdot(x.narrow(2, size + 1 - width, width).to(dtype), weights.conv.to(dtype)).unsqueeze(1)
        out = out if weights.conv_bias is None else out + weights.conv_bias.to(dtype)
    else:
        out = causal_conv(x.transpose(1, 2), weights.conv, weights.conv_bias, length, None)
    q, k, v = F.silu(out).to(qkv.dtype).split_with_sizes((k_heads * k_dim, k_heads * k_dim, v_heads * v_dim), -1)
    o, _ = recurrent(
        q.view(batch, length, k_heads, k_dim),
        k.view(batch, length, k_heads, k_dim),
        v.view(batch, length, v_heads, v_dim),
        log_decay(spec, weights, projected),
        writing_strength(spec, projected),
        scale=k_dim**-0.5,
        initial_state=state,
        qk_l2norm=True,
        inplace=True,
    )
    conv_state.copy_(x.narrow(2, x.shape[2] - size, size))  # right after the state, so that nothing in between can fail
    assert weights.norm is not None
    return gated_norm(o, projected.z, weights.norm, spec)


for _op in ("step_gdn", "step_kda"):
    register(Kernel(_op, "eager", step, why_not, traceable=True))
