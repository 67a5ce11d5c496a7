"""A kernel's call as a dict of its arguments: run it, or make another of it (some tokens, some rows, other strides).

The names of arguments and results are those of `hf_gdn.kernels.contract`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..kernels.contract import DeltaRuleInputs, Gradients, NormGradients, PrologueGradients, state_dtype
from ..registry import Kernel
from ..upstream.tensors import tree_map_only

Call = dict[str, Any]
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Signature:
    """Which arguments and results of an op belong to tokens, and which to sequences.

    Args:
        per_token: arguments ``[B, T, ...]``; named tuples of such tensors count as one.
        results: names of the results, ``[B, T, ...]`` unless they are carried.
        carried: results that the next tokens of a sequence take as an argument, by the argument's name; both are
            ``[N, ...]``, N the number of sequences.
        in_place: the carried arguments are updated in place, and only the first result is returned.
        summed: results that are sums over all tokens, as gradients of weights are.
    """

    per_token: tuple[str, ...]
    results: tuple[str, ...]
    carried: Mapping[str, str] = field(default_factory=dict)
    in_place: bool = False
    summed: tuple[str, ...] = ()


_DELTA_RULE = Signature(("q", "k", "v", "g", "beta"), ("o", "final_state"), {"initial_state": "final_state"})
_BACKWARD = Signature(
    (*_DELTA_RULE.per_token, "d_o"),
    tuple(f"d_{name}" for name in Gradients._fields),
    # Both are of sequences, as the one result is; no next call takes it.
    {"initial_state": "d_initial_state", "d_final_state": "d_initial_state"},
)
_PROLOGUE = Signature(("projected",), DeltaRuleInputs._fields, {"conv_state": "conv_state"})
_BACKWARD_PROLOGUE = Signature(
    ("projected", "d_q", "d_k", "d_v", "d_g", "d_beta"),
    tuple(f"d_{name}" for name in PrologueGradients._fields),
    summed=("d_conv", "d_A_log", "d_dt_bias", "d_conv_bias"),
)
_STEP = Signature(("projected",), ("y", "conv_state", "state"), {"conv_state": "conv_state", "state": "state"}, True)
SIGNATURES = {
    **dict.fromkeys(("chunk_gdn", "chunk_kda", "recurrent_gdn", "recurrent_kda"), _DELTA_RULE),
    **dict.fromkeys(("backward_gdn", "backward_kda"), _BACKWARD),
    **dict.fromkeys(("prologue_gdn", "prologue_kda"), _PROLOGUE),
    **dict.fromkeys(("step_gdn", "step_kda"), _STEP),
    "gated_norm": Signature(("o", "z"), ("y",)),
    **dict.fromkeys(("backward_prologue_gdn", "backward_prologue_kda"), _BACKWARD_PROLOGUE),
    "backward_gated_norm": Signature(
        ("o", "z", "d_y"), tuple(f"d_{name}" for name in NormGradients._fields), summed=("d_weight",)
    ),
}


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`value` with every tensor in it, in dicts and tuples too, replaced by what `function` makes of it."""
    return tree_map_only(Tensor, function, value)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in `value`."""
    found: list[Tensor] = []
    mapped(found.append, value)
    return found


def double(value: Any) -> Any:
    """`value` with every floating-point tensor in float64."""
    return mapped(lambda x: x.double() if x.is_floating_point() else x, value)


def dtype_of(op: str, call: Call) -> torch.dtype:
    """Dtype of a call: that of its first tensor."""
    return tensors(call[SIGNATURES[op].per_token[0]])[0].dtype


def run(kernel: Kernel, call: Call) -> Results:
    """Results of a kernel by name, without those that are None. What it updates in place is copied before.

    Raises:
        AssertionError: ``inplace=True`` returned another tensor than the initial state.
    """
    signature, call = SIGNATURES[kernel.op], dict(call)
    if signature.in_place or call.get("inplace"):
        call |= {name: call[name].clone() for name in signature.carried}
    made = kernel.fn(**call)
    if signature.in_place:
        made = (made, *(call[name] for name in signature.carried))
    elif call.get("inplace"):
        assert made[1] is call["initial_state"], "inplace=True returned another tensor"
    made = made if isinstance(made, tuple) else (made,)
    return {name: x for name, x in zip(signature.results, made, strict=True) if x is not None}


def reference(op: str, call: Call) -> Results:
    """Results of the oracle in float64, by name."""
    exact = {name: x for name, x in double(call).items() if name not in ("inplace", "token_states")}
    made = registry.ops()[op].reference(**exact)
    made = made if isinstance(made, tuple) else (made,)
    return {name: x for name, x in zip(SIGNATURES[op].results, made, strict=True) if x is not None}


def result_dtype(op: str, call: Call, result: str) -> torch.dtype:
    """Dtype that the contract prescribes for a result."""
    if op.startswith("backward"):
        name = "q" if result == "d_qkv" else result.removeprefix("d_")
        holders = (call, *(call[x]._asdict() for x in ("projected", "weights") if x in call))
        return next(x[name].dtype for x in holders if name in x)
    kept = result in ("final_state", "state") or (result in ("g", "beta") and "prologue" in op)
    return state_dtype(dtype_of(op, call)) if kept else dtype_of(op, call)


def tokens(op: str, call: Call, part: slice) -> Call:
    """The call on some of its tokens."""
    return {n: mapped(lambda x: x[:, part], x) if n in SIGNATURES[op].per_token else x for n, x in call.items()}


def rows(op: str, call: Call, part: slice | Tensor) -> Call:
    """The call on some of its rows, by a slice or by their numbers."""
    of_rows = (*SIGNATURES[op].per_token, *SIGNATURES[op].carried)
    return {name: mapped(lambda x: x[part], x) if name in of_rows else x for name, x in call.items()}


# ------------------------------------------------------------------------------------------------------------- strides


def in_larger_tensors(op: str, call: Call) -> Call:
    """Every per-token tensor and state as a view into a larger tensor of NaN; the last dimension stays contiguous."""

    def view(x: Tensor) -> Tensor:
        if x.dim() == 3:  # one number a head: cut from the end of a wider projection
            return x.new_full((*x.shape[:2], x.shape[2] + 5), torch.nan)[..., 2 : 2 + x.shape[2]].copy_(x)
        B, T, H, D = x.shape  # heads outside tokens
        room = x.new_full((B, H + 1, T + 2, D + 3), torch.nan)
        return room[:, 1:, 1:-1, :D].transpose(1, 2).copy_(x)

    moved = (*SIGNATURES[op].per_token, *SIGNATURES[op].carried)
    return {name: mapped(view, x) if name in moved else x for name, x in call.items()}


def of_one_projection(op: str, call: Call) -> Call:
    """q, k and v (K = V) as slices of one tensor with heads outside tokens, g and beta too, and a transposed state."""
    size = call["q"].shape[-1]
    fused = torch.cat([call[name] for name in "qkv"], -1).transpose(1, 2).contiguous().transpose(1, 2)
    moved = {name: fused[..., size * i : size * i + size] for i, name in enumerate("qkv")}
    moved |= {name: torch.stack((call[name], call[name] * torch.nan), 2)[:, :, 0] for name in ("g", "beta")}
    return {**call, **moved, "initial_state": call["initial_state"].mT.contiguous().mT}


def of_separate_projections(op: str, call: Call) -> Call:
    """q, k, v, a, b and z as contiguous tensors of their own; for a prologue also a transposed conv_state."""
    apart = mapped(lambda x: x.clone(memory_format=torch.contiguous_format), call["projected"])
    moved = {"conv_state": call["conv_state"].mT.contiguous().mT} if "keep" in call else {}
    return {**call, "projected": apart, **moved}
