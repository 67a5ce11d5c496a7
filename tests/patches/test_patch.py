"""The machinery: swap, exact undo, contexts, what others did, and errors that leave nothing patched."""

import importlib
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from transformers import cache_utils

import hf_gdn
from hf_gdn import log, patches
from hf_gdn.errors import BackendError
from hf_gdn.patches import PatchError
from hf_gdn.testing import assert_close
from hf_gdn.testing.tolerances import LAYER
from tests import tiny_models as tiny

# Those that the installed transformers has.
FAMILIES = {name: family for name, family in patches.all_families().items() if name in tiny.CONFIGS}


def layer_class(name):
    return getattr(importlib.import_module(FAMILIES[name].module), FAMILIES[name].class_name)


def test_every_family_has_a_tiny_model():
    assert set(tiny.ALL) == set(patches.all_families())
    absent = {row.name for row in hf_gdn.status().families if row.state.startswith("absent from transformers")}
    assert set(tiny.ALL) - absent == set(tiny.CONFIGS)


def all_attributes() -> dict[type, dict]:
    """All attributes of all classes of all families' modules and of transformers' caches."""
    modules = [importlib.import_module(family.module) for family in FAMILIES.values()] + [cache_utils]
    return {cls: dict(vars(cls)) for module in modules for cls in vars(module).values() if isinstance(cls, type)}


def test_undo_is_exact_and_patching_idempotent():
    originals, before = {name: layer_class(name).forward for name in FAMILIES}, all_attributes()
    assert hf_gdn.patch().active
    replaced = {name: layer_class(name).forward for name in FAMILIES}
    assert all(replaced[name] is not originals[name] for name in FAMILIES)
    hf_gdn.patch()
    assert all(layer_class(name).forward is replaced[name] for name in FAMILIES)
    hf_gdn.patch(backend="eager")
    assert "eager" in str(hf_gdn.status())
    assert not hf_gdn.unpatch().active
    hf_gdn.unpatch()
    assert all(layer_class(name).forward is originals[name] for name in FAMILIES)
    assert all_attributes() == before


def test_one_family_alone(family):
    status = hf_gdn.patch(family)
    assert {row.name: row.state for row in status.families if row.name in FAMILIES} == {
        name: "patched" if name == family else "original" for name in FAMILIES
    }


def test_contexts_restore_what_was(family):
    cls = layer_class(family)
    original = cls.forward
    with hf_gdn.patched(family):
        ours = cls.forward
        assert ours is not original
        with hf_gdn.unpatched():
            assert cls.forward is original
        assert cls.forward is ours
        with pytest.raises(RuntimeError, match="inside"), hf_gdn.patched(backend="eager"):
            assert cls.forward is not ours
            raise RuntimeError("inside")
        assert cls.forward is ours
    assert cls.forward is original


def test_a_forward_that_others_replaced_is_left_in_place(family, caplog):
    cls = layer_class(family)
    original = cls.forward
    hf_gdn.patch()

    def theirs(self, hidden_states, cache=None, attention_mask=None, **kwargs):
        return original(self, hidden_states, cache, attention_mask, **kwargs)

    try:
        cls.forward = theirs
        assert "replaced by" in str(hf_gdn.status())
        with caplog.at_level(logging.WARNING, "hf_gdn"):
            hf_gdn.unpatch()
        assert cls.forward is theirs
        assert "theirs" in caplog.text and "left in place" in caplog.text
    finally:
        cls.forward = original


def test_theirs_comes_back_after_a_block_over_it(family):
    """Somebody's forward over ours, and a block that patches over both."""
    cls = layer_class(family)
    original = cls.forward

    def theirs(self, hidden_states, cache=None, attention_mask=None, **kwargs):
        return original(self, hidden_states, cache, attention_mask, **kwargs)

    try:
        hf_gdn.patch(family)
        cls.forward = theirs
        with hf_gdn.patched(family, backend="eager"):
            assert cls.forward is not theirs
        assert cls.forward is theirs
    finally:
        cls.forward = original


def test_a_layer_with_a_forward_of_its_own_is_told_of(family, caplog, monkeypatch):
    """kernelize() binds a hub kernel's forward to the layer: that one runs."""
    model = tiny.model(family)
    layer = tiny.mixer(model)

    def hub_forward(self, hidden_states, **kwargs):
        return hidden_states

    layer.forward = hub_forward.__get__(layer)
    monkeypatch.setattr(log, "warned", set())
    with caplog.at_level(logging.WARNING, "hf_gdn"):
        hf_gdn.patch()
    told = [
        message for message in caplog.messages if f"some {type(layer).__name__} instances have their own" in message
    ]
    assert len(told) == 1 and "hub_forward" in told[0]
    assert [row for row in patches.layer_kernels(model).values() if "replaced by" in row and "hub_forward" in row]
    assert layer.forward.__func__ is hub_forward
    hf_gdn.unpatch()
    assert layer.forward.__func__ is hub_forward


def test_absent_families_are_skipped_unless_asked_for(monkeypatch):
    monkeypatch.setattr(type(FAMILIES["kimi_linear"]), "module", "transformers.models.nowhere.modeling_nowhere")
    status = hf_gdn.patch()
    assert "absent from transformers" in str(status) and status.active
    hf_gdn.unpatch()
    with pytest.raises(PatchError, match="has no module"):
        hf_gdn.patch("kimi_linear")


def test_every_model_with_a_delta_rule_has_a_family():
    """A model of transformers whose code calls a gated delta rule or Kimi delta attention needs a family file."""
    root = Path(importlib.import_module("transformers.models").__file__).parent
    calls = re.compile(r"gated_delta_rule\(|kimi_delta_attention\(")
    found = {file.parent.name for file in root.glob("*/modeling_*.py") if calls.search(file.read_text("utf-8"))}
    assert {"qwen3_next", "kimi_linear"} <= found
    missing = sorted(found - set(patches.all_families()))
    assert not missing, f"no family file in hf_gdn/patches for: {missing}"
    assert found == set(tiny.CONFIGS), "every family that is there has a tiny model in tests/tiny_models.py"


def test_bad_names():
    with pytest.raises(ValueError, match="unknown model family 'llama'; families: bailing_hybrid, glm5_next, kimi_li"):
        hf_gdn.patch(["qwen3_next", "llama"])
    with pytest.raises(ValueError, match="unknown backend 'cudnn'; valid backends: auto, triton, fla, numba, eager"):
        hf_gdn.patch(backend="cudnn")
    with pytest.raises(ValueError, match="unknown model family"):
        hf_gdn.unpatch("llama")
    assert not hf_gdn.status().active


def test_a_named_backend_that_cannot_serve_raises(family):
    model = tiny.model(family)
    with hf_gdn.patched(backend="triton"), pytest.raises(BackendError, match="needs"), torch.no_grad():
        model(tiny.batch()[0])


@pytest.mark.parametrize("value, active", [("1", False), ("yes", False), ("no", True), ("false", True)])
def test_disabled_by_environment(monkeypatch, caplog, value, active):
    monkeypatch.setenv("HF_GDN_DISABLE", value)
    assert hf_gdn.patch().active is active


def test_layer_kernels_say_what_runs(family):
    model = tiny.model(family)
    assert set(patches.layer_kernels(model).values()) == {"original"}
    with hf_gdn.patched():
        found = patches.layer_kernels(model)
    assert len(found) == 3
    assert all("chunk" in row and tiny.ON_A_CPU[0] in row for row in found.values())


@pytest.mark.parametrize("when", ["dispatched_first", "patched_first"])
@pytest.mark.parametrize("how", ["dispatch", "cpu_offload"])
def test_models_dispatched_by_accelerate(family, how, when):
    """Hooked layers hold the forward they were hooked with: both directions have to reach them."""
    ids, _ = tiny.batch()
    with torch.no_grad():
        wanted = tiny.model(family)(ids).logits
    model = tiny.model(family)

    def dispatch():
        if how == "dispatch":
            dispatch_model(model, {"": "cpu"}, force_hooks=True)
            assert hasattr(tiny.mixer(model), "_old_forward")
        else:
            cpu_offload(model, execution_device=torch.device("cpu"))
            assert tiny.mixer(model).conv1d.weight.device.type == "meta"

    if when == "patched_first":
        hf_gdn.patch()
        dispatch()
    else:
        dispatch()
        hf_gdn.patch()
    assert runs_ours(model, ids)
    with torch.no_grad():
        assert_close("patched", model(ids).logits, wanted, LAYER)
    hf_gdn.unpatch()
    assert not runs_ours(model, ids)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted)


def runs_ours(model, ids) -> bool:
    """Whether a forward goes through the mixer."""
    family = next(family for family in FAMILIES.values() if family.class_name == type(tiny.mixer(model)).__name__)
    calls, project = [], type(family).project
    type(family).project = lambda self, layer, x: calls.append(1) or project(self, layer, x)
    try:
        with torch.no_grad():
            model(ids)
    finally:
        type(family).project = project
    return bool(calls)


IMPORT = """
import sys, time
import transformers
before = set(sys.modules)
start = time.perf_counter()
import hf_gdn
print(time.perf_counter() - start)
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
hf_gdn.patch()
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before} & {"fla", "datasets", "rich", "typer"}))
"""


def test_import_is_light():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    seconds, imported, after_patch = done.stdout.splitlines()
    assert float(seconds) < 0.3
    assert imported == "['hf_gdn']"
    assert after_patch == "[]"


def test_works_without_triton(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('no triton here')")
    code = """
import torch, hf_gdn
from hf_gdn import registry, ops
hf_gdn.patch()
x = registry.ops()["chunk_kda"].make_inputs(T=3)
ops.chunk_kda(x["q"], x["k"], x["v"], x["g"], x["beta"])
print(registry.get("chunk_kda", "triton").why_not(registry.Request.of("chunk_kda", x["q"], x["v"])))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert out.stdout.strip() == "needs the triton package, which is not installed", out.stderr
