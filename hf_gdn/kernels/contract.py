"""The interface between kernels and layers: signatures of kernels and types of their arguments.

A delta-rule kernel is called with inputs that `hf_gdn.ops` has checked, as

    fn(q, k, v, g, beta, *, scale, initial_state=None, cu_seqlens=None, qk_l2norm=False)  ->  (o, final_state)

q, k ``[B, T, HK, K]``; v ``[B, T, HV, V]``; g in natural log, ``[B, T, HV]`` for the gated delta rule (GDN) and
``[B, T, HV, K]`` for Kimi delta attention (KDA); beta ``[B, T, HV]``; states ``[N, HV, K, V]`` in fp32 (float64 for
float64 inputs). N is the number of sequences: B, or ``len(cu_seqlens) - 1`` if B is 1 and sequences are packed along T.
o is ``[B, T, HV, V]`` in v's dtype; the final state is always returned. Inputs may be strided in their outer
dimensions; the last one is contiguous.

The recurrent ops take two more arguments, for decoding:

    inplace=False       write the final state to `initial_state` and return this tensor
    token_states=None   a tensor ``[B, T, HV, K, V]`` in fp32 to which the state after every token is written

Gradients do not go through either: they are refused before anything is written.

Ops that read states can find them in slots of a pool instead: with ``slots=Slots(rows, begun)``, `initial_state` is a
pool ``[P, HV, K, V]`` and `conv_state` a pool ``[P, C, keep]``, contiguous but for their first dimension, and of the
states' dtypes. Sequence n starts from slot ``rows[n]``, or from zeros where it has not begun, and its states are
written to the slot in place; the pool is what the op returns as its state. Packed sequences then read and write a
convolution state each. A sequence without tokens leaves its slot as it is. Slots of different sequences differ, but for
a slot whose contents nobody needs. A `Kernel` says whether it takes slots; for others, states are copied around the
call (`slots`).

The gradients of the chunk ops are ops of their own, ``backward_gdn`` and ``backward_kda``:

    fn(q, k, v, g, beta, d_o, d_final_state, *, scale, initial_state=None, cu_seqlens=None, qk_l2norm=False, saved=None)
                ->  Gradients, contiguous, in the dtypes of the inputs

They compute all they need again from the inputs. Where that costs more than it saves, a chunk kernel has a second
function ``save(...)  ->  (o, final_state, saved)`` for calls that need gradients, which returns `saved_rows` states
``[rows, HV, K, V]`` between blocks of tokens; `saved` is None where the forward ran on another backend.

The other ops compute the rest of what is between a layer's projections:

    prologue    fn(projected, weights, spec, *, conv_state=None, keep=0, cu_seqlens=None, lengths=None)
                ->  DeltaRuleInputs
                q, k, v <- silu(conv(q | k | v)) ;  q, k <- l2norm ;  g, beta <- gates(a, b)
    gated norm  fn(o, z, weight, spec)  ->  y ``[B, T, HV, V]``
                y <- norm(o) gate(z)
    step        fn(projected, weights, spec, conv_state, state)  ->  y
                everything between a layer's projections, for the next few tokens of a cache; `conv_state` and `state`
                are updated in place

The gradients of prologue and norm are ops, too. They are given the forward's inputs and the gradients of its results:

    backward prologue    fn(projected, weights, spec, d_q, d_k, d_v, d_g, d_beta, *, cu_seqlens=None, lengths=None)
                         ->  PrologueGradients
    backward gated norm  fn(o, z, weight, d_y, spec)  ->  NormGradients

Gradients of weights are sums over all tokens, in an order that depends on the shapes alone. A prologue that continues a
convolution state has no such op: its gradients go through eager.

Their inputs are the outputs of the projections without a copy: `Projections` holds views with any strides. q, k, v and
o are rounded to the model's dtype once each, and beta as in transformers; all other values are fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Activations that a `LayerSpec` can name.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the recurrent state for inputs of `dtype`: fp32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _layout(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)} with strides {x.stride()}"


def check_inplace(state: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The initial state that ``inplace=True`` writes to. Raises ValueError unless it is contiguous and of `dtype`."""
    if state is None:
        raise ValueError("inplace=True needs an initial_state to write to; it is None")
    if not state.is_contiguous() or state.dtype != dtype:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"inplace=True needs a contiguous {name} initial_state; it is {_layout(state)}")
    return state


def check_slots(pool: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The pool of a call with slots. Raises ValueError unless it is of `dtype` and each of its states contiguous."""
    if pool is None:
        raise ValueError("slots need a pool of states; it is None")
    if pool.dtype != dtype or (len(pool) > 0 and not pool[0].is_contiguous()):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"slots need a {name} pool, contiguous but for its first dimension; it is {_layout(pool)}")
    return pool


def check_no_gradients(inplace: bool, token_states: Tensor | None, *tensors: Tensor | None) -> None:
    """Raise RuntimeError if `inplace` or `token_states` is used and gradients of one of the tensors are needed."""
    used = inplace or token_states is not None
    if used and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        name = "inplace=True" if inplace else "token_states"
        raise RuntimeError(
            f"{name} has no gradients, and an argument requires grad; leave it out, or call under torch.no_grad()"
        )


def check_token_states(states: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless `states` ``[B, T, HV, K, V]`` is of `dtype`, every ``[K, V]`` contiguous."""
    if states.stride()[3:] != (states.shape[4], 1) or states.dtype != dtype:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"token_states needs contiguous {name} [K, V] matrices; it is {_layout(states)}")


class Slots(NamedTuple):
    """Where the states of N sequences are in a pool."""

    rows: Tensor  # [N], int64: the slot of every sequence, a row of the pool
    begun: Tensor  # [N], bool: whether the slot holds the sequence's state; it starts from zeros where not


class Projections(NamedTuple):
    """Outputs of a layer's input projections for ``[B, T]`` tokens. R = HV / HK value heads share a key head.

    The last dimension of q, k, v, z and of KDA's a is contiguous.
    """

    q: Tensor  # [B, T, HK, K], before the convolution
    k: Tensor  # [B, T, HK, K]
    v: Tensor  # [B, T, HK, R, V]
    a: Tensor | None  # [B, T, HK, R] (GDN) or [B, T, HV K] (KDA), before bias and gate; None if g is given
    b: Tensor  # [B, T, HK, R], before the sigmoid
    z: Tensor  # [B, T, HK, R, V], gate of the output norm
    qkv: Tensor | None = None  # [B, T, C], q | k | v, if one projection returns all three
    g: Tensor | None = None  # [B, T, HV, K], decay from a forget-gate module that had to be called

    def decay_by_head(self) -> Tensor:
        """a of every value head: ``[B, T, HK, R]`` (GDN) or ``[B, T, HK, R, K]`` (KDA), a view."""
        assert self.a is not None
        HK, K = self.q.shape[2:]
        return self.a.unflatten(2, (HK, self.v.shape[3], K)) if self.a.dim() == 3 else self.a

    def joined(self) -> Tensor:
        """q | k | v concatenated, ``[B, T, C]``."""
        if self.qkv is not None:
            return self.qkv
        return torch.cat((self.q.flatten(2), self.k.flatten(2), self.v.flatten(2)), -1)


class Weights(NamedTuple):
    """A layer's parameters between its projections, in any float dtype."""

    conv: Tensor  # [C, width]
    conv_bias: Tensor | None  # [C]
    A_log: Tensor  # [HV] elements
    dt_bias: Tensor  # [HV] or, for KDA, [HV K] elements
    norm: Tensor | None  # [V]; None if the norm module has to be called


class LayerSpec(NamedTuple):
    """Options that differ between model families.

    Args:
        lower_bound: if given, the log-decay is ``lower_bound sigmoid(exp(A_log) a)``, else ``-exp(A_log) softplus(a)``.
        decay_in_dtype: round the log-decay to the model's dtype.
        beta_scale: factor on beta.
        activation: activation of the convolution: a key of `ACTIVATIONS`, or a function.
        gate: activation of the norm's gate: a key of `ACTIVATIONS`, or a function.
        norm_in_fp32: apply the norm's weight in fp32; otherwise the norm is rounded first and the weight is applied in
            the model's dtype.
        eps: epsilon of the norm.
    """

    lower_bound: float | None = None
    decay_in_dtype: bool = False
    beta_scale: float = 1.0
    activation: str | Callable[[Tensor], Tensor] = "silu"
    gate: str | Callable[[Tensor], Tensor] = "silu"
    norm_in_fp32: bool = False
    eps: float = 1e-6


class DeltaRuleInputs(NamedTuple):
    """Inputs of the delta rule, and the new convolution state."""

    q: Tensor  # [B, T, HK, K], normalised over K, in the model's dtype
    k: Tensor  # [B, T, HK, K], as q
    v: Tensor  # [B, T, HV, V], in the model's dtype
    g: Tensor  # [B, T, HV] (GDN) or [B, T, HV, K] (KDA), natural-log decay in fp32
    beta: Tensor  # [B, T, HV], in fp32
    conv_state: Tensor | None  # [B, C, keep], contiguous: the last `keep` inputs of the convolution; None if keep is 0


def saved_rows(B: int, T: int, packed: bool, keep: int) -> int:
    """The number of states saved for a backward, one between two blocks of `keep` tokens; none if keep is 0.

    For packed sequences it is an upper bound. B and T may be symbolic.
    """
    if keep == 0:
        return 0
    return T // keep if packed else B * (torch.sym_max(T - 1, 0) // keep)


class Gradients(NamedTuple):
    """Gradients of a chunk op's inputs."""

    q: Tensor  # [B, T, HK, K]
    k: Tensor  # [B, T, HK, K]
    v: Tensor  # [B, T, HV, V]
    g: Tensor  # [B, T, HV] or [B, T, HV, K]
    beta: Tensor  # [B, T, HV]
    initial_state: Tensor | None  # [N, HV, K, V], None if none was given


class PrologueGradients(NamedTuple):
    """Gradients of a prologue's inputs, contiguous, in their dtypes and shapes."""

    qkv: Tensor  # [B, T, C], of q | k | v
    a: Tensor
    b: Tensor  # [B, T, HK, R]
    conv: Tensor  # [C, width]
    A_log: Tensor
    dt_bias: Tensor
    conv_bias: Tensor | None  # [C]; None if the convolution has no bias


class NormGradients(NamedTuple):
    """Gradients of a gated norm's inputs, contiguous, in their dtypes."""

    o: Tensor  # [B, T, HV, V]
    z: Tensor  # [B, T, HK, R, V]
    weight: Tensor  # [V]
