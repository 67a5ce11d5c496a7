"""What a call has to give, in float64, and how far a result is from it.

The oracle is the loop over tokens where there are 256 or fewer, and for the ops around the delta rule. Beyond, it is
the eager chunk kernel in float64, whose output, final state and gradients have first to agree with the loop's on 256
tokens of a key head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..loading.shapes import SHAPES
from ..testing import calls
from ..testing.compare import error as tensor_error
from .accuracy import EXACT_ERROR
from .kernel_cases import Case, is_decode, is_delta_rule

# Results by name: "o", "final_state" and, of a backward, "dq", "dk", ...
Results = dict[str, Tensor]
# Factors of o and of the final state in the loss, None for a forward alone.
Weights = tuple[Tensor, Tensor] | None

# Tokens up to which the oracle is the loop, and of which the float64 eager kernel is compared with it.
LOOP = 256
# Elements of a tensor [B, T, heads, dim] that the oracle works on at once: it takes the heads in groups.
_ELEMENTS = 1 << 22
_TENSORS = ("q", "k", "v", "g", "beta", "initial_state")
_GRADIENTS = tuple(f"d{name}" for name in _TENSORS)


@dataclass(frozen=True)
class OracleCase:
    """A call and what it has to give.

    Args:
        op: the op.
        inputs: keyword arguments of a kernel.
        weights: of o and of the final state in the loss, random; None for a forward alone.
        wanted: float64 results.
        oracle: what gave them, ``"loop"`` or ``"eager float64"``.
    """

    op: str
    inputs: dict[str, Any]
    weights: Weights
    wanted: Results
    oracle: str

    def call(self, fn: Callable[..., Any], fading: float = 1.0) -> Callable[[], Results]:
        """What is checked and timed: a call of a kernel. A decode step goes on from the state of the call before.

        Args:
            fn: the kernel.
            fading: factor on the logarithm of the decay, for a step that is repeated on one state: the gates of the
                check would fade it to denormal numbers, which are slow on CPUs.
        """
        if not is_delta_rule(self.op):
            return _call_layer_op(fn, self.inputs, fading)
        inputs = self.inputs if fading == 1 else {**self.inputs, "g": self.inputs["g"] * fading}
        return call(fn, inputs, self.weights, is_decode(self.op))


_last: dict[tuple, OracleCase] = {}  # the one case at hand, since rows of the same call on other backends follow


def prepare(case: Case, device: torch.device, dtype: torch.dtype, normalized: bool = False) -> OracleCase:
    """A case with its results, remembered until one of another call is asked for.

    Args:
        case: what is called; its backend plays no part.
        device, dtype: of the inputs.
        normalized: q and k come normalized; otherwise the kernel is to do it.

    Raises:
        RuntimeError: the float64 eager kernel does not agree with the loop.
    """
    name = (case.op, case.shape, case.batch, case.tokens, case.direction, device, dtype, normalized)
    if name not in _last:
        _last.clear()
        sizes = dict(SHAPES[case.shape].sizes, dtype=dtype, device=device)
        inputs = registry.ops()[case.op].make_inputs(B=case.batch, T=case.tokens, **sizes)
        weights = None
        if not is_delta_rule(case.op):
            _last[name] = OracleCase(case.op, inputs, None, _truth_of_layer_op(case.op, inputs), "loop")
            return _last[name]
        inputs["qk_l2norm"] = not normalized
        if case.direction == "backward":
            random = torch.Generator().manual_seed(1)
            like = (inputs["v"], inputs["initial_state"])
            o, state = (torch.randn(x.shape, generator=random).to(device, x.dtype) for x in like)
            weights = o, state
        _last[name] = OracleCase(case.op, inputs, weights, *_truth(case.op, inputs, weights))
    return _last[name]


def call(
    fn: Callable[..., Any], inputs: dict[str, Any], weights: Weights, inplace: bool = False
) -> Callable[[], Results]:
    """What is checked and timed: a call of kernel `fn` that gives o, the final state and, with `weights`, the gradients
    of the weighted sum. In place, the final state is read where the initial one was, and the next call goes on there.
    """
    if weights is not None:
        leaves = [inputs[name].detach().clone().requires_grad_() for name in _TENSORS]
        called = {**inputs, **dict(zip(_TENSORS, leaves))}

        def both() -> Results:
            o, state = fn(**called)
            grads = torch.autograd.grad((o, state), leaves, weights)
            return {"o": o.detach(), "final_state": state.detach(), **dict(zip(_GRADIENTS, grads))}

        return both
    if inplace:
        state = inputs["initial_state"].clone()
        stepped = {**inputs, "initial_state": state, "inplace": True}
        return lambda: {"o": fn(**stepped)[0], "final_state": state}
    return lambda: dict(zip(("o", "final_state"), fn(**inputs)))


def error(got: Results, wanted: Results) -> tuple[float, str]:
    """Largest relative Frobenius error and the tensor that has it; infinite for a wrong shape or what is not finite."""
    errors = {name: tensor_error(got[name], y) for name, y in wanted.items()}
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def _truth(op: str, inputs: dict[str, Any], weights: Weights) -> tuple[Results, str]:
    loop, eager = registry.ops()[op].reference, registry.get(op, "eager").fn
    if inputs["q"].shape[1] <= LOOP:
        return _exact(loop, inputs, weights), "loop"
    wanted = _exact(eager, inputs, weights)
    start = _part(inputs, weights, slice(0, 1), slice(0, LOOP), slice(0, 1))
    truth, found = _exact(loop, *start), _exact(eager, *start)
    truth["o of the whole call"] = truth["o"]
    found["o of the whole call"] = wanted["o"][:1, :LOOP, : truth["o"].shape[2]]
    off, worst = error(found, truth)
    if not off <= EXACT_ERROR:
        raise RuntimeError(
            f"{op}: {worst} of the float64 eager kernel is {off:.1e} off the oracle, allowed {EXACT_ERROR:.0e}"
        )
    return wanted, "eager float64"


def _part(
    inputs: dict[str, Any], weights: Weights, rows: slice, tokens: slice, heads: slice
) -> tuple[dict[str, Any], Weights]:
    """Some sequences, tokens and key heads of a call, with the value heads that read those."""
    group = inputs["v"].shape[2] // inputs["q"].shape[2]
    values = slice(heads.start * group, heads.stop * group)
    part = {name: inputs[name][rows, tokens, heads if name in ("q", "k") else values] for name in _TENSORS[:-1]}
    part["initial_state"] = inputs["initial_state"][rows, values]
    weights = None if weights is None else (weights[0][rows, tokens, values], weights[1][rows, values])
    return {**inputs, **part}, weights


def _exact(fn: Callable[..., Any], inputs: dict[str, Any], weights: Weights) -> Results:
    """Results of `fn` in float64, some key heads at a time to bound the memory."""
    device = inputs["q"].device
    device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    batch, tokens, k_heads, k_dim = inputs["q"].shape
    v_heads, v_dim = inputs["v"].shape[2:]
    states = tokens if weights is not None and tokens <= LOOP else 1  # autograd keeps the loop's after every token
    head = batch * (v_heads // k_heads) * max(tokens * k_dim, tokens * v_dim, states * k_dim * v_dim)
    step = max(1, _ELEMENTS // head)
    parts = []
    for first in range(0, k_heads, step):
        part, loss = _part(inputs, weights, slice(None), slice(None), slice(first, min(first + step, k_heads)))
        part = {name: x.to(device).double() if isinstance(x, Tensor) else x for name, x in part.items()}
        loss = None if loss is None else (loss[0].to(device).double(), loss[1].to(device).double())
        with torch.set_grad_enabled(loss is not None):
            parts.append(call(fn, part, loss)())
    return {name: torch.cat([part[name] for part in parts], 1 if "state" in name else 2) for name in parts[0]}


# ------------------------------------------------------------------------------------------ ops around the delta rule

_UPDATED = ("conv_state", "state")  # what a step updates in place


def _call_layer_op(fn: Callable[..., Any], inputs: dict[str, Any], fading: float = 1.0) -> Callable[[], Results]:
    called, updated = dict(inputs), dict[str, Tensor]()
    if "state" in inputs:
        updated = {name: inputs[name].clone() for name in _UPDATED}
        called.update(updated)
        weights = inputs["weights"]
        called["weights"] = weights._replace(A_log=weights.A_log + math.log(fading))
    return lambda: {**_named(fn(**called)), **updated}


def _named(out: Any) -> Results:
    """A kernel's outputs by name."""
    if isinstance(out, Tensor):
        return {"y": out}
    return {name: value for name, value in out._asdict().items() if value is not None}


@functools.cache
def _names(op: str) -> tuple[str, ...]:
    """Names of an op's results, the updated ones last."""
    inputs = registry.ops()[op].make_inputs(B=1, T=1, HK=1, HV=1, K=8, V=8)
    return tuple(_call_layer_op(registry.get(op, "eager").fn, inputs)())


def _truth_of_layer_op(op: str, inputs: dict[str, Any]) -> Results:
    out = registry.ops()[op].reference(**calls.double(calls.mapped(Tensor.cpu, inputs)))
    return dict(zip(_names(op), out if isinstance(out, tuple) else (out,)))


def moved_bytes_of_layer_op(case: OracleCase) -> int:
    """Bytes that a call has to read and write: every input and every output once, and what a step updates twice."""
    read = [x.nbytes for x in calls.tensors(case.inputs)]
    if "prologue" in case.op:
        read.append(-case.inputs["projected"].z.nbytes)  # the norm's gate, which comes later
    sizes = {name: x.numel() for name, x in case.wanted.items()}
    like = {"g": 4, "beta": 4, "state": 4}
    element = next(x.element_size() for x in case.inputs.values() if isinstance(x, Tensor))
    return sum(read) + sum(count * like.get(name, element) for name, count in sizes.items())
