"""Others that change transformers' layers: Liger's patches, and forwards bound to layers."""

from types import MethodType

import pytest
import torch

import hf_gdn
from hf_gdn.testing import assert_close
from hf_gdn.testing.tolerances import LAYER
from tests import tiny_models as tiny
from tests.ecosystem.common import logits, runs_ours

IDS, _ = tiny.batch()


@pytest.fixture
def liger(monkeypatch):
    """Liger's function for Qwen3-Next, with everything that it changes put back afterwards."""
    functions = pytest.importorskip("liger_kernel.transformers")
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling

    for name in ("Qwen3NextRMSNorm", "Qwen3NextMLP", "Qwen3NextExperts", "apply_rotary_pos_emb"):
        monkeypatch.setattr(modeling, name, getattr(modeling, name))
    monkeypatch.setattr(modeling.Qwen3NextForCausalLM, "forward", modeling.Qwen3NextForCausalLM.forward)
    return functions.apply_liger_kernel_to_qwen3_next


@pytest.mark.parametrize("what", ["model", "class"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_liger(liger, when, what):
    """Of what Liger changes, its loss and rotary embedding; its other kernels need a GPU. Mixers are not among it."""
    original = tiny.model("qwen3_next")
    wanted = logits(original, IDS)
    options = dict(rope=False, rms_norm=False, swiglu=False, cross_entropy=False, fused_linear_cross_entropy=True)

    def apply():
        liger(**options, model=original if what == "model" else None)

    if when == "before":
        apply()
    hf_gdn.patch(strict=True)
    if when == "after":
        apply()
    model = original if what == "model" else tiny.model("qwen3_next")
    assert "liger" in model.forward.__module__
    assert runs_ours(model, IDS)
    assert_close("logits", logits(model, IDS), wanted, LAYER)
    hf_gdn.unpatch()
    assert "liger" in model.forward.__module__ and not runs_ours(model, IDS)


@pytest.mark.parametrize("when", ["before", "after"])
def test_liger_leaves_the_mixers_alone(liger, when):
    """With all of Liger's changes, a mixer of a model built then is the one of tests/patches."""
    x = torch.randn(2, 70, 32)
    with torch.no_grad():
        wanted = tiny.mixer(tiny.model("qwen3_next"))(x)
    if when == "before":
        liger()
    hf_gdn.patch(strict=True)
    if when == "after":
        liger()
    model = tiny.model("qwen3_next")
    assert "Liger" in type(model.model.norm).__name__
    with torch.no_grad():
        assert_close("mixer", tiny.mixer(model)(x), wanted, LAYER)


@pytest.mark.gpu
@pytest.mark.parametrize("when", ["before", "after"])
def test_all_of_liger_on_a_gpu(liger, when):
    """Loss and gradients of the whole model; fp32 products in Triton round as torch's do, in another order."""
    ids = IDS.cuda()
    liger()
    original = tiny.model("qwen3_next").cuda()
    wanted = original(ids, labels=ids).loss
    hf_gdn.patch()
    if when == "after":
        liger()
    got = tiny.model("qwen3_next").cuda()(ids, labels=ids).loss
    assert_close("loss", got, wanted, LAYER)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", ["qwen3_5", "kimi_linear"])
def test_kernelized_layers(family, when):
    """`kernelize` binds the class's forward to every layer it has no kernel for: patch and unpatch have to reach it."""
    wanted = logits(tiny.model(family), IDS)
    if when == "before":
        hf_gdn.patch(strict=True)
    model = tiny.model(family)
    for layer in tiny.mixers(model):
        layer.forward = MethodType(type(layer).forward, layer)  # kernels.layer.layer._replace_forward
    hf_gdn.patch(strict=True)
    assert runs_ours(model, IDS)
    hf_gdn.unpatch()
    assert not runs_ours(model, IDS)
    assert torch.equal(logits(model, IDS), wanted)
