"""Models that accelerate has spread over devices, memory and disk are the original ones, patched before or after."""

import pytest
import torch
from accelerate import disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from transformers import AutoModelForCausalLM

import hf_gdn
from hf_gdn.testing import assert_close
from hf_gdn.testing.tolerances import LAYER
from tests import tiny_models as tiny
from tests.ecosystem.common import TWO, logits, runs_ours

IDS, _ = tiny.batch(rows=2, length=20)


def layer_map(places):
    """A device map that deals decoder layers out to places in turn; the rest stays on the first."""
    layers = {f"model.layers.{i}": places[i % len(places)] for i in range(4)}
    rest = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    return {**dict.fromkeys(rest, places[0]), **layers}


def within(model, device_map):
    """The part of a device map whose modules a model has."""
    names = {name for name, _ in model.named_modules()}
    return {name: place for name, place in device_map.items() if name in names}


@pytest.mark.parametrize("when", ["before", "after"])
def test_offloaded_to_disk(family, when, tmp_path):
    """Every module with weights of its own is read from disk when it is called: those hf_gdn reads directly, too."""
    wanted = logits(tiny.model(family), IDS)
    if when == "before":
        hf_gdn.patch(strict=True)
    model = tiny.model(family)
    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    layer = tiny.mixer(model)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    if when == "after":
        hf_gdn.patch(strict=True)
    assert runs_ours(model, IDS)
    assert_close("disk", logits(model, IDS), wanted, LAYER)
    assert {p.device.type for p in layer.parameters()} == {"meta"}  # and put away again
    hf_gdn.unpatch()
    assert torch.equal(logits(model, IDS), wanted)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", TWO)
def test_layers_on_cpu_and_on_disk(family, when, tmp_path):
    wanted = tiny.model(family).generate(IDS, max_new_tokens=6, do_sample=False)
    if when == "before":
        hf_gdn.patch(strict=True)
    model = tiny.model(family)
    dispatch_model(
        model, within(model, layer_map(["cpu", "disk"])), main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    if when == "after":
        hf_gdn.patch(strict=True)
    assert runs_ours(model, IDS)
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), wanted)


@pytest.mark.parametrize("family", TWO)
def test_from_pretrained_with_a_device_map(family, tmp_path):
    original = tiny.model(family)
    wanted = logits(original, IDS)
    original.save_pretrained(tmp_path / "model")
    hf_gdn.patch(strict=True)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=within(original, layer_map(["cpu", "disk"])),
        offload_folder=str(tmp_path / "offload"),
    )
    assert runs_ours(model, IDS)
    assert_close("loaded", logits(model, IDS), wanted, LAYER)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", TWO)
def test_hooks_taken_off_again(family, when):
    """Without its hooks a layer keeps a bound forward in its instance: it has to follow patch and unpatch."""
    wanted = logits(tiny.model(family), IDS)
    if when == "before":
        hf_gdn.patch(strict=True)
    model = tiny.model(family)
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    remove_hook_from_submodules(model)
    hf_gdn.patch(strict=True)
    assert runs_ours(model, IDS)
    assert_close("patched", logits(model, IDS), wanted, LAYER)
    hf_gdn.unpatch()
    assert not runs_ours(model, IDS)
    assert torch.equal(logits(model, IDS), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", TWO)
def test_layers_on_several_devices(family, when):
    """GPUs, or one and the CPU; activations, cache and states travel with their layers."""
    ids = IDS.cuda()
    wanted = logits(tiny.model(family).cuda(), ids)
    places = list(range(torch.cuda.device_count())) if torch.cuda.device_count() > 1 else [0, "cpu"]
    if when == "before":
        hf_gdn.patch(strict=True)
    model = tiny.model(family)
    dispatch_model(model, within(model, layer_map(places)), main_device=0, force_hooks=True)
    hf_gdn.patch(strict=True)
    assert runs_ours(model, ids)
    assert_close("logits", logits(model, ids), wanted, LAYER)
