"""Prefill of patched layers on the Triton kernels, in the interpreter: what runs, and that it is the original."""

import functools
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache

import hf_gdn
from hf_gdn import operators, registry
from hf_gdn.kernels.triton.runtime import INTERPRET
from hf_gdn.testing import assert_close
from hf_gdn.testing.tolerances import LAYER
from tests import tiny_models as tiny
from tests.patches.layer_runs import PRODUCTS, ComputedOperators, launched, states

pytestmark = [pytest.mark.interpret, pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")]

LAUNCHES = {"gdn": 4, "kda": 6}  # prologue, preparation, scan, norm


def run(layer, *pieces, cache=None, **kwargs):
    """The layer on pieces of tokens, one after the other."""
    with torch.no_grad():
        return torch.cat([layer(x, **tiny.layer_given(layer, cache), **kwargs) for x in pieces], 1)


def on_triton(family, **kwargs):
    return hf_gdn.patched(family, backend="triton", strict=True, **kwargs)


@pytest.fixture
def layer(family):
    return tiny.mixer(tiny.model(family))


# One family of each variant and one with beta up to 2: the two tests of every family show that all share a forward.
some = pytest.mark.parametrize("family", ["qwen3_next", "olmo_hybrid", "kimi_linear"])


def test_prefill_is_the_originals_and_the_original_goes_on(family):
    """Two long pieces, the second after a cache, and a short first call; then unpatched."""
    model = tiny.model(family)
    layer, x = tiny.mixer(model), torch.randn(2, 90, 32, generator=torch.Generator().manual_seed(0))
    for sizes in ([65, 20, 5], [3, 20, 67]):
        theirs, ours = DynamicCache(config=model.config), DynamicCache(config=model.config)
        first, *middle, last = x.split(sizes, 1)
        others = tiny.mixers(model)[1:]  # OLMo-Hybrid of transformers 5.17 asks the last one whether there is a past

        def read(cache, first=first, middle=middle, others=others):
            begun = run(layer, first, cache=cache)
            for each in others:
                run(each, first, cache=cache)
            return torch.cat((begun, run(layer, *middle, cache=cache)), 1)

        wanted = read(theirs)
        with on_triton(family):
            got = read(ours)
        assert_close("prefill", got, wanted, LAYER)
        for name, one, other in zip(("conv_state", "state"), states(ours), states(theirs)):
            assert_close(name, one, other, LAYER)
        assert_close("unpatched", run(layer, last, cache=ours), run(layer, last, cache=theirs), LAYER)


@some
def test_padding_anywhere(family, layer):
    config = tiny.model(family).config.get_text_config()
    x, mask = torch.randn(3, 40, 32), torch.ones(3, 40, dtype=torch.long)
    mask[1, :9], mask[1, 30:], mask[2] = 0, 0, 0
    mask[2, 5::7] = 1
    with on_triton(family):
        cache = DynamicCache(config=config)
        got = run(layer, x, cache=cache, attention_mask=mask)
        later = run(layer, x[:, :20], cache=cache)
    for row in range(3):
        kept = DynamicCache(config=config)
        real = x[row : row + 1, mask[row] == 1]
        for each in tiny.mixers(tiny.model(family)):  # OLMo-Hybrid of 5.17 asks the last one whether there is a past
            run(each, real, cache=kept)
        kept = DynamicCache(config=config)
        with hf_gdn.patched(family, backend="eager"):
            wanted = run(layer, real, cache=kept), run(layer, x[row : row + 1, :20], cache=kept)
        assert_close(f"row {row}", got[row, mask[row] == 1], wanted[0][0], LAYER)
        assert_close(f"row {row}, later", later[row], wanted[1][0], LAYER)
    assert not got[mask == 0].any()


@some
def test_packed_sequences(family, layer):
    x, bounds = torch.randn(1, 50, 32), [0, 7, 8, 8, 50]
    with on_triton(family):
        packed = run(layer, x, cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32))
    for first, last in pairwise(bounds):
        if first < last:
            assert_close(f"{first}:{last}", packed[:, first:last], run(layer, x[:, first:last]), LAYER)


@some
def test_compiles_as_operators_without_a_break(family, layer):
    """As kernels that torch.compile cannot look into are called."""
    x = torch.randn(2, 40, 32)
    wanted = run(layer, x)
    with on_triton(family), torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_close("compiled", compiled(x), wanted, LAYER)
    torch._dynamo.reset()


def test_prefill_is_the_projections_and_few_launches(family, layer, monkeypatch):
    """Nothing else is computed, cast or copied: no cat, no split that copies, no fp32 activations."""
    launches, x = launched(monkeypatch), torch.randn(2, 40, 32)
    with on_triton(family), ComputedOperators() as seen, torch.no_grad():
        layer(x)
    op = hf_gdn.patches.all_families()[family].variant
    assert len(launches) == LAUNCHES[op], launches
    products = [name for name in seen.names if name in ("mm", "addmm", "bmm")]
    others = [name for name in seen.names if name not in ("mm", "addmm", "bmm", "empty_like")]
    assert len(products) == PRODUCTS[family], seen.names
    assert not others, f"besides the projections: {others}"


@some
def test_kernels_of_a_backend_go_together(family, layer, monkeypatch, request):
    """Prologue and norm are those of the delta rule's backend where it has them, the eager ones where it has not."""
    seen, op = [], hf_gdn.patches.all_families()[family].variant
    for name in ("call_prologue", "call_norm"):
        launch = getattr(operators, name)

        def watched(kernel, *args, launch=launch, **kwargs):
            seen.append((kernel.op, kernel.backend))
            return launch(kernel, *args, **kwargs)

        monkeypatch.setattr(hf_gdn.patches.mixer, name, watched)
    x = torch.randn(1, 20, 32)
    with on_triton(family):
        run(layer, x)
    assert seen == [(f"prologue_{op}", "triton"), ("gated_norm", "triton")]
    for name in (f"prologue_{op}", "gated_norm"):
        request.addfinalizer(functools.partial(registry.register, registry.get(name, "triton")))
        registry.unregister(name, "triton")
    with on_triton(family):
        run(layer, x)
    assert seen[2:] == [(f"prologue_{op}", "eager"), ("gated_norm", "eager")]
