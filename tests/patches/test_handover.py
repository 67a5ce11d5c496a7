"""Patching never slows a model down: which calls the original serves, with stand-ins for kernels and for a GPU."""

import dataclasses
import logging

import pytest
import torch

import hf_gdn
from hf_gdn import log, registry
from hf_gdn.errors import BackendError
from hf_gdn.patches import handover, original_forward
from hf_gdn.registry import Request
from hf_gdn.testing import assert_same
from hf_gdn.upstream import original_kernels
from tests import tiny_models as tiny

NAME = "qwen3_next"
REQUEST = Request("chunk_gdn", "cpu", torch.float32, 2, 4, 8, 8)


pytestmark = pytest.mark.usefixtures("without_numba")


@pytest.fixture
def gpu(monkeypatch):
    """The CPU passes for a GPU, and the original's delta rule for a kernel of the hub."""
    monkeypatch.setattr(handover, "_on_accelerator", lambda x: True)
    monkeypatch.setattr(handover, "delta_rule_of", lambda forward: "hub: a_kernel")
    monkeypatch.setattr(log, "warned", set())


@pytest.fixture
def fast():
    """A stand-in for a fast backend, by op; `differentiable` as asked for."""
    made = []

    def register(op, differentiable):
        eager = registry.get(op, "eager")
        kernel = dataclasses.replace(eager, backend="fast", differentiable=differentiable)
        made.append(registry.register(kernel, before="eager"))
        return kernel

    registry.kernels()
    yield register
    for kernel in made:
        registry.unregister(kernel.op, kernel.backend)


def layer_and_input(length=20):
    model = tiny.model(NAME)
    return tiny.mixer(model), torch.randn(1, length, model.config.hidden_size)


def served_by_original(call, caplog):
    caplog.clear()
    log.warned.clear()
    with caplog.at_level(logging.WARNING, "hf_gdn"):
        call()
    return any("the original forward runs: its hub: a_kernel kernels are faster" in text for text in caplog.messages)


def test_with_gradients_the_first_backend_that_has_a_backward_serves(fast):
    fast("chunk_gdn", False)
    assert registry.resolve(REQUEST).backend == "fast"
    assert registry.resolve(REQUEST, needs_grad=True).backend == "eager"
    registry.unregister("chunk_gdn", "fast")
    registry.register(dataclasses.replace(registry.get("chunk_gdn", "eager"), backend="fast"), before="eager")
    assert registry.resolve(REQUEST, needs_grad=True).backend == "fast"


@pytest.mark.parametrize(
    ("has_fast", "backward", "grad", "original"),
    [
        (False, False, False, True),  # ours was refused
        (False, False, True, True),
        (True, False, False, False),
        (True, False, True, True),  # ours has no backward
        (True, True, True, False),
    ],
)
def test_who_serves_a_prefill(has_fast, backward, grad, original, gpu, fast, caplog):
    layer, x = layer_and_input()
    for op in ("chunk_gdn", "recurrent_gdn") if has_fast else ():
        fast(op, backward)
    with hf_gdn.patched(NAME), torch.set_grad_enabled(grad):
        assert served_by_original(lambda: layer(x), caplog) == original


def test_the_originals_result_and_said_once(gpu, caplog):
    layer, x = layer_and_input()
    wanted = layer(x)
    with hf_gdn.patched(NAME), caplog.at_level(logging.WARNING, "hf_gdn"):
        for _ in range(3):
            assert_same("y", layer(x), wanted)
    assert len([text for text in caplog.messages if "the original forward runs" in text]) == 1


def test_what_the_original_does_wrong_stays(gpu, caplog):
    layer, x = layer_and_input()
    mask = torch.ones(1, 20)
    mask[:, :3] = 0
    bounds = torch.tensor([0, 5, 20])
    with hf_gdn.patched(NAME), torch.no_grad():
        assert not served_by_original(lambda: layer(x, attention_mask=mask), caplog)
        assert not served_by_original(lambda: layer(x, cu_seq_lens_q=bounds), caplog)


def test_a_backend_asked_for_serves(gpu, caplog):
    layer, x = layer_and_input()
    with hf_gdn.patched(NAME, backend="eager"), torch.no_grad():
        assert not served_by_original(lambda: layer(x), caplog)
    with hf_gdn.patched(NAME, strict=True), torch.no_grad():
        assert not served_by_original(lambda: layer(x), caplog)


def test_a_model_whose_original_runs_on_torch_stays(monkeypatch, caplog):
    monkeypatch.setattr(handover, "_on_accelerator", lambda x: True)
    layer, x = layer_and_input()
    with hf_gdn.patched(NAME), torch.no_grad():
        assert not served_by_original(lambda: layer(x), caplog)


def test_on_a_cpu_nothing_is_handed_over(monkeypatch, caplog):
    monkeypatch.setattr(handover, "delta_rule_of", lambda forward: "fla")
    layer, x = layer_and_input()
    with hf_gdn.patched(NAME), torch.no_grad():
        assert not served_by_original(lambda: layer(x), caplog)


def test_what_an_original_runs_on(monkeypatch):
    forward = original_forward(NAME)
    assert original_kernels.delta_rule_of(forward) == "torch"
    found = original_kernels.kernels_of(forward)
    assert len(found) >= 3 and set(found.values()) == {"torch"}

    def theirs():
        raise BackendError("not called")

    theirs.__module__ = "fla.ops.gated_delta_rule"
    name = next(name for name in found if "chunk" in name)
    import inspect

    monkeypatch.setitem(inspect.unwrap(forward).__globals__, name, theirs)
    assert original_kernels.delta_rule_of(forward) == "fla"
