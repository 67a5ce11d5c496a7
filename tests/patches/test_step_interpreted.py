"""Decoding of patched layers on the step kernels, in Triton's interpreter: what runs, and that it is the original."""

import pytest
import torch
from transformers import DynamicCache

import hf_gdn
from hf_gdn import registry
from hf_gdn.kernels.triton import step as module
from hf_gdn.kernels.triton.runtime import INTERPRET
from hf_gdn.testing import assert_close
from hf_gdn.testing.tolerances import LAYER
from tests import tiny_models as tiny
from tests.patches.layer_runs import PRODUCTS, ComputedOperators, multiply_from_the_left, states, stride_parameters

pytestmark = [pytest.mark.interpret, pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")]


def decode(layer, x, cache, sizes):
    """Feed x ``[B, T, hidden]`` in pieces."""
    with torch.no_grad():
        return torch.cat([layer(piece, **tiny.layer_given(layer, cache)) for piece in x.split(sizes, 1)], 1)


def test_decoding_is_the_originals(family):
    """After the original's prefill; and the original goes on with what the kernels left."""
    model = tiny.model(family)
    layer = tiny.mixer(model)
    x = torch.randn(2, 22, 32, generator=torch.Generator().manual_seed(0))
    sizes = [1, 1, 5, 1]
    theirs, ours = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for cache in (theirs, ours):
        for each in tiny.mixers(model):  # OLMo-Hybrid of transformers 5.17 asks the last one whether there is a past
            decode(each, x[:, :9], cache, [9])
    addresses = [state.data_ptr() for state in states(ours)]
    with hf_gdn.patched(backend="triton", strict=True):
        got = decode(layer, x[:, 9:17], ours, sizes)
    wanted = decode(layer, x[:, 9:17], theirs, sizes)
    assert_close("decode", got, wanted, LAYER)
    for name, one, other in zip(("conv_state", "state"), states(ours), states(theirs)):
        assert_close(name, one, other, LAYER)
    assert [state.data_ptr() for state in states(ours)] == addresses
    assert_close("unpatched", decode(layer, x[:, 17:], ours, [1] * 5), decode(layer, x[:, 17:], theirs, [1] * 5), LAYER)


@pytest.mark.parametrize("change", [multiply_from_the_left, stride_parameters])
@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
def test_strided_projections_and_parameters(family, change):
    model = tiny.model(family)
    layer, x = tiny.mixer(model), torch.randn(2, 6, 32)
    change(layer)
    wanted = decode(layer, x, DynamicCache(config=model.config), [5, 1])
    with hf_gdn.patched(backend="triton", strict=True):
        got = decode(layer, x, DynamicCache(config=model.config), [5, 1])
    assert_close("outputs", got, wanted, LAYER)


def test_a_token_is_the_projections_and_two_launches(family, monkeypatch):
    """Nothing else is computed or copied."""
    from triton.runtime.interpreter import GridExecutor

    model = tiny.model(family)
    layer, launches, execute = tiny.mixer(model), [], GridExecutor.__call__

    def counted(self, *args, **kwargs):
        launches.append(self.fn.__name__)
        return execute(self, *args, **kwargs)

    cache, x = DynamicCache(config=model.config), torch.randn(2, 1, 32)
    decode(layer, torch.randn(2, 5, 32), cache, [5])
    monkeypatch.setattr(GridExecutor, "__call__", counted)
    taken = []

    def outside(*args):  # what the interpreter itself does with tensors is none of ours
        with torch.utils._python_dispatch._disable_current_modes():
            taken.append(args)
            return module.step(*args)

    kernel = registry.get_or_none(f"step_{hf_gdn.patches.all_families()[family].variant}", "triton")
    monkeypatch.setitem(
        registry._table, (kernel.op, "triton"), registry.Kernel(kernel.op, "triton", outside, kernel.why_not)
    )
    with hf_gdn.patched(family, backend="triton", strict=True), ComputedOperators() as seen, torch.no_grad():
        layer(x, **tiny.layer_given(layer, cache))
    assert len(taken) == 1 and len(launches) == 2
    products = [name for name in seen.names if name in ("mm", "addmm", "bmm")]
    others = [name for name in seen.names if name not in ("mm", "addmm", "bmm")]
    assert len(products) == PRODUCTS[family], seen.names
    assert not others, f"besides the projections: {others}"
