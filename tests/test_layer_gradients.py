"""Training the ops around the delta rule: who computes gradients, what is kept, and everything that takes derivatives.

The kernels' own results are checked in tests/kernels/test_cases.py, as those of every op. Here a stand-in backend,
whose kernels autograd cannot go through, has eager's forwards and gradients.
"""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from hf_gdn import log, operators, registry
from hf_gdn.gradients.gated_norm import BACKWARD_NORM_OPERATOR
from hf_gdn.gradients.prologue import BACKWARD_PROLOGUE_OPERATORS
from hf_gdn.kernels.contract import NormGradients
from hf_gdn.kernels.triton.runtime import INTERPRET
from hf_gdn.testing import assert_close, assert_same
from hf_gdn.testing import invariants as holds
from hf_gdn.testing.calls import SIGNATURES, tensors
from hf_gdn.testing.tolerances import SAME_SUMS

OPS = ("gated_norm", "prologue_gdn", "prologue_kda")
pytestmark = pytest.mark.parametrize("op", OPS)


class Call:
    """A call of an op as a function of its leaves, which require gradients."""

    def __init__(self, op, dtype=torch.float64, joined=False, **options):
        self.op, self.options = op, dict(conv_state=None, keep=0, cu_seqlens=None, lengths=None) | options
        sizes = dict(B=1 if "cu_seqlens" in options else 2, T=40, HK=4 if op.endswith("kda") else 2, HV=4, K=6, V=5)
        inputs = registry.ops()[op].make_inputs(**sizes, bias=True, dtype=dtype)
        self.spec = inputs["spec"]
        if op == "gated_norm":
            self.leaves = [inputs[name].detach().requires_grad_() for name in ("o", "z", "weight")]
            return
        x, self.weights = inputs["projected"], inputs["weights"]
        self.shapes, self.z, qkv = [y.shape for y in x[:3]], x.z, x.joined().clone()
        parts = [qkv] if joined else [y.clone() for y in x[:3]]
        self.leaves = [y.detach().requires_grad_() for y in (*parts, x.a, x.b, *self.weights[:4])]

    def __call__(self, *leaves, kernel=None):
        """All results that have gradients."""
        leaves, kernel = leaves or self.leaves, kernel or registry.get_or_none(self.op, "fast")
        if self.op == "gated_norm":
            return (operators.call_norm(kernel, *leaves, self.spec, needs_grad=True),)
        *parts, a, b, conv, conv_bias, A_log, dt_bias = leaves
        qkv = parts[0] if len(parts) == 1 else None
        if qkv is not None:
            parts = qkv.split_with_sizes([shape[2:].numel() for shape in self.shapes], -1)
        q, k, v = (x.reshape(shape) for x, shape in zip(parts, self.shapes))
        weights = self.weights._replace(conv=conv, conv_bias=conv_bias, A_log=A_log, dt_bias=dt_bias)
        projected = operators.Projections(q, k, v, a, b, self.z, qkv)
        return operators.call_prologue(kernel, projected, weights, self.spec, needs_grad=True, **self.options)[:5]

    def loss(self, *leaves, kernel=None):
        """Weighted, since norms fix sums of squares."""
        made = self(*leaves, kernel=kernel)
        return sum((x.square() * torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype)).sum() for x in made)

    def gradients(self, kernel=None):
        return torch.autograd.grad(self.loss(kernel=kernel), self.leaves)


def check(got, wanted):
    for i, (x, y) in enumerate(zip(got, wanted, strict=True)):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert_close(f"gradient {i}", x, y, SAME_SUMS)


@pytest.fixture
def eager(op):
    """Autograd through eager: of a backend by another name nothing is known of its gradients."""
    return dataclasses.replace(registry.get(op, "eager"), backend="plain")


@pytest.fixture(autouse=True)
def fast(op, monkeypatch):
    """The stand-in; ``fast(...)`` changes its kernel for gradients."""
    monkeypatch.setattr(log, "warned", set())
    plain = [registry.get(name, "eager") for name in (op, registry.backward_of(op))]
    opaque = dict(backend="fast", differentiable=False, traceable=False)
    made = [registry.register(dataclasses.replace(kernel, **opaque), before="eager") for kernel in plain]

    def change(**changes):
        registry.unregister(made[1].op, "fast")
        made[1] = registry.register(dataclasses.replace(made[1], **changes), before="eager")

    yield change
    for kernel in made:
        if registry.get_or_none(kernel.op, "fast") is not None:
            registry.unregister(kernel.op, "fast")


LENGTHS = (*range(1, 21), 63, 64, 65, 130)


def check_lengths(op, backend):
    kernel = registry.get(registry.backward_of(op), backend)
    for T in LENGTHS:
        sizes = dict(HK=1, HV=1 if op.endswith("kda") else 2, K=8, V=8)
        holds.matches_reference(kernel, registry.ops()[kernel.op].make_inputs(T=T, seed=T, **sizes))


def test_gradients_of_many_lengths(op):
    check_lengths(op, "eager")


@pytest.mark.interpret
@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
def test_gradients_of_many_lengths_in_the_interpreter(op):
    check_lengths(op, "triton")


@pytest.mark.interpret
@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
def test_nan_in_gives_nan_out_of_the_kernels(op):
    """In every argument, the gradients among them, and in the gates of the forward."""
    kernel = registry.get(registry.backward_of(op), "triton")
    call = registry.ops()[kernel.op].make_inputs(T=9, HK=1, HV=1, K=4, V=4, bias=True)
    unused = () if op == "gated_norm" else (call["projected"].z, call["weights"].norm)
    for number, place in enumerate(tensors(call)):
        if not any(place is x for x in unused):
            at = tuple(size // 2 for size in place.shape)
            before, place[at] = place[at].clone(), torch.nan
            assert any(x.isnan().any() for x in tensors(kernel.fn(**call))), f"tensor {number}"
            place[at] = before
    if op != "gated_norm":
        forward = registry.ops()[op].make_inputs(T=2, HK=1, HV=1, K=4, V=4)
        forward["projected"].a[0, 1] = torch.nan
        assert registry.get(op, "triton").fn(**forward).g[0, 1].isnan().all()


@pytest.mark.parametrize("how", ["plain", "joined", "padded", "packed", "cached"])
def test_gradients_are_those_of_autograd(op, how, eager):
    options = {
        "plain": {},
        "joined": dict(joined=True),
        "padded": dict(lengths=torch.tensor([40, 7])),
        "packed": dict(cu_seqlens=torch.tensor([0, 2, 2, 40])),
        "cached": dict(keep=4),
    }[how]
    call = Call(op, **options)
    check(call.gradients(), call.gradients(eager))
    single = Call(op, dtype=torch.float32, **options)
    assert [x.dtype for x in single.gradients()] == [torch.float32] * len(single.leaves)


def test_each_result_alone_and_strided_gradients(op, eager):
    call = Call(op)
    for made, wanted in zip(call(), call(kernel=eager), strict=True):
        # The gradient of a sum is one number with strides of 0.
        options = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
        found = [torch.autograd.grad(x.sum(), call.leaves, **options) for x in (made, wanted)]
        check(*found)


def test_only_what_is_asked_for(op, eager):
    call = Call(op)
    for leaf, wanted in zip(call.leaves, call.gradients(eager)):
        others = [x if x is leaf else x.detach() for x in call.leaves]
        check(torch.autograd.grad(call.loss(*others), leaf), [wanted])


def test_a_window_that_is_continued_goes_through_eager(op, eager, fast):
    if op == "gated_norm":
        pytest.skip("has no window")
    fast(fn=None)
    window = torch.randn(2, 2 * 4 * 6 + 20 if op.endswith("kda") else 44, 4, dtype=torch.float64, requires_grad=True)
    call = Call(op, conv_state=window, keep=4)
    call.leaves.append(window)
    loss = sum(x.square().sum() for x in call(*call.leaves[:-1]))
    assert torch.autograd.grad(loss, window)[0].any()


def test_nan_in_gives_nan_out(op):
    call = Call(op)
    call.leaves[0].data[0, 3] = torch.nan
    assert call()[0][0].isnan().any() and not call()[0][1].isnan().any()
    found = call.gradients()
    assert found[0][0].isnan().any() and not found[0][1].isnan().any()
    assert any(x.isnan().any() for x in found[len(call.leaves) - 4 :]), "sums over all tokens"


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("joined", [False, True])
def test_what_is_kept_for_the_backward(op, joined):
    """The inputs alone: no convolution, no activation in fp32, no norm."""
    call, kept = Call(op, dtype=torch.bfloat16, joined=joined), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        call()
    by_address = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    given = {x.untyped_storage().data_ptr() for x in call.leaves}
    assert set(by_address) <= given, "nothing but inputs"


# ---------------------------------------------------------------------------------------------- what takes derivatives


def test_operators_pass_opcheck(op):
    if op == "gated_norm":
        o, z, weight = (x.detach() for x in Call(op).leaves)
        torch.library.opcheck(BACKWARD_NORM_OPERATOR, (o, z, weight, o, "silu", False, 1e-6, "eager", "auto"))
        return
    call = Call(op)
    leaves, results = [x.detach() for x in call.leaves], [x.detach() for x in call()]
    options = None, False, 1.0, "eager", "auto"
    for bounds, lengths in ((None, None), (None, torch.tensor([40, 7]))):
        given = *leaves, bounds, lengths, *results, *options
        torch.library.opcheck(BACKWARD_PROLOGUE_OPERATORS[op], given)
    without_bias = *leaves[:6], None, *leaves[7:], None, None, *results, *options
    torch.library.opcheck(BACKWARD_PROLOGUE_OPERATORS[op], without_bias)


@pytest.mark.parametrize("joined", [False, True])
def test_compiled(op, joined, eager):
    call = Call(op, joined=joined)
    compiled = torch.compile(call.loss, fullgraph=True, backend="aot_eager")
    check(torch.autograd.grad(compiled(*call.leaves), call.leaves), call.gradients(eager))
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(op, reentrant):
    from torch.utils.checkpoint import checkpoint

    call = Call(op)
    wanted = call.gradients()
    checkpoint(call.loss, *call.leaves, use_reentrant=reentrant).backward()
    for i, (leaf, want) in enumerate(zip(call.leaves, wanted)):
        assert_same(f"gradient {i}", leaf.grad, want)


def test_func(op):
    call = Call(op)
    found = torch.func.grad(call.loss, argnums=tuple(range(len(call.leaves))))(*(x.detach() for x in call.leaves))
    check(found, call.gradients())


def test_second_derivatives_are_refused(op):
    call = Call(op)
    first, *_ = torch.autograd.grad(call.loss(), call.leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op} of hf_gdn has first derivatives only, and a second one was asked"):
        first.sum().backward()


# ------------------------------------------------------------------------------------------------------- who serves it

DIMS = (4, 4, 5, 5)


def companion(op, needs_grad=True):
    return registry.companion(op, "cpu", torch.float64, DIMS, "fast", needs_grad)


def test_a_backend_without_gradients_serves_inference_only(op, fast, caplog):
    assert companion(op).backend == companion(op, False).backend == "fast"
    registry.unregister(registry.backward_of(op), "fast")
    with caplog.at_level(logging.WARNING, "hf_gdn"):
        assert companion(op) is None and companion(op, False).backend == "fast"
    assert caplog.messages == []


def test_gradients_that_are_refused_leave_training_to_eager(op, fast, caplog):
    fast(why_not=lambda request: "is broken here")
    with caplog.at_level(logging.WARNING, "hf_gdn"):
        assert [companion(op) for _ in range(2)] == [None, None] and companion(op, False).backend == "fast"
    assert caplog.messages == [f"hf_gdn runs {op} on the eager backend: fast is broken here"]


def test_gradients_whose_launch_fails_go_to_the_next_backend(op, eager, fast):
    from torch._inductor.runtime.triton_compat import OutOfResources  # what Triton raises, or a stand-in

    def fails(*args, **options):
        raise OutOfResources(300_000, 200_000, "shared memory")

    call = Call(op, dtype=torch.float32)
    fast(fn=fails)
    fast(checked=True)
    registry.get(registry.backward_of(op), "fast")
    from hf_gdn import verification

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_GDN_VERIFY", "0")
        verification.forget()
        check(call.gradients(), call.gradients(eager))
        assert companion(op) is not None  # of another dtype
        assert registry.companion(op, "cpu", torch.float32, (4, 4, 5, 5), "fast", True) is None or op != "gated_norm"
    verification.forget()


def test_results_have_names(op):
    if op == "gated_norm":
        assert SIGNATURES[registry.backward_of(op)].results == tuple(f"d_{name}" for name in NormGradients._fields)
    assert set(SIGNATURES[registry.backward_of(op)].summed) < set(SIGNATURES[registry.backward_of(op)].results)
