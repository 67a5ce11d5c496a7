"""The backends outside the registry: FlashQLA's signature and refusals, transformers' torch functions, fla's row."""

import dataclasses
import importlib.machinery
import importlib.util
import os
import sys
import types

import pytest
import torch

from hf_gdn import registry
from hf_gdn.eval import candidates, kernel_bench, kernel_cases, kernel_oracle
from hf_gdn.eval.options import KernelBenchOptions
from hf_gdn.loading.shapes import SHAPES

TINY = {"gdn": "qwen3_next-tiny", "kda": "kimi_linear-tiny"}
OPS = ("chunk_gdn", "recurrent_gdn", "chunk_kda", "recurrent_kda")


def test_flash_qla_is_called_by_its_signature(monkeypatch):
    seen = {}

    def chunk_gated_delta_rule(
        q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False
    ):
        seen.update(final=output_final_state, l2norm=use_qk_l2norm_in_kernel)
        eager = registry.get("chunk_gdn", "eager").fn
        return eager(q, k, v, g, beta, scale=scale, initial_state=initial_state, qk_l2norm=use_qk_l2norm_in_kernel)

    kernel = candidates.candidates("chunk_gdn", "qwen3_next")[-1]
    asked = registry.Request("chunk_gdn", "cuda", torch.bfloat16, 16, 32, 128, 128)
    with monkeypatch.context() as absent:
        absent.setattr(importlib.util, "find_spec", lambda name: None)
        assert kernel.backend == "flash_qla"
        assert kernel.why_not(asked) == "needs the flash_qla package, which is not installed: pip install flash-qla"
    module = types.ModuleType("flash_qla")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_qla", None)
    module.chunk_gated_delta_rule = chunk_gated_delta_rule
    monkeypatch.setitem(sys.modules, "flash_qla", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for changes, text in (
        (dict(device_type="cpu"), "needs a CUDA device; the tensors are on cpu"),
        (dict(dtype=torch.float32), "serves float16 and bfloat16; the tensors are float32"),
        (dict(head_k_dim=96, head_v_dim=192), "serves K = V = 128; K is 96 and V is 192"),
        ({}, None),
    ):
        assert kernel.why_not(dataclasses.replace(asked, **changes)) == text
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert kernel.why_not(asked) == "serves compute capabilities 9.0, 10.0, 10.3, 12.0; this device has 8.0"
    job = kernel_oracle.prepare(
        kernel_cases.Case("chunk_gdn", TINY["gdn"], 1, 70, "forward", "flash_qla"), torch.device("cpu"), torch.float32
    )
    assert kernel_oracle.error(kernel_oracle.call(kernel.fn, job.inputs, None)(), job.wanted)[0] < 1e-5
    assert seen == {"final": True, "l2norm": True}


def test_fla_does_not_hand_its_row_to_flash_qla(monkeypatch):
    for before in (None, "1"):
        if before is None:
            monkeypatch.delenv("FLA_FLASH_QLA", raising=False)
        else:
            monkeypatch.setenv("FLA_FLASH_QLA", before)
        with candidates.on_its_own("fla"):
            assert os.environ["FLA_FLASH_QLA"] == "0"
        assert os.environ.get("FLA_FLASH_QLA") == before
        with candidates.on_its_own("eager"):
            assert os.environ.get("FLA_FLASH_QLA") == before


@pytest.mark.parametrize("op", OPS)
def test_transformers_own_torch_function(op):
    function = candidates.torch_function(op, SHAPES[TINY[op[-3:]]].model_type)
    assert function.__module__.startswith("transformers.models.") and not hasattr(function, "__wrapped__")
    kernel = candidates.candidates(op, "no_such_model")[0]
    request = registry.Request(op, "cpu", torch.float32, 1, 1, 8, 8)
    assert (
        kernel.why_not(request) == "needs model type 'no_such_model', which this version of transformers does not have"
    )


def test_transformers_that_leave_the_heads_to_the_layer(monkeypatch):
    """Older versions expect q and k with the value heads' number."""
    function = candidates.torch_function("chunk_gdn", "qwen3_next")

    def older(q, k, v, **kwargs):
        assert q.shape[2] == k.shape[2] == v.shape[2]
        return function(q, k, v, **kwargs)

    monkeypatch.setattr(candidates, "torch_function", lambda op, model_type: older)
    case = kernel_cases.Case("chunk_gdn", TINY["gdn"], 1, 70, "forward", "transformers")
    row = kernel_bench.measure(case, KernelBenchOptions(seconds=1e-3), torch.device("cpu"), torch.float32)
    assert row.passed, row
