"""Everything before the delta rule, in plain PyTorch: convolution, norms, gates, and the next convolution state.

    q, k, v <- silu(conv(q | k | v)) ;  q, k <- l2norm ;  g, beta <- gates(a, b)

The oracle is `hf_gdn.kernels.reference.prologue`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...registry import Kernel, register
from ..contract import DeltaRuleInputs, LayerSpec, Projections, Slots, Weights, state_dtype
from ..slots import read, write
from .math import activation, causal_conv, l2norm, log_decay, packed_sequence, writing_strength, zero_padding
from .runtime import why_not, without_autocast


def _conv(
    qkv: Tensor,
    weights: Weights,
    conv_state: Tensor | None,
    keep: int,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The convolution of ``[B, T, C]``, and the new convolution state; arguments as of `prologue`."""
    x, recent, sequence, length = qkv.transpose(1, 2), None, None, qkv.shape[1]
    if keep:
        x = F.pad(x, (keep, 0)) if conv_state is None else torch.cat((conv_state, x), -1)
    if keep and lengths is not None:
        columns = lengths[:, None] + torch.arange(keep, device=qkv.device)
        recent = x.gather(2, columns[:, None].expand(-1, x.shape[1], -1))
    elif keep:
        recent = x[..., -keep:].contiguous()
    if cu_seqlens is not None:
        sequence = packed_sequence(cu_seqlens, length)
    return causal_conv(x.transpose(1, 2), weights.conv, weights.conv_bias, length, sequence), recent


def _conv_in_slots(qkv: Tensor, weights: Weights, pool: Tensor, cu_seqlens: Tensor, slots: Slots) -> Tensor:
    """The convolution of packed sequences ``[1, T, C]`` whose states are in slots of a pool, which it updates.

    Every sequence is convolved with its own state before it, in one row: a state is at least as wide as the filter, so
    no tap reaches into the sequence before.
    """
    before, keep, length = read(pool, slots), pool.shape[2], qkv.shape[1]
    sequences = len(before)
    number = torch.arange(sequences, device=qkv.device)
    tokens = (
        torch.arange(length, device=qkv.device) + (packed_sequence(cu_seqlens, length) + 1).clamp(max=sequences) * keep
    )
    states = (cu_seqlens[:-1] + number * keep)[:, None] + torch.arange(keep, device=qkv.device)
    row = qkv.new_empty(length + sequences * keep, qkv.shape[2])
    row[tokens] = qkv[0]
    row[states] = before.transpose(1, 2)
    out = causal_conv(row[None], weights.conv, weights.conv_bias, len(row), None)[:, tokens]
    ends = (cu_seqlens[1:] + number * keep)[:, None] + torch.arange(keep, device=qkv.device)
    write(pool, slots, row[ends].transpose(1, 2), cu_seqlens)
    return out


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
    slots: Slots | None = None,
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
        slots: conv_state is a pool ``[P, C, keep]``, and packed sequences read and write their slots in place.
    """
    qkv = projected.joined()
    k_heads, k_dim = projected.q.shape[2:]
    group, v_dim = projected.v.shape[3:]
    if slots is None:
        out, recent = _conv(qkv, weights, conv_state, keep, cu_seqlens, lengths)
    else:
        assert conv_state is not None and cu_seqlens is not None and lengths is None
        out, recent = _conv_in_slots(qkv, weights, conv_state, cu_seqlens, slots), conv_state
    g, beta = log_decay(spec, weights, projected), writing_strength(spec, projected).to(state_dtype(qkv.dtype))
    if lengths is not None:
        g, beta = zero_padding(g, beta, lengths)
    sizes = (k_heads * k_dim, k_heads * k_dim, k_heads * group * v_dim)
    out = activation(spec.activation)(out)
    out = out if out.stride(-1) == 1 else out.contiguous()  # as the contract has it; not every activation keeps it so
    q, k, v = out.split_with_sizes(sizes, -1)
    q, k = (l2norm(x.unflatten(2, (k_heads, k_dim))).to(qkv.dtype) for x in (q, k))
    return DeltaRuleInputs(q, k, v.to(qkv.dtype).unflatten(2, (k_heads * group, v_dim)), g, beta, recent)


for _op in ("prologue_gdn", "prologue_kda"):
    register(Kernel(_op, "eager", prologue, why_not, differentiable=True, traceable=True, slots=True))
