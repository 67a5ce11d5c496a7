"""The functional API: the gated delta rule with flash-linear-attention's names, arguments and results.

Code written for ``fla.ops`` runs unchanged on these four functions, but for a few arguments (docs/fla.md). They work
under `torch.compile(fullgraph=True)`.
The registry chooses the kernel (`hf_gdn.registry`); calls that need gradients get a differentiable one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import registry
from .dispatch import check, check_bounds, check_copy, dims_of, refuse_forward_mode, run_or_fall_back, shape_of
from .gradients import call_with_backward, has_backward
from .kernels.contract import state_dtype
from .operators import OPERATORS

__all__ = ["chunk_gated_delta_rule", "chunk_kda", "fused_recurrent_gated_delta_rule", "fused_recurrent_kda"]

# Arguments of fla 0.6 that choose how fla computes, and change no result: any value is accepted, and has no effect.
HINTS = ("chunk_size", "cu_seqlens_cpu", "chunk_indices", "disable_recompute", "safe_gate")
# Dtypes of which q, k and v may have different ones in the recurrent functions.
_MIXED = {torch.float16, torch.bfloat16, torch.float32}
# Names of one argument, whose states are then [N, HV, V, K].
_VALUES_FIRST = ("state_v_first", "transpose_state_layout")
# Arguments that are accepted with their default value only -> that value, and the reason.
REFUSED: dict[str, tuple[Any, str]] = {
    "gk": (None, "a decay per key channel is KDA: fused_recurrent_kda"),
    "gv": (None, "no model decays values"),
    "return_intermediate_states": (False, "states are not kept at chunk boundaries"),
    "use_graph": (False, "calls can be captured in a CUDA graph without it"),
    "max_num_seqs": (None, "it belongs to use_graph"),
    "cp_context": (None, "a sequence is not split over processes"),
    "head_first": (False, "fla has removed that layout; tensors are [B, T, H, D]"),
}


def _options(name: str, others: dict[str, Any], gated: bool, lower_bound: float | None) -> bool:
    """Check the arguments that only fla has. Returns whether states are ``[N, HV, V, K]``."""
    for argument, value in others.items():
        if argument in HINTS or argument in _VALUES_FIRST:
            continue
        if argument not in REFUSED:
            raise TypeError(f"{name}() got an unexpected keyword argument {argument!r}")
        default, reason = REFUSED[argument]
        if value is not default:
            raise TypeError(f"{name}() does not support {argument}={value!r}; only {default!r} is supported: {reason}")
    if others.get("safe_gate") and gated and lower_bound is None:
        raise ValueError(
            f"{name}(): safe_gate=True with use_gate_in_kernel=True needs lower_bound, as in fla; got None"
        )
    return any(others.get(argument) for argument in _VALUES_FIRST)


class _Activations(NamedTuple):
    """Activations that fla's functions can apply to the raw gate and beta."""

    use_gate_in_kernel: bool
    A_log: Tensor | None
    dt_bias: Tensor | None
    lower_bound: float | None
    use_beta_sigmoid_in_kernel: bool
    allow_neg_eigval: bool

    def gate(self, name: str, g: Tensor) -> Tensor:
        """-exp(A_log) softplus(g + dt_bias), or lower_bound sigmoid(exp(A_log) (g + dt_bias)) with a lower bound."""
        if not self.use_gate_in_kernel:
            if (self.A_log, self.dt_bias, self.lower_bound) != (None, None, None):
                raise TypeError(f"{name}(): A_log, dt_bias and lower_bound need use_gate_in_kernel=True, got False")
            return g
        for argument, x, shape in (("A_log", self.A_log, g.shape[2:3]), ("dt_bias", self.dt_bias, g.shape[2:])):
            if x is not None and (x.numel() != shape.numel() or x.device != g.device):
                raise ValueError(
                    f"{name}(): {argument} must have {shape.numel()} elements on {g.device}, "
                    f"got {shape_of(x)} on {x.device}"
                )
        x = g.float()
        heads = (g.shape[2], 1) if g.dim() == 4 else (g.shape[2],)
        if self.dt_bias is not None:
            x = x + self.dt_bias.float().view(g.shape[2:])
        if self.lower_bound is not None:
            return self.lower_bound * torch.sigmoid(
                x if self.A_log is None else self.A_log.float().exp().view(heads) * x
            )
        if self.A_log is None:
            raise ValueError(f"{name}(): use_gate_in_kernel=True needs A_log of shape [HV], got None")
        return -self.A_log.float().exp().view(heads) * F.softplus(x)

    def beta(self, beta: Tensor) -> Tensor:
        if not self.use_beta_sigmoid_in_kernel:
            return beta
        return torch.sigmoid(beta) * 2 if self.allow_neg_eigval else torch.sigmoid(beta)


def _call(
    name: str,
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    qk_l2norm: bool,
    cu_seqlens: Tensor | None,
    activations: _Activations,
    backend: str,
    others: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    values_first = _options(name, others, activations.use_gate_in_kernel, activations.lower_bound)
    if values_first and initial_state is not None:
        initial_state = initial_state.transpose(-1, -2)
    per_channel, dtype_of_o = op.endswith("kda"), v.dtype
    dtypes = {q.dtype, k.dtype, v.dtype}
    if len(dtypes) > 1 and dtypes <= _MIXED and op.startswith("recurrent"):  # as in fla
        q, k, v = q.float(), k.float(), v.float()
    if g is None:
        g = v.new_zeros((*v.shape[:3], q.shape[-1]) if per_channel else v.shape[:3])
    if beta is None:
        beta = v.new_ones(v.shape[:3])
    check(q, k, v, g, beta, initial_state, cu_seqlens, per_channel=per_channel)
    copy = others.get("cu_seqlens_cpu")
    if cu_seqlens is not None and copy is not None and not torch.compiler.is_compiling():
        cu_seqlens = check_copy(cu_seqlens, copy, q.shape[1])
    refuse_forward_mode()
    dtype = state_dtype(v.dtype)
    g = activations.gate(name, g).to(dtype)
    beta = activations.beta(beta)
    q, k, v, g, beta = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, g, beta))
    if initial_state is not None:
        initial_state = initial_state.to(dtype).contiguous()
    beta_max = 2.0 if activations.allow_neg_eigval else 1.0
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    tensors = (q, k, v, g, beta, initial_state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        if cu_seqlens is not None:
            check_bounds(cu_seqlens, q.shape[1])
        kernel = registry.resolve_cached(op, q.device.type, q.dtype, dims_of(q, v), backend, True, beta_max)
        if has_backward(kernel):
            o, state = call_with_backward(
                kernel, q, k, v, g, beta, initial_state, cu_seqlens, scale, qk_l2norm, beta_max, backend
            )
        else:
            options = dict(scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, qk_l2norm=qk_l2norm)
            o, state = run_or_fall_back(
                kernel,
                backend,
                q,
                v.shape[2:],
                lambda kernel: kernel.fn(q, k, v, g, beta, **options),
                beta_max=beta_max,
                needs_grad=True,
            )
    else:
        tensors = q, k, v, g, beta, initial_state
        o, state = OPERATORS[op](*tensors, cu_seqlens, scale, qk_l2norm, beta_max, backend, backend)
    o = o.to(dtype_of_o)
    if not output_final_state:
        return o, None
    return o, state.transpose(-1, -2).contiguous() if values_first else state


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    backend: str = "auto",
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule (GDN, one decay per head) over whole sequences, chunk by chunk.

    Args:
        q: ``[B, T, HK, K]``, float16, bfloat16 or float32 (float64 on the eager backend).
        k: the same shape and dtype.
        v: ``[B, T, HV, V]``, same dtype, HV a multiple of HK.
        g: ``[B, T, HV]``, natural logarithm of the decay, at most 0.
        beta: ``[B, T, HV]``, the write strength.
        scale: factor on the output; ``K ** -0.5`` when None.
        initial_state: ``[N, HV, K, V]``, where N is B or the number of packed sequences; zeros when None.
        output_final_state: return the state after the last token.
        use_qk_l2norm_in_kernel: L2-normalise q and k over K first.
        use_beta_sigmoid_in_kernel: apply the sigmoid to beta; with `allow_neg_eigval`, also double it.
        cu_seqlens: ``[N + 1]`` int32 or int64, boundaries of sequences packed along T; B must be 1.
        use_gate_in_kernel: apply the gate to g: ``-exp(A_log) * softplus(g + dt_bias)``.
        A_log: ``[HV]``, a parameter of the gate.
        dt_bias: ``[HV]``, likewise.
        backend: a backend's name, or ``"auto"``.

    Returns:
        o ``[B, T, HV, V]`` in v's dtype and the final state ``[N, HV, K, V]`` in fp32, or None.

    Raises:
        ValueError: shapes, dtypes, devices or boundaries do not match, or the backend is unknown.
        TypeError: an fla argument has a value that is not supported; the text names it.
        BackendError: the named backend cannot serve the call.

    Source: Gated Delta Networks (arXiv 2412.06464), section 3.3.

    Examples:
        >>> from hf_gdn.ops import chunk_gated_delta_rule
        >>> q = k = torch.randn(1, 100, 2, 16)
        >>> v, g, beta = torch.randn(1, 100, 4, 32), -torch.rand(1, 100, 4), torch.rand(1, 100, 4)
        >>> o, state = chunk_gated_delta_rule(
        ...     q, k, v, g, beta, output_final_state=True, use_qk_l2norm_in_kernel=True
        ... )
        >>> o.shape, state.shape
        (torch.Size([1, 100, 4, 32]), torch.Size([1, 4, 16, 32]))
    """
    activations = _Activations(use_gate_in_kernel, A_log, dt_bias, None, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    return _call(
        "chunk_gated_delta_rule",
        "chunk_gdn",
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        activations,
        backend,
        kwargs,
    )


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: None = None,
    gv: None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule (GDN) token by token, for decoding. Arguments and results as in `chunk_gated_delta_rule`.

    g None means no decay, beta None means ones; `gk` and `gv` (fla's further decays) are not supported. q, k and v may
    be of several dtypes, as in fla: the computation is in fp32.

    Examples:
        >>> from hf_gdn.ops import fused_recurrent_gated_delta_rule
        >>> q = k = torch.randn(1, 1, 2, 16)
        >>> v, state = torch.randn(1, 1, 4, 32), torch.zeros(1, 4, 16, 32)
        >>> o, state = fused_recurrent_gated_delta_rule(q, k, v, initial_state=state, output_final_state=True)
        >>> o.shape
        torch.Size([1, 1, 4, 32])
    """
    activations = _Activations(use_gate_in_kernel, A_log, dt_bias, None, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    return _call(
        "fused_recurrent_gated_delta_rule",
        "recurrent_gdn",
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        activations,
        backend,
        dict(kwargs, gk=gk, gv=gv),
    )


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    *,
    lower_bound: float | None = None,
    cu_seqlens: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    backend: str = "auto",
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Kimi delta attention (KDA, one decay per channel) over whole sequences, chunk by chunk.

    Arguments and results as in `chunk_gated_delta_rule`, except: g is ``[B, T, HV, K]`` without a lower limit; dt_bias
    is ``[HV * K]``; with `lower_bound` the gate is ``lower_bound * sigmoid(exp(A_log) * (g + dt_bias))``.

    Source: Kimi Linear (arXiv 2510.26692), section 3.

    Examples:
        >>> from hf_gdn.ops import chunk_kda
        >>> q = k = v = torch.randn(1, 100, 2, 16)
        >>> g, beta = -torch.rand(1, 100, 2, 16), torch.rand(1, 100, 2)
        >>> chunk_kda(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0].shape
        torch.Size([1, 100, 2, 16])
    """
    activations = _Activations(
        use_gate_in_kernel, A_log, dt_bias, lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval
    )
    return _call(
        "chunk_kda",
        "chunk_kda",
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        activations,
        backend,
        kwargs,
    )


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Kimi delta attention (KDA) token by token, for decoding. Arguments and results as in `chunk_kda`.

    q, k and v may be of several dtypes, as in fla: the computation is in fp32.

    Examples:
        >>> from hf_gdn.ops import fused_recurrent_kda
        >>> q = k = v = torch.randn(1, 1, 2, 16)
        >>> g, beta, state = -torch.rand(1, 1, 2, 16), torch.rand(1, 1, 2), torch.zeros(1, 2, 16, 16)
        >>> fused_recurrent_kda(q, k, v, g, beta, initial_state=state, output_final_state=True)[1].shape
        torch.Size([1, 2, 16, 16])
    """
    activations = _Activations(
        use_gate_in_kernel, A_log, dt_bias, lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval
    )
    return _call(
        "fused_recurrent_kda",
        "recurrent_kda",
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        activations,
        backend,
        kwargs,
    )
