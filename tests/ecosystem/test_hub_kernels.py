"""Hugging Face's kernels package: models that use it, patched, and our functions through it (hf_gdn.kernel_mapping)."""

import copy
import importlib
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers.integrations import hub_kernels
from transformers.utils import import_utils

import hf_gdn
from hf_gdn.errors import PatchError
from hf_gdn.hub_kernels import Layer
from hf_gdn.testing import assert_close
from hf_gdn.testing.tolerances import PROLOGUE
from tests import tiny_models as tiny

# transformers takes one range of versions; where that cannot be installed, 0.17.2 has what is tested here.
START = """
import runpy
from transformers.utils import import_utils
check = import_utils.is_kernels_available
if not check():
    getattr(check, "__wrapped__", check).__defaults__ = ("0.16", "99")
    check.cache_clear() if hasattr(check, "cache_clear") else None
assert check(), "transformers does not see the kernels package"
runpy.run_module("tests.ecosystem.with_hub_kernels", run_name="__main__", alter_sys=True)
"""
OTHERS = sorted(set(tiny.CONFIGS) - {"qwen3_next", "kimi_linear"})


def run(programs: str, families: list[str]) -> None:
    """The package itself, in a process of its own, since transformers decides when it is imported."""
    pytest.importorskip("kernels")
    path = os.pathsep.join([str(Path(__file__).parents[2]), *(p for p in sys.path if p)])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", START, programs, *families]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "same", done.stderr[-2000:]


def test_patched_models_that_use_kernels():
    """The layers of Qwen3.5 are replaceable as a whole; of the other families only the functions that they call are."""
    run("patched", ["qwen3_next", "kimi_linear", "qwen3_5"])


def test_models_run_our_functions():
    run("loaded,tiny_models,gpu", ["qwen3_next", "kimi_linear"])


@pytest.mark.extended
def test_all_models_run_our_functions():
    run("tiny_models,gpu", OTHERS)


@pytest.mark.extended
def test_compiled_models_run_our_functions():
    run("compiled", ["qwen3_next", "kimi_linear"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "eager", "fla"])  # fla's has no norm: eager's serves
@pytest.mark.parametrize("name", ["qwen3_next.Qwen3Next", "kimi_linear.KimiLinear"])
def test_a_norm_is_the_originals(name, backend, dtype):
    """Of rows of any shape and strides, the original's in fp32; also with a gate that the original computes."""
    model, _, prefix = name.partition(".")
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    norm = getattr(module, f"{prefix}RMSNormGated")(16).to(dtype)
    norm.weight.data = torch.randn(16, 2).to(dtype)[:, 0]
    ours = Layer("RMSNormGated", backend).load().forward
    for shape in ((6, 16), (2, 3, 5, 16)):
        x, gate = torch.randn(2, *shape).to(dtype)
        with torch.no_grad():
            wanted = copy.deepcopy(norm).float()(x.float(), gate.float())
            for given in ((x, gate), [y.mT.contiguous().mT for y in (x, gate)]):
                assert_close("norm", ours(norm, *given), wanted, PROLOGUE[dtype])
    norm.activation = "gelu"
    assert torch.equal(ours(norm, x, gate), norm(x, gate))


def test_what_cannot_be_mapped_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="unknown backend 'fast'; valid backends: auto, "):
        hf_gdn.kernel_mapping("fast")
    monkeypatch.setattr(import_utils, "is_kernels_available", lambda: False)
    monkeypatch.setattr(metadata, "version", lambda name: "0.1.5")
    with pytest.raises(
        PatchError, match=r"transformers 5\S+ takes kernels >= 0\S+ and < 0\S+; kernels 0.1.5 is installed"
    ):
        hf_gdn.kernel_mapping()

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(PatchError, match="; none is installed"):
        hf_gdn.kernel_mapping()
    monkeypatch.setattr(import_utils, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "_kernels_enabled", False)
    with pytest.raises(PatchError, match="USE_HUB_KERNELS is off"):
        hf_gdn.kernel_mapping()
