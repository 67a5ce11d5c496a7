"""Everything before the delta rule, in plain PyTorch: convolution, norms, gates, and the next convolution state.

    q, k, v <- silu(conv(q | k | v)) ;  q, k <- l2norm ;  g, beta <- gates(a, b)

The oracle is `hf_gdn.kernels.reference.prologue`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...registry import Kernel, register
from ..contract import DeltaRuleInputs, LayerSpec, Projections, Weights, state_dtype
from .math import activation, causal_conv, l2norm, log_decay, writing_strength
from .runtime import why_not, without_autocast


@without_autocast
def prologue(
    projected: Projections,
    weights: Weights,
    spec: LayerSpec,
    *,
    conv_state: Tensor | None = None,
    keep: int = 0,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
) -> DeltaRuleInputs:
    """Everything before the delta rule.

    Args:
        projected: outputs for tokens ``[B, T]``.
        weights: parameters of the convolution and the gates.
        spec: options of the gates and the activation.
        conv_state: left context, the last inputs of the convolution: ``[B, C, keep]`` in the model's dtype; zeros when
            None. It is not modified. Packed sequences do not read it.
        keep: columns of the returned convolution state, which ends at each row's last token; 0 for none.
        cu_seqlens: ``[N + 1]`` boundaries of sequences packed along T, B = 1; the convolution stays inside each.
        lengths: ``[B]``, number of tokens in each row. Padding follows them; it gets zero log-decay and beta.
    """
    qkv = projected.joined()
    batch, length, k_heads, k_dim = projected.q.shape
    group, v_dim = projected.v.shape[3:]
    x, recent, sequence = qkv.transpose(1, 2), None, None
    if keep:
        x = F.pad(x, (keep, 0)) if conv_state is None else torch.cat((conv_state, x), -1)
    g, beta = log_decay(spec, weights, projected), writing_strength(spec, projected).to(state_dtype(qkv.dtype))
    if lengths is not None:
        padding = torch.arange(length, device=qkv.device) >= lengths[:, None]
        g = g.masked_fill(padding.view(batch, length, *[1] * (g.dim() - 2)), 0.0)
        beta = beta.masked_fill(padding[..., None], 0.0)
    if keep and lengths is not None:
        columns = lengths[:, None] + torch.arange(keep, device=qkv.device)
        recent = x.gather(2, columns[:, None].expand(-1, x.shape[1], -1))
    elif keep:
        recent = x[..., -keep:].contiguous()
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(length, device=qkv.device), right=True)
    out = causal_conv(x.transpose(1, 2), weights.conv, weights.conv_bias, length, sequence)
    sizes = (k_heads * k_dim, k_heads * k_dim, k_heads * group * v_dim)
    out = activation(spec.activation)(out)
    out = out if out.stride(-1) == 1 else out.contiguous()  # as the contract has it; not every activation keeps it so
    q, k, v = out.split_with_sizes(sizes, -1)
    q, k = (l2norm(x.unflatten(2, (k_heads, k_dim))).to(qkv.dtype) for x in (q, k))
    return DeltaRuleInputs(q, k, v.to(qkv.dtype).unflatten(2, (k_heads * group, v_dim)), g, beta, recent)


for _op in ("prologue_gdn", "prologue_kda"):
    register(Kernel(_op, "eager", prologue, why_not, differentiable=True, traceable=True))
