"""Training the chunk ops: who computes gradients, what is kept for them, and everything that takes derivatives.

The kernels' own results are checked in tests/kernels/test_cases.py, as those of every op.
"""

from __future__ import annotations

import dataclasses
import functools
import logging

import pytest
import torch

from hf_gdn import gradients, log, ops, registry
from hf_gdn.kernels.contract import saved_rows
from hf_gdn.testing import assert_close, assert_same
from hf_gdn.testing import invariants as holds
from hf_gdn.testing.tolerances import SAME_SUMS
from tests import tiny_models as tiny

FUNCTIONS = {"chunk_gdn": ops.chunk_gated_delta_rule, "chunk_kda": ops.chunk_kda}
NAMES = ("q", "k", "v", "g", "beta", "initial_state")
pytestmark = pytest.mark.parametrize("op", FUNCTIONS)


def make(op, dtype=torch.float64, **sizes):
    """Leaves that require gradients."""
    inputs = registry.ops()[op].make_inputs(**{"B": 2, "T": 70, "HK": 2, "HV": 4, "K": 6, "V": 5, **sizes}, dtype=dtype)
    return [inputs[name].requires_grad_() for name in NAMES]


def results(op, *leaves, backend="auto", **options):
    return FUNCTIONS[op](*leaves[:5], initial_state=leaves[5], output_final_state=True, backend=backend, **options)


def loss(op, *leaves, **options):
    o, state = results(op, *leaves, **options)
    return o.square().sum() + state.sum()


def backward_of(op):
    return registry.get(registry.backward_of(op), "eager")


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("lengths", [range(1, 131), (257,), (1000,)], ids=["every_length", "257", "1000"])
def test_gradients_of_many_lengths(op, lengths):
    for T in lengths:
        call = registry.ops()[registry.backward_of(op)].make_inputs(T=T, HK=1, HV=1, K=8, V=8, seed=T)
        holds.matches_reference(backward_of(op), call)


@pytest.mark.parametrize(("tokens", "fast"), [(3, False), (70, True), (300, True)])
def test_gradcheck(op, tokens, fast):
    leaves = make(op, B=1, T=tokens, HK=1, HV=2, K=3, V=2)
    call = lambda *x: results(op, *x, use_qk_l2norm_in_kernel=True)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves, fast_mode=fast)


def test_the_same_without_saved_states(op):
    """As after a forward on another backend."""
    kernel = backward_of(op)
    call = registry.ops()[kernel.op].make_inputs(B=2, T=600, HK=1, HV=2, K=8, V=8)
    forward = {name: x for name, x in call.items() if not name.startswith("d_")}
    *_, saved = registry.get(op, "eager").save(**forward)
    assert len(saved) == saved_rows(2, 600, False, registry.get(op, "eager").keep) == 4
    for name, got, want in zip(NAMES, kernel.fn(**call, saved=saved), kernel.fn(**call)):
        assert_same(name, got, want)


def test_a_cpu_is_no_reason_for_a_warning(op, caplog, monkeypatch):
    monkeypatch.setattr(log, "warned", set())
    monkeypatch.setattr(registry, "_chosen", {})
    with caplog.at_level(logging.WARNING, "hf_gdn"):
        leaves = make(op)
        torch.autograd.grad(loss(op, *leaves), leaves)
    assert caplog.messages == []


def test_each_result_alone_and_strided_gradients(op):
    leaves = make(op)
    o, state = results(op, *leaves)
    for result in (o, state):
        ones = torch.autograd.grad(result, leaves, torch.ones_like(result), retain_graph=True)
        for name, got, want in zip(NAMES, torch.autograd.grad(result.sum(), leaves, retain_graph=True), ones):
            assert_same(name, got, want)  # the gradient of a sum is one number with strides of 0


def test_only_what_is_asked_for(op):
    leaves = make(op)
    wanted = torch.autograd.grad(loss(op, *leaves), leaves)
    for i, leaf in enumerate(leaves):
        others = [x if x is leaf else x.detach() for x in leaves]
        (got,) = torch.autograd.grad(loss(op, *others), leaf)
        assert_same(NAMES[i], got, wanted[i])
    without = [*leaves[:5], None]
    assert len(torch.autograd.grad(loss(op, *without), leaves[:5])) == 5


def test_nan_in_gives_nan_out(op):
    leaves = make(op)
    leaves[2].data[0, 3, 1, 2] = torch.nan
    o, state = results(op, *leaves)
    assert o[0].isnan().any() and state[0].isnan().any() and not o[1].isnan().any()
    found = torch.autograd.grad(o.sum() + state.sum(), leaves)
    assert any(x[0].isnan().any() for x in found) and not any(x[1].isnan().any() for x in found)


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_kept_for_the_backward(op, packed):
    """Inputs, and a state every 256 tokens: no chunk's matrices, no activations."""
    leaves = make(op, dtype=torch.float32, B=1, T=2048, HK=2, HV=4, K=32, V=32)
    bounds = torch.tensor([0, 700, 701, 2048]) if packed else None
    leaves[5] = leaves[5].detach().repeat(3 if packed else 1, 1, 1, 1).requires_grad_()
    inputs = sum(x.nbytes for x in leaves)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        o, _ = results(op, *leaves, cu_seqlens=bounds)
    by_address = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    q, k, v = leaves[:3]
    states = 2048 // 256 * 4 * 32 * 32 * 4
    assert sum(by_address.values()) <= inputs + states + (0 if bounds is None else bounds.nbytes)
    assert sum(by_address.values()) <= 1.2 * (q.nbytes + k.nbytes + v.nbytes + o.nbytes)


def test_what_is_kept_in_16_bits(op):
    """Of q, k, v and o; KDA's decays, which are fp32, are twice as large as its keys."""
    heads = 2 if op == "chunk_kda" else 1
    made = registry.ops()[op].make_inputs(B=1, T=2048, HK=heads, HV=2, K=128, V=128, dtype=torch.bfloat16)
    leaves = [made[name].requires_grad_() for name in NAMES[:5]]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        o, _ = results(op, *leaves, None)
    by_address = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    size = sum(x.nbytes for x in (*leaves[:3], o))
    assert sum(by_address.values()) <= {"chunk_gdn": 1.2, "chunk_kda": 1.5}[op] * size


def test_memory_of_a_backward_is_linear_in_tokens(op):
    from hf_gdn.eval.timing import peak_bytes

    kernel = backward_of(op)
    peaks = []
    for T in (512, 2048):
        call = registry.ops()[kernel.op].make_inputs(T=T, HK=2, HV=2, K=32, V=32)
        with torch.no_grad():
            peaks.append(peak_bytes(lambda call=call: kernel.fn(**call), torch.device("cpu")))
    assert peaks[1] < 4 * peaks[0]


# --------------------------------------------------------------------------------------------- what takes derivatives


def test_operators_pass_opcheck(op):
    bounds = torch.tensor([0, 300, 300, 600])
    for cu_seqlens in (None, bounds):
        *inputs, state = (x.detach() for x in make(op, B=1, T=600))
        state = state if cu_seqlens is None else state.repeat(3, 1, 1, 1)
        save, backward = gradients.TRAINING_OPERATORS[op]
        options = cu_seqlens, 0.3, True, 1.0, "eager"
        torch.library.opcheck(save, (*inputs, state, *options, 256))
        o, final, saved = save(*inputs, None, *options, 256)
        assert len(saved) == 2
        torch.library.opcheck(backward, (*inputs, o, final, saved, None, *options))
        torch.library.opcheck(backward, (*inputs, o, final, saved, state, *options))


@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", None), ("inductor", None), ("aot_eager", True)])
def test_compiled(op, backend, dynamic):
    leaves = make(op)
    compiled = torch.compile(lambda *x: loss(op, *x), fullgraph=True, backend=backend, dynamic=dynamic)
    wanted = torch.autograd.grad(loss(op, *leaves), leaves)
    for name, got, want in zip(NAMES, torch.autograd.grad(compiled(*leaves), leaves), wanted):
        assert_close(name, got, want, SAME_SUMS)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(op, reentrant):
    from torch.utils.checkpoint import checkpoint

    leaves = make(op)
    wanted = torch.autograd.grad(loss(op, *leaves), leaves)
    checkpoint(lambda *x: loss(op, *x), *leaves, use_reentrant=reentrant).backward()
    for name, leaf, want in zip(NAMES, leaves, wanted):
        assert_same(name, leaf.grad, want)


def test_func(op):
    leaves = make(op)
    wanted = torch.autograd.grad(loss(op, *leaves), leaves)
    found = torch.func.grad(lambda *x: loss(op, *x), argnums=tuple(range(6)))(*(x.detach() for x in leaves))
    for name, got, want in zip(NAMES, found, wanted):
        assert_same(name, got, want)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(op):
    """Of a gradient, and of vectors in a backward."""
    leaves = [x.detach() for x in make(op)]
    each = lambda q: torch.func.grad(lambda q: loss(op, q, *leaves[1:]))(q)  # noqa: E731
    qs = torch.stack([leaves[0], 2 * leaves[0]])
    assert_close("q", torch.func.vmap(each)(qs), torch.stack([each(q) for q in qs]), SAME_SUMS)
    q = leaves[0].requires_grad_()
    o, _ = results(op, *leaves)
    vectors = torch.randn(2, *o.shape, dtype=o.dtype)
    (got,) = torch.autograd.grad(o, q, vectors, is_grads_batched=True, retain_graph=True)
    wanted = [torch.autograd.grad(o, q, x, retain_graph=True)[0] for x in vectors]
    assert_close("vectors", got, torch.stack(wanted), SAME_SUMS)


@pytest.mark.parametrize("backend", tiny.ON_A_CPU)
def test_forward_mode_is_refused(op, backend):
    leaves = [x.detach().float() for x in make(op)]
    with pytest.raises(RuntimeError, match="forward-mode derivatives .* are not supported by hf_gdn; take"):
        torch.func.jvp(lambda q: results(op, q, *leaves[1:], backend=backend), (leaves[0],), (leaves[0],))


def test_second_derivatives_are_refused(op):
    leaves = make(op)
    (first,) = torch.autograd.grad(loss(op, *leaves), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op} of hf_gdn has first derivatives only, and a second one was asked"):
        first.sum().backward()


def test_autocast_rounds_nothing(op):
    kernel = backward_of(op)
    call = registry.ops()[kernel.op].make_inputs(T=100, HK=2, HV=4, K=24, V=40)
    with torch.autocast("cpu", torch.bfloat16):
        holds.matches_reference(kernel, call)


@pytest.mark.parametrize("backend", tiny.ON_A_CPU)
@pytest.mark.parametrize("name", ["inplace", "token_states"])
@pytest.mark.parametrize("needed", ["q", "initial_state"])
def test_gradients_through_what_is_written_are_refused(op, backend, name, needed):
    """Before anything is written: the state, and the tensor for states, are what they were."""
    op = op.replace("chunk", "recurrent")
    *inputs, state = (x.detach() for x in make(op, T=3, dtype=torch.float32))
    before, states = state.clone(), torch.zeros(2, 3, *state.shape[1:])
    (inputs[0] if needed == "q" else state).requires_grad_()
    written = dict(inplace=True) if name == "inplace" else dict(token_states=states)
    call = functools.partial(registry.get(op, backend).fn, *inputs, scale=1.0, initial_state=state, **written)
    with pytest.raises(RuntimeError, match=f"{name}.* has no gradients, and an argument requires grad; leave it out"):
        call()
    assert_same("state", state.detach(), before)
    assert not states.any()
    with torch.no_grad():
        call()


# ------------------------------------------------------------------------------------------------------- who serves it


@pytest.fixture
def fast(op):
    """A backend with a forward and gradients, before all others; ``fast(fn)`` names what computes the gradients."""
    kernels = [registry.get(name, "eager") for name in (op, registry.backward_of(op))]
    forward = dataclasses.replace(kernels[0], backend="fast", differentiable=False, save=None, keep=0)
    registry.register(forward, before=registry.kernels(op)[0].backend)

    def fast(fn, why_not=lambda request: None, checked=False):
        kernel = dataclasses.replace(kernels[1], backend="fast", fn=fn, why_not=why_not, checked=checked)
        registry.register(kernel, before=registry.kernels(kernel.op)[0].backend)

    yield fast
    registry.unregister(op, "fast")
    if registry.get_or_none(kernels[1].op, "fast"):
        registry.unregister(kernels[1].op, "fast")


def request(op, leaves):
    return registry.Request.of(op, leaves[0], leaves[2])


def test_a_backend_with_gradients_serves_both_ways(op, fast):
    leaves, called = make(op), []
    wanted = torch.autograd.grad(loss(op, *leaves), leaves)
    eager = backward_of(op).fn
    assert registry.resolve(request(op, leaves), needs_grad=True).backend == "eager"  # it has no backward yet
    fast(lambda *args, **options: called.append(options["saved"]) or eager(*args, **options))
    assert registry.resolve(request(op, leaves), needs_grad=True).backend == "fast"
    for backend in ("auto", "fast"):
        for name, got, want in zip(NAMES, torch.autograd.grad(loss(op, *leaves, backend=backend), leaves), wanted):
            assert_same(name, got, want)
    assert len(called) == 2 and all(saved is None or len(saved) == 0 for saved in called)


def test_a_backend_whose_gradients_are_refused_does_not_serve(op, fast):
    leaves = make(op)
    fast(None, why_not=lambda request: "is broken here")
    assert registry.resolve(request(op, leaves)).backend == "fast"
    for backend in ("auto", "fast"):
        assert registry.resolve(request(op, leaves), backend, needs_grad=True).backend == "eager"
        torch.autograd.grad(loss(op, *leaves, backend=backend), leaves)


def test_a_default_backend_without_gradients(op, fast, monkeypatch):
    """As HF_GDN_BACKEND sets it: inference on that backend, gradients on eager."""
    leaves = make(op)
    wanted = torch.autograd.grad(loss(op, *leaves), leaves)
    monkeypatch.setattr(registry, "DEFAULT_BACKEND", "fast")
    monkeypatch.setattr(registry, "_chosen", {})
    for refuses in (False, True):
        if refuses:
            fast(None, why_not=lambda request: "is broken here")
        for name, got, want in zip(NAMES, torch.autograd.grad(loss(op, *leaves), leaves), wanted):
            assert_same(name, got, want)


def test_gradients_whose_launch_fails_go_to_the_next_backend(op, fast):
    from torch._inductor.runtime.triton_compat import OutOfResources  # what Triton raises, or a stand-in

    leaves = make(op, T=300)
    wanted = torch.autograd.grad(loss(op, *leaves), leaves)

    def fails(*args, **options):
        raise OutOfResources(300_000, 200_000, "shared memory")

    fast(fails, checked=True)
    for name, got, want in zip(NAMES, torch.autograd.grad(loss(op, *leaves), leaves), wanted):
        assert_same(name, got, want)
    assert registry.resolve(request(op, leaves)).backend == "fast"
    assert registry.resolve(request(op, leaves), needs_grad=True).backend == "eager"
